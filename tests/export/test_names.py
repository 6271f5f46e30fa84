"""Names of inputs, outputs and dynamic axes in the exported graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from deploynorm import InputError, export, fold
from deploynorm.layers import FRN2d
from deploynorm.run.onnxruntime import OnnxRuntimeRunner

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Returns whatever is made of its input, its features and its result."""

    def __init__(self, returned: Callable[[Tensor, Tensor, Tensor], Any] = lambda x, y, z: z) -> None:
        super().__init__()
        self.conv, self.norm, self.returned = nn.Conv2d(3, 4, 3, padding=1), FRN2d(4), returned

    def forward(self, image: Tensor) -> Any:
        features = self.conv(image)
        return self.returned(image, features, self.norm(features))


class CalledOutput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.output = nn.Parameter(torch.ones(1, 4, 1, 1))

    def forward(self, output: Tensor) -> Tensor:
        return self.conv(output) * self.output


def _run(network: nn.Module, **options: Any) -> tuple[list[str], list[str], float]:
    """Names of inputs and outputs as ONNX Runtime has them, and the largest error."""
    exported = export(network.eval(), X, **options)
    proto = exported.to_proto()
    onnx.checker.check_model(proto, full_check=True)
    with OnnxRuntimeRunner(proto.SerializeToString(), plugins=[]) as runner, torch.no_grad():
        got = runner.infer({runner.inputs[0].name: X.numpy()})
        want = network(X)
    flat = [leaf for leaf in _pytree.tree_leaves(want) if leaf is not None]
    error = max(float(np.abs(a - b.numpy()).max()) for a, b in zip(got.values(), flat, strict=True))
    return [spec.name for spec in runner.inputs], list(got), error


RETURNED: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "a tensor": (lambda x, y, z: z, ["output"]),
    "a tuple": (lambda x, y, z: (z, y), ["output_0", "output_1"]),
    "nested lists": (lambda x, y, z: (z, [y]), ["output_0", "output_1"]),
    "a dict": (lambda x, y, z: {"low": y, "high": z}, ["low", "high"]),
    "a dict with keys of inner values": (lambda x, y, z: {"conv2d": z, "relu": y}, ["conv2d", "relu"]),
    "a dict with the name of the input": (lambda x, y, z: {"image": z}, ["image_output"]),
    "a dict whose keys are no text": (lambda x, y, z: {1: y, 2: z}, ["1", "2"]),
    "a dict with an empty key": (lambda x, y, z: {"": y, "b": z}, ["output_0", "output_1"]),
    "a tensor and None": (lambda x, y, z: (None, z), ["output"]),
    "a dict with None": (lambda x, y, z: {"a": z, "b": None}, ["a"]),
    "its input": (lambda x, y, z: (x, z), ["output_0", "output_1"]),
    "its input under its own name": (lambda x, y, z: {"image": x, "z": z}, ["image_output", "z"]),
    "one value twice": (lambda x, y, z: (z, z), ["output_0", "output_1"]),
}


@pytest.mark.parametrize("name", RETURNED)
def test_outputs_are_named_for_what_the_network_returns(name: str, require: Callable[[str], None]) -> None:
    require("ort")
    returned, names = RETURNED[name]
    inputs, outputs, error = _run(Net(returned))
    assert (inputs, outputs) == (["image"], names)
    assert error < 1e-5


@pytest.mark.parametrize("name", ["pixels", "conv.weight", "conv2d", "output", "val_0"])
def test_any_name_may_be_given_to_an_input(name: str, require: Callable[[str], None]) -> None:
    """Whatever value of the graph has it already gets another."""
    require("ort")
    names, outputs, error = _run(Net(), input_names=name)
    assert names == [name]
    assert outputs == (["output_output"] if name == "output" else ["output"])
    assert error < 1e-5


def test_any_name_may_be_given_to_an_output(require: Callable[[str], None]) -> None:
    require("ort")
    assert _run(Net(lambda x, y, z: (y, z)), output_names=["conv.weight", "a/b c"])[1] == ["conv.weight", "a/b c"]


def test_an_argument_and_a_parameter_called_output(require: Callable[[str], None]) -> None:
    require("ort")
    names, outputs, error = _run(CalledOutput())
    assert (names, outputs) == (["output"], ["output_output"])
    assert error < 1e-5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_names": ["a", "b"]}, "input_names has another number of names. Got 2: 'a', 'b'; expected 1"),
        ({"input_names": []}, "input_names has another number of names"),
        ({"input_names": [""]}, "input_names has a name that is no text. Got ''"),
        ({"input_names": [3]}, "input_names has a name that is no text. Got 3"),
        ({"output_names": ["a", "a"]}, "output_names has a name twice. Got 'a'"),
        ({"output_names": ["a", "b"]}, "output_names has another number of names. Got 2: 'a', 'b'; expected 1"),
        ({"output_names": "image"}, "an input and an output of one name. Got image"),
        ({"dynamic": {"y": {0: "N"}}}, "the network has no input 'y'. Expected image"),
        ({"dynamic": {"image": {4: "N"}}}, "input image has no axis 4. Expected 0 to 3"),
        ({"dynamic": "bathc"}, "unknown word. Got 'bathc'; expected none, batch, spatial, all"),
        ({"dynamic": {"image": [0, 2]}}, "not axes of input 'image' with their names. Got [0, 2]"),
        ({"dynamic": {"image": {0: "a b"}}}, "not axes of input 'image' with their names"),
        ({"dynamic": {"image": {2: "S", 3: "S"}}}, "one name for axes of different sizes. Got S"),
    ],
    ids=str,
)
def test_names_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        export(Net(), X, **options)
    assert message in str(raised.value)


def test_dynamic_axes_are_named_one_by_one() -> None:
    exported = export(Net(), X, dynamic={"image": {0: "batch", 3: "width"}})
    assert exported.inputs[0].shape == ("batch", 3, 8, "width")
    assert export(Net(), X, dynamic={"": {2: "rows"}}, input_names="x").inputs[0].shape == (2, 3, "rows", 8)
    assert export(Net(), X, dynamic={"x": {2: "rows"}}, input_names="x").inputs[0].shape == (2, 3, "rows", 8)


@pytest.mark.parametrize("stage", [fold, export])
def test_a_bare_tensor_is_the_only_input(stage: Callable[..., Any]) -> None:
    """It was taken apart along the batch, which gave an input (3, 8, 8) and no error."""
    stage(Net(), X)
    with pytest.raises(InputError, match=r"example input 0 is not a tensor\. Got list"):
        stage(Net(), ([1.0],))
    stage(Net(), {"image": X})
    with pytest.raises(InputError, match=r"no input 'picture'\. Expected image"):
        stage(Net(), {"picture": X})
    with pytest.raises(InputError, match="there are no example inputs"):
        stage(Net(), ())
