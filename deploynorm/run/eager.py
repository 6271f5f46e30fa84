"""PyTorch itself as a backend; in float64 it is the truth that the others are checked against."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from deploynorm.arrays import to_array, to_tensor
from deploynorm.contract import DTYPES
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.run.base import Runner, check_feeds, closed_error
from deploynorm.trace import Arguments, Forward, copied, tensors_of


class EagerRunner(Runner):
    """Runs a copy of a network in evaluation mode; the network itself stays as it is.

    Args:
        model: Any nn.Module, also the one that an ExportedProgram's module() returns.
        inputs: Its inputs.
        output_names: Names of its outputs in the order in which nested tuples, lists and dicts list them; None
            outputs do not count. By default "output_0", "output_1", ..., known after the first call.
        dtype: Floating parameters, buffers and inputs are cast to it. torch.float64 gives the truth of a check.
        device: Where to run.
        arguments: What each input is bound to; by default the arguments of forward of these names or, where it has not
            all of them, its first ones.

    A buffer that forward changes is set back after each call, also one that fails, so that each computes what the first
    one would.

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
        arguments: Arguments | None = None,
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
        # A copy of the module of an archive takes eval(), which that module refuses itself: its graph has a mode.
        self._network: nn.Module | None = copied(model).to(device=self._device, dtype=dtype).eval()
        self._arguments = arguments or _arguments(self._network, [spec.name for spec in inputs])
        self._buffers = [
            (module, name, buffer, buffer.clone())
            for module in self._network.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None
        ]

    def infer(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if self._network is None:
            raise closed_error("EagerRunner.infer")
        check_feeds("EagerRunner.infer", self.inputs, feeds)
        copies = [to_tensor(feeds[spec.name]) for spec in self.inputs]  # the network may work in place
        tensors = [x.to(self._device, self._dtype if x.is_floating_point() else None) for x in copies]
        by_position, named = self._arguments.split(tensors)
        try:
            with (
                torch.inference_mode(),
                torch.autocast(self._device.type, enabled=False),
                _full_float32(),
                _made_in(self._dtype),
            ):
                try:
                    result = self._network(*by_position, **named)
                    # Copies, for what is returned may be a buffer.
                    leaves = [x.clone() if isinstance(x, Tensor) else x for x in tensors_of(result)]
                    arrays = [_to_array(leaf) for leaf in leaves]
                finally:
                    for module, name, buffer, value in self._buffers:
                        module._buffers[name] = buffer.copy_(value)
        except DeployNormError:
            raise
        except Exception as error:
            problem, fix = f"the network raised {type(error).__name__}: {error}", "feed shapes that the network accepts"
            shapes = {name: value.shape for name, value in feeds.items()}
            raise ModelError("EagerRunner.infer", problem, got=shapes, fix=fix) from error
        if not self._named:
            self.output_names = tuple(f"output_{i}" for i in range(len(arrays)))
        elif len(arrays) != len(self.output_names):
            problem = "wrong number of output names"
            got = f"output_names={list(self.output_names)}"
            raise InputError("EagerRunner.infer", problem, got=got, expected=f"{len(arrays)} names")
        return dict(zip(self.output_names, arrays, strict=True))

    def nearby(
        self, feeds: Mapping[str, npt.NDArray[Any]], eps: float, times: int
    ) -> Iterator[dict[str, npt.NDArray[Any]]]:
        """What the network computes where each parameter and input is off by up to `eps` of its value, at random.

        With eps the rounding of a type, it is what another order of sums could make of the outputs in that type.
        """
        if self._network is None:
            raise closed_error("EagerRunner.nearby")
        parameters = [parameter for parameter in self._network.parameters() if parameter.is_floating_point()]
        exact = [parameter.detach().clone() for parameter in parameters]
        generator = np.random.default_rng(0)
        for _ in range(times):
            near = {name: _off(x, eps, generator) for name, x in feeds.items()}
            try:
                with torch.no_grad():
                    for parameter, value in zip(parameters, exact, strict=True):
                        noise = torch.from_numpy(generator.uniform(-eps, eps, tuple(value.shape)))
                        parameter.mul_(1 + noise.to(parameter))
                yield self.infer(near)
            finally:
                with torch.no_grad():
                    for parameter, value in zip(parameters, exact, strict=True):
                        parameter.copy_(value)

    def close(self) -> None:
        self._network = None


def _arguments(model: nn.Module, names: Sequence[str]) -> Arguments:
    forward = Forward(model)
    try:
        return forward.named(names)
    except KeyError:
        return forward.first(len(names))


def _off(x: npt.NDArray[Any], eps: float, generator: np.random.Generator) -> npt.NDArray[Any]:
    """Floats, each off by up to `eps` of its value; all else as it is."""
    if x.dtype.name not in DTYPES:
        return x
    return (x * (1 + generator.uniform(-eps, eps, x.shape))).astype(x.dtype)


def _to_array(value: object) -> npt.NDArray[Any]:
    if not isinstance(value, Tensor):
        problem = "an output of the network is not a tensor"
        expected = "tensors in tuples, lists or dicts"
        raise ModelError("EagerRunner.infer", problem, got=type(value).__name__, expected=expected)
    return to_array(value)


@contextmanager
def _made_in(dtype: torch.dtype | None) -> Iterator[None]:
    """In float64, tensors that forward makes have that type as well: some operators take no two types."""
    before = torch.get_default_dtype()
    if dtype == torch.float64 and before == torch.float32:
        torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


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
