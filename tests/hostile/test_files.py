"""Changed files of each kind, read in child processes: read or refused by one of our errors, and nothing else."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from children import tried
from graphs import frn_model
from torch import nn

from deploynorm._inspect import inspect
from deploynorm.checkpoint import load
from deploynorm.inference import _read
from deploynorm.onnx_file import OnnxFile
from deploynorm.trt.manifest import image_and_labels, manifest_path, read_manifest


def onnx_file() -> bytes:
    return frn_model(body=True).SerializeToString()


def archive() -> bytes:
    buffer = io.BytesIO()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    torch.export.save(torch.export.export(network, (torch.ones(2, 3, 8, 8),)), buffer)
    return buffer.getvalue()


def arrays() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.zeros((2, 3)), y=np.arange(4))
    return buffer.getvalue()


def array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((2, 3)))
    return buffer.getvalue()


def manifest() -> bytes:
    tensor = {"name": "x", "dtype": "float32", "shape": ["N", 3, 8, 8]}
    engine = {"backend": "tensorrt", "version": "11.4.0", "compute_capabilities": ["9.0"], "inputs": [tensor]}
    engine |= {"outputs": [tensor], "frn": {"way": None}, "layers": [{"kind": "a", "dtypes": "b", "count": 1}]}
    return json.dumps({"engine": engine, "labels": ["a"], "image": None}).encode()


def read_onnx(path: Path) -> None:
    file = OnnxFile.read(path)
    inspect(path)
    _ = file.inputs, file.image_and_labels, file.half_types
    file.whole_proto()


def read_record(path: Path) -> None:
    read_manifest(path)
    image_and_labels(path)
    inspect(path)


KINDS: dict[str, tuple[str, Callable[[], bytes], Callable[[Path], object]]] = {
    "onnx": ("m.onnx", onnx_file, read_onnx),
    "pt2": ("m.pt2", archive, load),
    "npz": ("x.npz", arrays, lambda path: _read(str(path), "x", None)),
    "npy": ("x.npy", array, lambda path: _read(str(path), "x", None)),
    "manifest": ("m.engine", manifest, read_record),
}


def changed(content: bytes, seed: int) -> bytes:
    """Some bytes flipped, cut out, doubled or replaced by extreme ones."""
    rng = random.Random(seed)
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at, length = rng.randrange(len(data)), rng.choice((1, 1, 2, 4, 16))
        kind = rng.randrange(5)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and len(data) > length + 1:
            del data[at : at + length]
        elif kind == 2:
            data[at:at] = data[at : at + length]
        elif kind == 3:
            data[at : at + length] = rng.choice((b"\xff", b"\0", b"9", b"[", b"-")) * length
        else:
            del data[max(at, 1) :]
    return bytes(data)


@pytest.mark.parametrize("count", [30, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_changed_files_are_read_or_refused(kind: str, count: int, tmp_path: Path) -> None:
    name, make, read = KINDS[kind]
    content, path = make(), tmp_path / name

    def call(seed: int) -> None:
        path.write_bytes(b"plan" if kind == "manifest" else changed(content, seed))
        if kind == "manifest":
            manifest_path(path).write_bytes(changed(content, seed))
        read(path)

    figures, faults = tried(range(count), call)
    print(f"{kind}: {figures}")
    figures.assert_harmless(count, faults)
