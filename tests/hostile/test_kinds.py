"""One small file of each kind of fault that was found, with what becomes of it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from broken import FAULTS, lies_in
from graphs import frn_model, one_node

from deploynorm.checkpoint._limits import time_limit
from deploynorm.checkpoint._program import RefusedError, check_extent, plain_size
from deploynorm.errors import DeployNormError, InputError, ModelError
from deploynorm.inference import run_on_files
from deploynorm.onnx_file import OnnxFile
from deploynorm.trt.source import holds_library


@pytest.mark.parametrize("name", FAULTS)
def test_an_onnx_file_that_no_reader_survives_is_refused(name: str) -> None:
    change, message = FAULTS[name]
    model = frn_model(body=True)
    OnnxFile.read(model.SerializeToString())
    change(model)
    with pytest.raises(ModelError, match=message):
        OnnxFile.read(model.SerializeToString())


def test_weights_in_a_fifo_are_not_waited_for(tmp_path: Path) -> None:
    model = frn_model(body=True)
    lies_in(model, "weights")
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    os.mkfifo(tmp_path / "weights")
    with pytest.raises(ModelError, match="weights is not a file"):
        OnnxFile.read(tmp_path / "m.onnx").whole_proto()


def test_a_scalar_output_is_written(tmp_path: Path, require: Callable[[str], None]) -> None:
    require("ort")
    model = one_node("ReduceSum", {"x": ("float32", (2,))}, ("float32", ()))
    model.graph.node[0].attribute.append(onnx.helper.make_attribute("keepdims", 0))
    onnx.save(model, tmp_path / "m.onnx")
    np.save(tmp_path / "x.npy", np.ones(2, np.float32))
    path = run_on_files(tmp_path / "m.onnx", [str(tmp_path / "x.npy")]).save(tmp_path / "y.npz")
    assert np.load(path)["y"] == 2
    np.savez(tmp_path / "o.npz", x=np.array([{}], object))
    with pytest.raises(InputError, match="not an array file"):
        run_on_files(tmp_path / "m.onnx", [str(tmp_path / "o.npz")])


def test_towers_of_powers_and_many_choices_are_no_sizes() -> None:
    assert plain_size("Pow(Pow(Integer(9), Integer(9)), Integer(9))") is None
    assert plain_size("Pow(Symbol('s0'), Integer(2))") is not None
    choices = "Symbol('s0')"
    for index in range(40):
        choices = f"Max({choices}, Symbol('s{index}'))"
    assert plain_size(choices) is None


def test_sizes_that_square_each_other_are_refused() -> None:
    argument = {"arg": {"as_sym_int": {"as_name": "a"}}}
    node = {"target": "_operator.mul", "inputs": [argument, argument], "outputs": [{"as_sym_int": {"as_name": "a"}}]}
    check_extent({"graph_module": {"graph": {"nodes": [node] * 5}}})
    with pytest.raises(RefusedError, match="multiplies too many"):
        check_extent({"graph_module": {"graph": {"nodes": [node] * 40}}})


def test_a_read_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploynorm.checkpoint._limits._SECONDS", 0.1)

    def read() -> None:
        with time_limit(0, "file"):
            while True:
                time.sleep(0.001)

    with pytest.raises(DeployNormError, match="cannot be read within"):
        read()


@pytest.mark.parametrize(("machine", "found"), [(62, True), (183, True), (40, True), (190, False)])
def test_a_library_inside_a_plan_is_found(machine: int, found: bool) -> None:
    gpu = b"\x7fELF\x02\x01" + bytes(12) + (190).to_bytes(2, "little")
    elf = b"\x7fELF\x02\x01" + bytes(12) + machine.to_bytes(2, "little")
    assert holds_library(b"plan" + gpu + b"more" + elf + b"end") == found
