"""PyTorch itself as a backend; in float64 it is the truth that the others are checked against."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils import _pytree

from deploynorm.arrays import to_array, to_tensor
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.run.base import Runner, check_feeds, closed_error


class EagerRunner(Runner):
    """Runs a copy of a network in evaluation mode; the network itself stays as it is.

    Args:
        model: Any nn.Module, also the one that an ExportedProgram's module() returns.
        inputs: Its positional inputs, in order.
        output_names: Names of its outputs in the order in which nested tuples, lists and dicts list them; None
            outputs do not count. By default "output_0", "output_1", ..., known after the first call.
        dtype: Floating parameters, buffers and inputs are cast to it. torch.float64 gives the truth of a check.
        device: Where to run.

    Raises BackendError if the device is not there, and ModelError if the network cannot be copied.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[TensorSpec],
        output_names: Sequence[str] | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self._device = torch.device(device)
        self._dtype = dtype
        if self._device.type == "cuda" and not torch.cuda.is_available():
            fix = "pass device='cpu', or install a CUDA torch"
            raise BackendError("EagerRunner", "no CUDA device", got=f"device={device}", fix=fix)
        self.name = "eager" if dtype is None else f"eager {str(dtype).removeprefix('torch.')}"
        self.name += "" if self._device.type == "cpu" else f" ({self._device})"
        self.inputs = tuple(inputs)
        self.output_names = tuple(output_names or ())
        self._named = output_names is not None
        self._network: nn.Module | None = _evaluation_copy(model, self._device, dtype)

    def infer(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if self._network is None:
            raise closed_error("EagerRunner.infer")
        check_feeds("EagerRunner.infer", self.inputs, feeds)
        copies = [to_tensor(feeds[spec.name]) for spec in self.inputs]  # the network may work in place
        arguments = [x.to(self._device, self._dtype if x.is_floating_point() else None) for x in copies]
        try:
            with torch.inference_mode(), torch.autocast(self._device.type, enabled=False), _full_float32():
                result = self._network(*arguments)
        except DeployNormError:
            raise
        except Exception as error:
            problem, fix = f"the network raised {type(error).__name__}: {error}", "feed shapes that the network accepts"
            shapes = {name: value.shape for name, value in feeds.items()}
            raise ModelError("EagerRunner.infer", problem, got=shapes, fix=fix) from error
        arrays = [_to_array(leaf) for leaf in _pytree.tree_leaves(result) if leaf is not None]
        if not self._named:
            self.output_names = tuple(f"output_{i}" for i in range(len(arrays)))
        elif len(arrays) != len(self.output_names):
            problem = "wrong number of output names"
            got = f"output_names={list(self.output_names)}"
            raise InputError("EagerRunner.infer", problem, got=got, expected=f"{len(arrays)} names")
        return dict(zip(self.output_names, arrays, strict=True))

    def close(self) -> None:
        self._network = None


def _evaluation_copy(model: nn.Module, device: torch.device, dtype: torch.dtype | None) -> nn.Module:
    try:
        with warnings.catch_warnings():
            # A module of torch.export makes copy.deepcopy warn of torch's own code.
            warnings.simplefilter("ignore", FutureWarning)
            # In the copy such a module also takes eval(), which it refuses itself: its mode is in its graph.
            return copy.deepcopy(model).to(device=device, dtype=dtype).eval()
    except Exception as error:
        problem = f"the network cannot be copied and put in evaluation mode: {error}"
        fix = "remove parametrizations such as weight_norm, and attributes that hold files, locks or results"
        raise ModelError("EagerRunner", problem, got=type(model).__name__, fix=fix) from error


def _to_array(value: object) -> npt.NDArray[Any]:
    if not isinstance(value, Tensor):
        problem = "an output of the network is not a tensor"
        expected = "tensors in tuples, lists or dicts"
        raise ModelError("EagerRunner.infer", problem, got=type(value).__name__, expected=expected)
    return to_array(value)


@contextmanager
def _full_float32() -> Iterator[None]:
    """Float32 products in float32: no TF32 on a GPU, no bfloat16 on a CPU (torch.set_float32_matmul_precision)."""
    backends: Any = torch.backends
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
