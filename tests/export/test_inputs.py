"""How inputs are bound to a network's forward, and what of a network no ONNX file can hold."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tolerances import FOLD_FLOAT32
from torch import Tensor, nn

import deploynorm
from deploynorm import EagerRunner, export, fold
from deploynorm.errors import InputError, ModelError
from deploynorm.layers import CenConv2d, MABN2d
from deploynorm.run import open_runner
from deploynorm.trace import Dynamic

X, Y = torch.randn(2, 3, 8, 8), torch.randn(2, 4, 8, 8)


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)


class Optional(Base):
    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        y: Tensor = self.conv(x)
        y = y if scale is None else y * scale
        return y if shift is None else y + shift


class Named(Base):
    def forward(self, x: Tensor, *, shift: Tensor) -> Tensor:
        return self.conv(x) + shift


class AnyNames(Base):
    def forward(self, **given: Tensor) -> Tensor:
        return self.conv(given["x"]) + given["shift"]


@pytest.mark.parametrize("network", [Optional, Named, AnyNames])
def test_inputs_are_bound_by_name(network: type[Base]) -> None:
    model = network().eval()
    result = deploynorm.convert(model, {"shift": Y, "x": X}, dynamic="none")
    assert result, str(result)
    feeds = {"x": X.numpy(), "shift": Y.numpy()}
    with open_runner(result.exported.to_proto().SerializeToString()) as runner:
        assert {spec.name for spec in runner.inputs} == {"x", "shift"}
        (got,) = runner.infer(feeds).values()
    with torch.inference_mode():
        np.testing.assert_allclose(got, model(x=X, shift=Y).numpy(), **FOLD_FLOAT32.kwargs())
    with EagerRunner(model, result.exported.inputs) as eager:
        np.testing.assert_allclose(got, eager.infer(feeds)["output_0"], **FOLD_FLOAT32.kwargs())


@pytest.mark.parametrize("forward", [5, None, nn.Module.forward], ids=["number", "None", "none defined"])
def test_a_network_without_a_forward_is_refused(forward: Any) -> None:
    network = type("Odd", (Base,), {"forward": forward})()
    for verb in (export, fold, deploynorm.convert, partial(deploynorm.swap, norm="frn")):
        network.norm = nn.BatchNorm2d(4)
        with pytest.raises(
            ModelError, match=r"^Odd: the network has no forward that can be called. Fix: give it a meth"
        ):
            verb(network, X)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("way", ["script", "trace"])
def test_parts_of_torchscript_are_refused_with_what_to_do(way: str) -> None:
    conv = nn.Conv2d(3, 4, 3).eval()
    scripted = torch.jit.script(conv) if way == "script" else torch.jit.trace(conv, X)
    for verb in (export, fold, deploynorm.convert):
        with pytest.raises(
            ModelError, match=r"part 1\.0 is TorchScript .*Fix: build it in Python and load its state_dict"
        ):
            verb(nn.Sequential(nn.ReLU(), nn.Sequential(scripted)), X)
        with pytest.raises(
            ModelError, match=r"the network is TorchScript|its forward says not which arguments it takes"
        ):
            verb(scripted, X)


def test_dynamic_axes_of_inputs_in_kwargs_are_refused_in_a_line() -> None:
    class Loose(nn.Module):
        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            return x + more["shift"]

    examples = {"x": X, "shift": X}
    assert deploynorm.convert(Loose(), examples, dynamic="none")
    for dynamic in (None, "batch"):
        with pytest.raises(
            ModelError, match=r"inputs in \*\*kwargs. Got shift. Fix: name them in .*dynamic='none'"
        ) as caught:
            export(Loose(), examples, dynamic=dynamic)
        assert "\n" not in str(caught.value)


def test_an_argument_that_is_missing_or_unknown_is_named() -> None:
    with pytest.raises(InputError, match="no example of input shift"):
        export(Named(), X)
    with pytest.raises(InputError, match=r"no input 'z'\. Expected x, scale, shift"):
        export(Optional(), {"z": X})


@dataclass
class Result:
    logits: Tensor
    hidden: Tensor | None = None


class Output(OrderedDict[str, Tensor]):
    pass


@pytest.mark.parametrize(
    ("form", "names"),
    [
        (lambda y: Result(y), ["logits"]),
        (lambda y: Output(logits=y), ["logits"]),
        (lambda y: (y, 3), ["output_0", "output_1"]),
        (lambda y: (y, y.shape[0]), ["output_0", "output_1"]),
        (lambda y: {"a": y, "none": None}, ["a"]),
    ],
    ids=["dataclass", "mapping", "number", "size", "None"],
)
def test_a_result_of_any_form_is_exported_and_checked(form: Callable[[Tensor], Any], names: list[str]) -> None:
    class Net(Base):
        def forward(self, x: Tensor) -> Any:
            return form(self.conv(x))

    result = deploynorm.convert(Net(), X)
    assert result, str(result)
    assert list(result.exported.output_names) == names


class Dropping(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.conv(x))  # which drops in evaluation too


class Noisy(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + torch.rand_like(x[:, :1])


class BatchStatistics(Base):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(self.conv(x), self.norm.running_mean, self.norm.running_var, training=True)


def test_names_of_inputs_go_by_the_order_in_which_the_user_names_these() -> None:
    named = export(Named(), {"shift": Y, "x": X}, input_names=["offset", "image"], dynamic="none")
    assert {spec.name: spec.shape for spec in named.inputs} == {"image": X.shape, "offset": Y.shape}
    shapes = {"shift": tuple(Y.shape), "x": tuple(X.shape)}
    result = deploynorm.convert(Named(), input_shapes=shapes, input_names=["offset", "image"], dynamic="none")
    assert {spec.name: spec.shape for spec in result.exported.inputs} == {"image": X.shape, "offset": Y.shape}


class HalfInside(Base):
    def __init__(self) -> None:
        super().__init__()
        self.half_conv = nn.Conv2d(4, 4, 1).half()

    def forward(self, x: Tensor) -> Tensor:
        return self.half_conv(self.conv(x).half()).float()


def test_a_network_that_float64_breaks_is_compared_with_itself() -> None:
    result = deploynorm.convert(HalfInside(), X, rtol=1e-2)
    assert result, str(result)
    assert any("compared with the network in its own types" in note for note in result.parity.notes)


class Warped(Base):
    def forward(self, x: Tensor) -> Tensor:
        turn = torch.tensor([[[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0]]]).repeat(2, 1, 1)  # of the default type
        return F.grid_sample(x, F.affine_grid(turn, [2, 3, 8, 8], align_corners=False), align_corners=False)


def test_what_forward_makes_is_in_float64_too_where_the_truth_is() -> None:
    result = deploynorm.convert(Warped(), X, dynamic="none")
    assert result, str(result)
    assert not any("own types" in note for note in result.parity.notes)
    assert torch.get_default_dtype() == torch.float32


@lru_cache
def ramp(width: int) -> Tensor:
    return torch.linspace(0, 1, width)


class Remembered(Base):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x) * ramp(int(x.shape[3]))
        return y


def test_a_cached_function_gives_values_after_an_export() -> None:
    assert deploynorm.convert(Remembered(), X)
    assert ramp(8).tolist()[0] == 0


class Halves(Base):
    """A trace of an even batch fails for an odd one."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2)
        return first + second


def test_torch_prints_nothing_of_sizes_that_are_tried(capfd: pytest.CaptureFixture[str]) -> None:
    export(Halves(), X)
    assert capfd.readouterr().err == ""


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch's quantized and nested tensors are not finished, it says
def test_what_is_no_network_and_no_plain_tensor_is_refused() -> None:
    quantized = torch.quantize_per_tensor(X, 0.1, 0, torch.quint8)
    nested = torch.nested.as_nested_tensor([X[0], X[1, :, 1:]], layout=torch.strided)
    for verb in (export, fold, deploynorm.convert):
        with pytest.raises(InputError, match=r"a class, and not a network. Got Conv2d. Fix: pass Conv2d\("):
            verb(nn.Conv2d, X)  # type: ignore[operator]
        for inputs in (quantized, X.to_sparse(), nested):
            with pytest.raises(InputError, match="example input 0 is no plain tensor"):
                verb(nn.Conv2d(3, 4, 3), inputs)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("network", "words"),
    [(Dropping, "random in evaluation: dropout"), (Noisy, "random .*: rand_like"), (BatchStatistics, "batch_norm .*")],
)
def test_a_network_that_is_not_in_evaluation_mode_is_refused(network: type[Base], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        export(network().eval(), X)


def test_weights_that_batch_normalization_standardizes_are_taken() -> None:
    class Standardized(Base):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.conv.weight.reshape(1, 4, -1)
            weight = F.batch_norm(weight, None, None, training=True).reshape_as(self.conv.weight)
            return F.conv2d(x, weight)

    assert deploynorm.convert(Standardized(), X)


class Level(Base):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("level", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        self.level.mul_(0.5).add_(0.5 * y.abs().mean())
        return y / self.level


def test_a_buffer_that_forward_changes_is_named_and_refused_unless_that_is_accepted() -> None:
    model = Level().eval()
    with pytest.raises(ModelError, match=r"forward changes buffers.*Got level\. Fix: .*--freeze-buffers"):
        deploynorm.convert(model, X)
    result = deploynorm.convert(model, X, freeze_buffers=True)
    assert result, str(result)
    assert result.exported.changed_buffers == ("level",)
    assert any("level" in note for note in result.notes)
    assert model.level == 1


class Largest(Base):
    """Its buffer and its parameter change, though not on every input."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.tensor(100.0))

    def forward(self, x: Tensor) -> Tensor:
        self.largest.copy_(torch.maximum(self.largest, x.abs().amax((0, 1, 2, 3))))
        with torch.no_grad():
            self.conv.weight.clamp_(-10, 10)
        y: Tensor = self.conv(x) / self.largest
        return y


def test_what_forward_changes_is_found_where_the_example_leaves_it_as_it_is() -> None:
    assert set(export(Largest().eval(), X).changed_buffers) == {"largest", "conv.weight"}


class Counting(Base):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.conv(x) * self.calls
        return y


@pytest.mark.parametrize("dynamic", [None, "none"])
def test_a_network_that_keeps_state_outside_its_buffers_is_refused(dynamic: Dynamic | None) -> None:
    with pytest.raises(ModelError, match="something else from the same input the second time"):
        deploynorm.convert(Counting().eval(), X, dynamic=dynamic)


class InPlace(Base):
    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        y: Tensor = self.conv(x)
        return y


def test_a_network_that_works_in_place_leaves_the_example_as_it_is() -> None:
    x = X.clone()
    result = deploynorm.convert(InPlace().eval(), x)
    assert result, str(result)
    assert torch.equal(x, X)
    assert result.exported.inputs[0].shape == ("N", 3, "H", "W")


def test_inputs_of_another_type_than_the_network_are_named() -> None:
    with pytest.raises(ModelError, match="the network and its inputs are of several types: float16, float32"):
        export(nn.Conv2d(3, 4, 3).half(), X)


class Cached(Base):
    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "grid"):
            self.grid = torch.ones(1, 1, *x.shape[2:])
        return self.conv(x) * self.grid


def test_what_a_network_keeps_of_its_first_size_does_not_reach_the_file() -> None:
    model = Cached().eval()
    exported = export(model, X, dynamic="none")
    assert exported.inputs[0].shape == tuple(X.shape)
    assert not hasattr(model, "grid")


class Label(Base):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        return self.conv(x) + self.table(label)[:, :, None, None]


def test_an_input_that_a_network_refuses_as_a_float_is_an_integer() -> None:
    shapes = {"x": (2, 3, 8, 8), "label": (2,)}
    for dtypes in (None, {"label": "int64"}):
        result = deploynorm.convert(Label(), input_shapes=shapes, input_dtypes=dtypes)
        assert result, str(result)
        assert [spec.dtype for spec in result.exported.inputs] == ["float32", "int64"]
        assert re.search(r"x \d+x3x\d+x\d+, label \d+ int64 ", str(result)), "the table names the type"
    with pytest.raises(InputError, match=re.escape("Got label:word")):
        deploynorm.convert(Label(), input_shapes=shapes, input_dtypes={"label": "word"})


class Wrapper(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.inner = network

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
def test_wrappers_of_training_are_taken_off(wrap: Callable[[nn.Module], nn.Module], inside: bool) -> None:
    network = wrap(nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4)).eval())
    if inside:
        network = Wrapper(network)
    _, report = fold(network, X)
    assert {change.outcome for change in report.changes} == {"folded"}
    assert export(network, X).node_counts()["Conv"] == 1


class Doubled(nn.DataParallel):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = 2 * super().forward(x)
        return y


def hooked(network: nn.Module) -> nn.Module:
    wrapper = nn.DataParallel(network)
    wrapper.register_forward_hook(lambda module, inputs, y: 2 * y)
    return wrapper


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("wrap", [Doubled, hooked])
def test_what_a_wrapper_computes_itself_is_in_the_file(
    wrap: Callable[[nn.Module], nn.Module], inside: bool, tmp_path: Path
) -> None:
    network = nn.Conv2d(3, 4, 3)
    wrapped = Wrapper(wrap(network)) if inside else wrap(network)
    export(wrapped, X).save(tmp_path / "model.onnx")
    with open_runner(tmp_path / "model.onnx") as runner:
        (y,) = runner.infer(dict.fromkeys((spec.name for spec in runner.inputs), X.numpy())).values()
    np.testing.assert_allclose(y, 2 * network(X).detach(), rtol=1e-4, atol=1e-4)


def test_a_parent_that_names_the_module_of_its_data_parallel_part_finds_it() -> None:
    class Parent(Wrapper):
        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.inner.module[0](x)
            return y

    network = Parent(nn.DataParallel(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())))
    assert export(network, X).node_counts() == {"Conv": 1}


class ReadsFolded(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.last, self.last_norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        assert self.norm.running_mean is not None
        self.norm.running_mean.fill_(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.conv(x))
        if self.how == "eps":
            y = y + self.norm.eps
        if self.how == "class":
            y = y if isinstance(self.norm, nn.BatchNorm2d) else y * 0
        if self.how == "bias":
            assert self.conv.bias is not None
            y = y + self.conv.bias.view(1, -1, 1, 1)
        return self.last_norm(self.last(y))  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["eps", "class", "bias"])
def test_a_fold_that_changes_what_the_network_computes_is_undone(how: str) -> None:
    model = ReadsFolded(how).eval()
    folded, report = fold(model, X)
    assert {change.name: change.outcome for change in report.changes} == {"norm": "not foldable", "last_norm": "folded"}
    with torch.inference_mode():
        np.testing.assert_allclose(folded(X).numpy(), model(X).numpy(), **FOLD_FLOAT32.kwargs())
