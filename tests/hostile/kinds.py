"""A small file of each kind that is read from others, how the library and the command read it, and what it says."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import pickle
import random
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from graphs import frn_model, one_node
from PIL import Image
from torch import nn

from deploynorm import checkpoint
from deploynorm._inspect import inspect
from deploynorm.contract import METADATA_IMAGE, METADATA_LABELS
from deploynorm.image import ImageSpec
from deploynorm.inference import _read
from deploynorm.models.data import load_fashion_mnist
from deploynorm.models.training.last import PARTS, load_last, save_last
from deploynorm.onnx_file import OnnxFile
from deploynorm.trt.manifest import image_and_labels, read_manifest

__all__ = ["KINDS", "Kind", "changed"]

IMAGE = ImageSpec((3, 8, 8), (0.5,) * 3, (0.25,) * 3)
FACTORY = "torch.nn:BatchNorm2d"
ARGUMENTS = {"num_features": 4}
RECIPE = {"seed": 0}
NETWORK = f"""--factory {FACTORY} --factory-kwargs {{"num_features":4}} --input-shape 2x4x8x8"""
"""What the command takes to read weights; without spaces, for it is split at them."""


class Kind(NamedTuple):
    """One kind of file."""

    changes: str
    """The name of the file that is changed."""
    make: Callable[[], Mapping[str, bytes]]
    """That file, and what lies beside it."""
    read: Callable[[Path], object]
    """Reads that file, and gives what it says."""
    command: str | None
    """The words after `deploynorm`; what comes of a file goes to y.npz. None for what no verb reads."""
    guarded: bool = False
    """Whether checksums guard it, so that a changed one must be refused, or say what the whole one says."""


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


@cache
def network() -> nn.Module:
    """Of torch.nn, so that the files are small and each part of them is met."""
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(**ARGUMENTS).eval()
    for value in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        assert value is not None
        value.uniform_(0.5, 2)
    return norm


def fed(*, channels: int = 4, name: str = "X") -> bytes:
    """An .npz with the input of a network."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.linspace(-1, 1, channels * 128, dtype=np.float32).reshape(2, channels, 8, 8)})
    return buffer.getvalue()


def written(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def own() -> bytes:
    """As `checkpoint.save` writes it."""
    folder = Path.cwd()
    about: Any = {
        "image": ImageSpec((4, 8, 8), (0.5,) * 4, (0.25,) * 4),
        "labels": ("a", "b"),
        "training": {"epochs": 3},
    }
    checkpoint.save(folder / "own.pt", factory=FACTORY, kwargs=ARGUMENTS, model=network(), **about)
    return (folder / "own.pt").read_bytes()


def last() -> bytes:
    parts = dict.fromkeys(PARTS, 1) | {"recipe": RECIPE, "model": network().state_dict()}
    save_last(Path("last.pt"), parts)
    return Path("last.pt").read_bytes()


def safetensors() -> bytes:
    from safetensors.torch import save

    return save(dict(network().state_dict()))


def arrays() -> dict[str, Any]:
    return {name: value.numpy() for name, value in network().state_dict().items()}


def archive() -> bytes:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    program = torch.export.export(model, (torch.ones(2, 4, 8, 8),))
    return written(lambda buffer: torch.export.save(program, buffer))


def half() -> bytes:
    return frn_model("float16", body=True).SerializeToString()


def onnx_file() -> bytes:
    return frn_model(body=True).SerializeToString()


def with_data() -> dict[str, bytes]:
    """An ONNX file with its weights in a file beside it."""
    onnx.save(frn_model(body=True), "m.onnx", save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    return {name: Path(name).read_bytes() for name in ("m.onnx", "m.onnx.data")}


def guarded(files: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of an ONNX model, with the manifest that the export writes."""
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    data = {"file": "m.onnx.data", "sha256": hashes["m.onnx.data"]} if "m.onnx.data" in hashes else None
    about = {"onnx": {"file": "m.onnx", "sha256": hashes["m.onnx"], "external_data": data}}
    return {**files, "m.deploynorm.json": json.dumps(about).encode(), "x.npz": fed()}


def picture(kind: str) -> dict[str, bytes]:
    """An image, and an ONNX file that says how to read one."""
    model = one_node("Relu", {"x": ("float32", ("N", 3, 8, 8))}, ("float32", ("N", 3, 8, 8)))
    model.metadata_props.add(key=METADATA_IMAGE, value=json.dumps(IMAGE.to_dict()))
    model.metadata_props.add(key=METADATA_LABELS, value="null")
    pixels = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    image = written(lambda buffer: Image.fromarray(pixels).save(buffer, kind.upper()))
    return {f"x.{kind}": image, "m.onnx": model.SerializeToString()}


def idx() -> dict[str, bytes]:
    """Two images and two labels for training, and as many for the test, as Fashion-MNIST has 70,000."""
    images = bytes((0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 28, 0, 0, 0, 28)) + bytes(range(196)) * 8
    labels = bytes((0, 0, 8, 1, 0, 0, 0, 2, 3, 7))
    parts = {"images-idx3-ubyte": images, "labels-idx1-ubyte": labels}
    return {f"{part}-{name}": content for part in ("train", "t10k") for name, content in parts.items()}


def zipped_idx() -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(content, mtime=0) for name, content in idx().items()}


def manifest() -> bytes:
    tensor = {"name": "x", "dtype": "float32", "shape": ["N", 3, 8, 8]}
    engine = {"backend": "tensorrt", "version": "11.4.0", "compute_capabilities": ["9.0"], "inputs": [tensor]}
    engine |= {"outputs": [tensor], "frn": {"way": None}, "layers": [{"kind": "a", "dtypes": "b", "count": 1}]}
    return json.dumps({"engine": engine, "labels": ["a"], "image": None}).encode()


def read_weights(path: Path) -> object:
    found = checkpoint.load(path, factory=FACTORY, kwargs=ARGUMENTS)
    return bits(found.model.state_dict()), found.image, found.labels, found.training


def read_archive(path: Path) -> object:
    found = checkpoint.load(path)
    assert found.exported is not None
    return bits(found.model.state_dict()), str(found.exported.graph), bits(found.example_inputs or {})


def read_own(path: Path) -> object:
    found = checkpoint.load(path, factory=FACTORY)
    return bits(found.model.state_dict()), found.image, found.labels, found.training


def read_last(path: Path) -> object:
    parts = load_last(path, RECIPE, torch.device("cpu"))
    return {**parts, "model": bits(parts["model"])}


def bits(state: Mapping[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: value.detach().numpy().tobytes() for name, value in state.items()}


def read_onnx(path: Path) -> object:
    file = OnnxFile.read(path)
    inspect(path)
    _ = file.inputs, file.image_and_labels, file.half_types, file.notes
    return file.whole_proto().SerializeToString(deterministic=True)


def read_guarded(path: Path) -> object:
    """What stands in the files, if all are what the manifest was written for; damaged ones are accepted on demand."""
    file = OnnxFile.read(path.with_name("m.onnx"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.begin(accept_changed=True)
    file.begin()
    if path.suffix == ".json":
        about = json.loads(path.read_bytes())["onnx"]
        return about["sha256"], about["external_data"]
    return file.whole_proto().SerializeToString(deterministic=True), path.read_bytes()


def read_data(path: Path) -> object:
    return OnnxFile.read(path.with_name("m.onnx")).whole_proto().SerializeToString(deterministic=True)


def read_record(path: Path) -> object:
    engine = path.with_name("m.engine")
    inspect(engine)
    return read_manifest(engine), image_and_labels(engine)


def read_arrays(path: Path) -> object:
    return {name: value.tobytes() for name, value in _read(str(path), "X", None).items()}


def read_image(path: Path) -> object:
    return IMAGE.read(path).tobytes()


def read_data_set(path: Path) -> object:
    data = load_fashion_mnist(path.parent)
    return [value.numpy().tobytes() for value in data if isinstance(value, torch.Tensor)]


def weights(**form: Any) -> dict[str, bytes]:
    return {
        "w.pt": written(lambda buffer: torch.save(network().state_dict(), buffer, **form)),
        "x.npz": fed(name="input"),
    }


def with_input(name: str, make: Callable[[], bytes]) -> Callable[[], dict[str, bytes]]:
    return lambda: {name: make(), "x.npz": fed(name="X" if name.endswith(".onnx") else "input")}


RUN = "-o y.npz --json y.json -q"
WEIGHTS = f"run w.pt x.npz {RUN} {NETWORK}"
MODEL = f"run m.onnx x.npz {RUN}"

KINDS: dict[str, Kind] = {
    "ONNX files": Kind("m.onnx", with_input("m.onnx", onnx_file), read_onnx, MODEL),
    "ONNX files in half precision": Kind("m.onnx", with_input("m.onnx", half), read_onnx, MODEL),
    "ONNX files beside a manifest": Kind(
        "m.onnx", lambda: guarded({"m.onnx": onnx_file()}), read_guarded, MODEL, guarded=True
    ),
    "weights of an ONNX file": Kind("m.onnx.data", lambda: {**with_data(), "x.npz": fed()}, read_data, MODEL),
    "weights beside a manifest": Kind("m.onnx.data", lambda: guarded(with_data()), read_guarded, MODEL, guarded=True),
    "manifests of ONNX files": Kind(
        "m.deploynorm.json", lambda: guarded(with_data()), read_guarded, MODEL, guarded=True
    ),
    "checkpoints of `save`": Kind(
        "own.pt", with_input("own.pt", own), read_own, f"run own.pt x.npz {RUN} --factory {FACTORY}", guarded=True
    ),
    "state dicts": Kind("w.pt", weights, read_weights, WEIGHTS, guarded=True),
    "state dicts of PyTorch before 1.6": Kind(
        "w.pt", lambda: weights(_use_new_zipfile_serialization=False), read_weights, WEIGHTS
    ),
    "pickled networks": Kind(
        "n.pt",
        with_input("n.pt", lambda: written(lambda buffer: torch.save(network(), buffer))),
        lambda path: bits(checkpoint.load(path).model.state_dict()),
        f"run n.pt x.npz {RUN} --input-shape 2x4x8x8",
        guarded=True,
    ),
    ".safetensors": Kind(
        "w.safetensors",
        with_input("w.safetensors", safetensors),
        read_weights,
        f"run w.safetensors x.npz {RUN} {NETWORK}",
    ),
    "weights in an .npz": Kind(
        "w.npz",
        with_input("w.npz", lambda: written(lambda buffer: np.savez(buffer, **arrays()))),
        read_weights,
        f"run w.npz x.npz {RUN} {NETWORK}",
        guarded=True,
    ),
    "pickles of arrays": Kind(
        "w.pkl",
        with_input("w.pkl", lambda: pickle.dumps(arrays(), 4)),
        read_weights,
        f"run w.pkl x.npz {RUN} {NETWORK}",
    ),
    ".pt2 archives": Kind("m.pt2", with_input("m.pt2", archive), read_archive, f"run m.pt2 x.npz {RUN}", guarded=True),
    "last.pt of a training": Kind("last.pt", lambda: {"last.pt": last()}, read_last, None, guarded=True),
    ".npz": Kind("x.npz", lambda: {"x.npz": fed(), "m.onnx": onnx_file()}, read_arrays, MODEL, guarded=True),
    ".npy": Kind(
        "x.npy",
        lambda: {
            "x.npy": written(lambda buffer: np.save(buffer, np.ones((2, 4, 8, 8), np.float32))),
            "m.onnx": onnx_file(),
        },
        read_arrays,
        f"run m.onnx x.npy {RUN}",
    ),
    "PNG images": Kind("x.png", lambda: picture("png"), read_image, f"run m.onnx x.png {RUN}"),
    "JPEG images": Kind("x.jpeg", lambda: picture("jpeg"), read_image, f"run m.onnx x.jpeg {RUN}"),
    "IDX files": Kind("train-images-idx3-ubyte", idx, read_data_set, None),
    "IDX files of labels": Kind("t10k-labels-idx1-ubyte", idx, read_data_set, None),
    "IDX files, gzipped": Kind("train-images-idx3-ubyte.gz", zipped_idx, read_data_set, None),
    "manifests of engines": Kind(
        "m.engine.json", lambda: {"m.engine.json": manifest(), "m.engine": b"plan"}, read_record, "inspect m.engine -q"
    ),
}
