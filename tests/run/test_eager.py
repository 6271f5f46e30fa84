from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np
import pytest
import torch
from tolerances import EXACT, FLOAT64, OP_FLOAT32
from torch import Tensor, nn

from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.layers import FRN2d, MABN2d
from deploynorm.run.eager import EagerRunner

SPEC = TensorSpec("x", ("N", 3, "H", "W"), "float32")
VECTOR = TensorSpec("x", (1,), "float32")


class Call(nn.Module):
    """A network that is one function."""

    def __init__(self, function: Callable[..., object]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> object:
        return self.function(*args)


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), FRN2d(4), nn.Conv2d(4, 5, 3), MABN2d(5), nn.Dropout())


@pytest.fixture
def x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, 3, 9, 7)).astype(np.float32)


def test_a_network_in_training_runs_in_evaluation_and_is_left_as_it_is(network: nn.Module, x: np.ndarray) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with EagerRunner(network, [SPEC], dtype=torch.float64) as runner:
        got = runner.infer({"x": x})["output_0"]
        assert all(module.training for module in network.modules())
    torch.testing.assert_close(dict(network.state_dict()), before, **EXACT.kwargs())
    want = network.eval().double()(torch.from_numpy(x).double())
    np.testing.assert_allclose(got, want.detach().numpy(), **FLOAT64.kwargs())


@pytest.mark.parametrize(
    ("dtype", "want"), [(None, "float32"), (torch.float64, "float64"), (torch.float16, "float16")], ids=str
)
def test_dtype_casts_parameters_and_floating_inputs(dtype: torch.dtype | None, want: str, x: np.ndarray) -> None:
    with EagerRunner(FRN2d(3), [SPEC], dtype=dtype) as runner:
        assert runner.infer({"x": x})["output_0"].dtype == want


def test_dtype_leaves_integer_inputs_alone() -> None:
    specs = [TensorSpec("table", (4, "D"), "float32"), TensorSpec("row", (), "int64")]
    with EagerRunner(Call(lambda table, row: table[row]), specs, dtype=torch.float64) as runner:
        table = np.arange(8, dtype=np.float32).reshape(4, 2)
        got = runner.infer({"row": np.array(2), "table": table})["output_0"]
    assert got.tolist() == [4.0, 5.0]
    assert got.dtype == np.float64


def test_float64_is_computed_in_float64_and_not_cast_at_the_end(network: nn.Module, x: np.ndarray) -> None:
    with EagerRunner(network, [SPEC], dtype=torch.float64) as wide, EagerRunner(network, [SPEC]) as narrow:
        want, got = wide.infer({"x": x})["output_0"], narrow.infer({"x": x})["output_0"]
    assert 0 < np.abs(want - got).max() < OP_FLOAT32.atol


STRUCTURES: dict[str, tuple[Callable[[Tensor], object], list[float]]] = {
    "tensor": (lambda x: x, [0.0]),
    "tuple": (lambda x: (x, x + 1), [0.0, 1.0]),
    "dict": (lambda x: {"b": x, "a": x + 1}, [0.0, 1.0]),
    "nested": (lambda x: (x, [x + 1, {"c": (x + 2,)}], x + 3), [0.0, 1.0, 2.0, 3.0]),
    "none": (lambda x: (None, x, None), [0.0]),
}


@pytest.mark.parametrize(("function", "offsets"), STRUCTURES.values(), ids=STRUCTURES)
def test_outputs_are_flattened_in_order(function: Callable[[Tensor], object], offsets: list[float]) -> None:
    with EagerRunner(Call(function), [VECTOR]) as runner:
        got = runner.infer({"x": np.zeros(1, np.float32)})
        assert [float(value[0]) for value in got.values()] == offsets
        assert list(got) == [f"output_{i}" for i in range(len(offsets))] == list(runner.output_names)


def test_inputs_are_positional_in_the_order_of_the_specs_and_outputs_take_the_names_given() -> None:
    specs = [TensorSpec("a", (1,), "float32"), TensorSpec("b", (1,), "float32")]
    names = ["difference", "negative"]
    with EagerRunner(Call(lambda first, second: (first - second, -first)), specs, names) as runner:
        got = runner.infer({"b": np.array([1.0], np.float32), "a": np.array([3.0], np.float32)})
    assert {name: value.tolist() for name, value in got.items()} == {"difference": [2.0], "negative": [-3.0]}


@pytest.mark.parametrize("inside", [False, True], ids=["itself", "inside another module"])
def test_a_module_of_torch_export_runs_though_it_refuses_eval(inside: bool, network: nn.Module, x: np.ndarray) -> None:
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    network.eval()
    exported = torch.export.export(network, (torch.from_numpy(x),), dynamic_shapes=(sizes,)).module()
    module = nn.Sequential(exported, nn.Dropout(0.9)) if inside else exported
    with (
        EagerRunner(module, [SPEC], dtype=torch.float64) as runner,
        EagerRunner(network, [SPEC], dtype=torch.float64) as truth,
    ):
        for feed in (x, x[:1, :, :8, :6]):
            got, want = runner.infer({"x": feed})["output_0"], truth.infer({"x": feed})["output_0"]
            # The exporter writes eps into the graph as a float32 constant.
            np.testing.assert_allclose(got, want, **OP_FLOAT32.kwargs())


def test_bfloat16_goes_in_and_comes_out() -> None:
    x = np.array([[1.5, -2.25, 3.0]], ml_dtypes.bfloat16)
    with EagerRunner(Call(lambda x: (-x, x.T[:, 0])), [TensorSpec("x", (1, 3), "bfloat16")]) as runner:
        negative, column = runner.infer({"x": x}).values()
    assert negative.dtype == column.dtype == ml_dtypes.bfloat16
    assert negative.tolist() == [[-1.5, 2.25, -3.0]]
    assert column.tolist() == [1.5, -2.25, 3.0]


@pytest.mark.parametrize(
    "change",
    [lambda x: x[..., ::-1], lambda x: x.transpose(0, 1, 3, 2), lambda x: x[:, :, ::2]],
    ids=["reversed", "transposed", "sliced"],
)
def test_strides_do_not_matter(change: Callable[[np.ndarray], np.ndarray], x: np.ndarray) -> None:
    view = change(x)
    with EagerRunner(FRN2d(3), [SPEC]) as runner:
        want = runner.infer({"x": np.ascontiguousarray(view)})["output_0"]
        np.testing.assert_allclose(runner.infer({"x": view})["output_0"], want, **EXACT.kwargs())


def test_a_network_that_works_in_place_changes_neither_feeds_nor_results_nor_what_it_starts_from() -> None:
    class Counter(nn.Module):
        total: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(1))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.total.add_(x), x.mul_(0)

    feed = np.ones(1, np.float32)
    feed.flags.writeable = False
    with EagerRunner(Counter(), [VECTOR]) as runner:
        first = runner.infer({"x": feed})["output_0"]
        second = runner.infer({"x": feed})["output_0"]
    assert (first.item(), second.item(), feed.item()) == (1.0, 1.0, 1.0)


@pytest.fixture
def low_precision() -> Iterator[None]:
    torch.set_float32_matmul_precision("medium")
    with torch.autocast("cpu", torch.bfloat16):
        yield
    torch.set_float32_matmul_precision("highest")


def test_buffers_are_set_back_when_the_network_raises() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(1))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.calls = self.calls + 1
            if x > 5:
                raise ValueError("too large")
            return x + self.calls

    with EagerRunner(Counting(), [VECTOR], ["y"]) as runner:
        for value in (1, 9, 1, 9, 9, 1):
            feeds = {"x": np.array([value], np.float32)}
            if value == 9:
                with pytest.raises(ModelError, match="too large"):
                    runner.infer(feeds)
            else:
                assert runner.infer(feeds)["y"] == 3


@pytest.mark.usefixtures("low_precision")
def test_autocast_and_low_precision_products_outside_do_not_reach_in() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 64, 64)).astype(np.float32)
    specs = [TensorSpec("a", (64, 64), "float32"), TensorSpec("b", (64, 64), "float32")]
    with EagerRunner(Call(torch.matmul), specs) as runner:
        got = runner.infer({"a": a, "b": b})["output_0"]
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, a.astype(np.float64) @ b, **OP_FLOAT32.kwargs())
    assert torch.get_float32_matmul_precision() == "medium"
    assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"


def test_precision_is_restored_when_the_network_raises() -> None:
    def fail(x: Tensor) -> Tensor:
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        assert torch.is_inference_mode_enabled()
        raise ValueError("planted")

    before = torch.backends.cudnn.conv.fp32_precision
    with EagerRunner(Call(fail), [VECTOR]) as runner, pytest.raises(ModelError, match="ValueError: planted"):
        runner.infer({"x": np.zeros(1, np.float32)})
    assert torch.backends.cudnn.conv.fp32_precision == before
    assert before != "ieee"


REFUSED: dict[str, tuple[nn.Module, list[str] | None, type[DeployNormError], str]] = {
    "an error of torch": (nn.Linear(5, 5), None, ModelError, r"raised RuntimeError: .*'x': \(2, 3, 9, 7\)"),
    "an error of our own layers": (FRN2d(5), None, InputError, "FRN2d: wrong number of channels"),
    "an output that is no tensor": (
        Call(lambda x: (x, "label")),
        None,
        ModelError,
        "Got str; expected tensors in tuples, lists or dicts",
    ),
    "too few names": (Call(lambda x: (x, x)), ["only"], InputError, "expected 2 names"),
}


@pytest.mark.parametrize(("network", "names", "kind", "message"), REFUSED.values(), ids=REFUSED)
def test_what_goes_wrong_in_a_network_is_reported(
    network: nn.Module, names: list[str] | None, kind: type[DeployNormError], message: str, x: np.ndarray
) -> None:
    with EagerRunner(network, [SPEC], names) as runner, pytest.raises(kind, match=message) as caught:
        runner.infer({"x": x})
    assert isinstance(caught.value.__cause__, RuntimeError) == ("RuntimeError" in message)


def test_a_network_that_cannot_be_copied_is_refused_with_the_way_out() -> None:
    network = nn.Linear(1, 1)
    network.lock = threading.Lock()
    with pytest.raises(ModelError, match=r"Linear: the network cannot be copied: .*Fix: remove"):
        EagerRunner(network, [SPEC])


def test_a_device_that_is_not_there_is_an_error_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BackendError, match="no CUDA device") as caught:
        EagerRunner(nn.Identity(), [SPEC], device="cuda:0")
    assert caught.value.exit_code == 3


def test_feeds_are_checked_and_a_closed_runner_says_so(x: np.ndarray) -> None:
    with EagerRunner(nn.Identity(), [SPEC]) as runner, pytest.raises(InputError, match="wrong rank"):
        runner.infer({"x": x[0]})
    runner.close()
    with pytest.raises(InputError, match="the runner is closed"):
        runner.infer({"x": x})
