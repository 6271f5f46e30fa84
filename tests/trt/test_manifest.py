"""Manifests of engines: whatever stands in one, it is read as it was written, or refused in our words."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from deploynorm._inspect import inspect
from deploynorm.errors import ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.trt.engine import Engine, FrnRecord
from deploynorm.trt.layers import Layer
from deploynorm.trt.manifest import facts_of, image_and_labels, manifest_path, read_manifest
from deploynorm.trt.settings import Range
from deploynorm.trt.source import EngineSource

PLAN = b"a plan"
IMAGE = {"shape": [3, 8, 8], "mean": [0.0, 0.0, 0.5], "std": [1.0, 1.0, 1.0]}
ORIGIN = {
    "onnx": {"file": "net.onnx", "sha256": "ab", "external_data": {"file": "net.onnx.data", "sha256": "cd"}},
    "image": IMAGE,
    "labels": ["cat", "dog"],
    "plugin_libraries": [{"file": "libours.so", "sha256": "ef"}],
    "versions": {"python": "3.11", "onnx": "1.19"},
}
WRONG: tuple[Any, ...] = (None, True, 3, -1.5, "text", [], {}, [[]], {"a": {}}, [None], 10**400)


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    shape = (1, 3, 8, 8)
    built = Engine(
        plan=PLAN,
        backend="tensorrt",
        version="11.4.0",
        compute_capabilities=("9.0",),
        inputs=(TensorSpec("x", ("N", 3, 8, 8), "float32"),),
        profiles=({"x": Range(shape, shape, shape)},),
        outputs=(TensorSpec("y", ("?", 2), "float32"),),
        frn=FrnRecord(1, "plugin", 1, "as asked for"),
        layers=(Layer("conv", "convolution", (), (), ()),),
        precision="float16",
        verified_products=1,
        products=1,
        tf32=False,
        embedded=("libours.so",),
        origin=ORIGIN,
    )
    built.save(tmp_path / "net.engine")
    return tmp_path / "net.engine"


def record_of(engine: Path) -> Any:
    return json.loads(manifest_path(engine).read_text())


def write(engine: Path, record: object) -> None:
    manifest_path(engine).write_text(json.dumps(record))


def places(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each part of a record is, at every level."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value if isinstance(value, list) else ()):
        yield from places(inner, (*path, key))
    yield path


def changed(record: object, path: tuple[Any, ...], value: object) -> object:
    if not path:
        return value
    twin = copy.deepcopy(record)
    part: Any = twin
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return twin


def refusal(read: Callable[[], object]) -> ModelError | None:
    try:
        read()
    except ModelError as error:
        return error
    return None


@pytest.mark.slow
def test_a_manifest_of_any_other_value_anywhere_is_read_or_refused(engine: Path) -> None:
    record, refused, tried = record_of(engine), 0, 0
    for path in places(record):
        for value in WRONG:
            try:
                write(engine, changed(record, path, value))
            except ValueError:  # too long for JSON
                continue
            for read in (
                lambda: str(inspect(engine)),
                lambda: image_and_labels(engine),
                lambda: EngineSource.of(engine),
            ):
                tried += 1
                error = refusal(read)
                assert error is None or ("net.engine" in error.where and error.exit_code == 2)
                refused += error is not None
    assert tried > 1000
    assert 400 < refused < tried


READ = (
    *(
        (key,)
        for key in ("file", "sha256", "backend", "version", "compute_capabilities", "inputs", "outputs", "layers")
    ),
    *(("inputs", 0, key) for key in ("name", "dtype", "shape")),
    *(("layers", 0, key) for key in ("kind", "dtypes", "count")),
    ("compute_capabilities", 0),
    ("inputs", 0, "shape", 1),
    ("frn", "way"),
)


@pytest.mark.parametrize("path", READ, ids=str)
def test_what_is_read_of_an_engine_has_its_type(engine: Path, path: tuple[Any, ...]) -> None:
    record = record_of(engine)
    for value in (True, 1.5, {"a": 1}, [[1]]):
        write(engine, changed(record, ("engine", *path), value))
        with pytest.raises(
            ModelError, match=r"net\.engine\.json: is damaged: .* of the engine is none. Fix: remove it"
        ):
            read_manifest(engine)


@pytest.mark.parametrize("part", ["image", "labels"])
def test_what_is_read_of_the_model_has_its_type(engine: Path, part: str) -> None:
    record = record_of(engine)
    for value in (True, 1.5, "text", {"a": 1}, [[1]]):
        write(engine, changed(record, (part,), value))
        with pytest.raises(
            ModelError, match=r"net\.engine\.json: is damaged: .*Fix: build the engine again, or remove it"
        ):
            image_and_labels(engine)


def test_the_hash_of_the_engine_is_compared(engine: Path) -> None:
    record = record_of(engine)
    assert facts_of(engine, PLAN)["sha256"] == record["engine"]["sha256"]
    engine.write_bytes(PLAN + b".")
    for read in (inspect, EngineSource.of):
        with pytest.raises(
            ModelError, match=r"is not the file that net\.engine\.json was written for. Got SHA-256 "
        ) as caught:
            read(engine)
        assert record["engine"]["sha256"] in str(caught.value)


def test_inspect_prints_what_stands_inside_of_another(engine: Path) -> None:
    text = str(inspect(engine))
    for line in (
        "onnx                  file: net.onnx, sha256: ab, external_data: (file: net.onnx.data, sha256: cd)",
        "plugin_libraries      (file: libours.so, sha256: ef)",
        "image                 shape: [3, 8, 8], mean: [0.0, 0.0, 0.5], std: [1.0, 1.0, 1.0]",
        "hardware_compatible   -",
    ):
        assert line in text.splitlines(), text
    assert "{" not in text
