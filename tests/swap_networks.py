"""Small networks with batch normalization, and what must become of their layers, for the tests of swap."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from tolerances import EXACT
from torch import Tensor, nn

from deploynorm._swap import swap

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Forward(nn.Module):
    """Layers, and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._run = forward

    def forward(self, x: Tensor) -> Any:
        return self._run(self, x)


class FrozenBatchNorm2d(nn.Module):
    """As detectors freeze it: four buffers and an affine map."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class OwnForwardNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OwnForwardConv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight)


class OwnComputationConv(nn.Conv2d):
    """As weight standardisation is mostly written: the hook that Conv2d.forward calls."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(input, weight / weight.norm(), bias)


class Residual(nn.Module):
    """A basic block whose one ReLU serves both places, as in torchvision."""

    def __init__(self, *, own_relus: bool = False, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(3, 4), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = conv(4, 4), nn.BatchNorm2d(4)
        self.shortcut = nn.Sequential(conv(3, 4, 1), nn.BatchNorm2d(4))
        self.relu = nn.ReLU(inplace)
        self.last = nn.ReLU(inplace) if own_relus else self.relu

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return self.last(out)


@dataclass(frozen=True)
class Case:
    """A network, and what must become of its layers.

    Attributes:
        became: Path -> the class that stands there afterwards, by name; "=" for a layer that must stay. All that the
            report names must be here.
        reason: Must stand in a line of the report.
        learned: Whether the normalizations have an epsilon that is learned.
    """

    name: str
    build: Callable[[], nn.Module]
    became: dict[str, str]
    reason: str = ""
    shape: tuple[int, ...] = (2, 3, 8, 6)
    learned: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def conv(inputs: int = 3, outputs: int = 4, kernel_size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, **options)


def chain(*behind: nn.Module, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Callable[[], nn.Module]:
    """Convolution, normalization and what stands behind it: 0, 1, and so on; anew at each call."""
    return lambda: nn.Sequential(conv(), norm(4), *copy.deepcopy(behind))


def sequence(*layers: nn.Module) -> Callable[[], nn.Module]:
    """These layers one after the other: 0, 1, and so on; anew at each call."""
    return lambda: nn.Sequential(*copy.deepcopy(layers))


def net(forward: Callable[..., Any], **more: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    """`forward` over a convolution c, its normalization b, and `more`."""
    return lambda: Forward(forward, c=conv(), b=nn.BatchNorm2d(4), **{name: build() for name, build in more.items()})


def with_hook(network: nn.Module, path: str, register: str = "register_forward_hook") -> nn.Module:
    getattr(network.get_submodule(path), register)(lambda *args: None)
    return network


def in_place() -> nn.Module:
    return nn.ReLU(inplace=True)


def norm() -> nn.Module:
    return nn.BatchNorm2d(4)


def drawn(case: Case, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """The network and an input; with gammas and betas other than 1 and 0, which would hide much."""
    torch.manual_seed(0)
    network = case.build()
    for layer in network.modules():
        if isinstance(layer, BATCH_NORMS) and layer.affine:
            nn.init.uniform_(layer.weight, -1.5, 1.5)
            nn.init.normal_(layer.bias)
    return network.to(dtype), torch.randn(case.shape, dtype=dtype)


def swapped_as_expected(network: nn.Module, x: Tensor, case: Case, norm: Literal["frn", "mabn"]) -> nn.Module:
    """The swapped network: the layers of the case have changed, the report says so, and the network given has not."""
    values, text = copy.deepcopy(network.state_dict()), repr(network)

    swapped, report = swap(network, (x,), norm=norm, **case.options)

    assert {change.name: change.became or "=" for change in report.changes} == case.became
    assert case.reason in str([*(change.detail for change in report.changes), *report.notes])
    after = dict(swapped.named_modules())
    for path, layer in network.named_modules():
        became = case.became.get(path, "=").split()[0]
        assert after[path] is not layer
        assert after[path].training == layer.training
        assert (getattr(after[path], "tau", None) is not None) == ("TLU" in case.became.get(path, "")), path
        if not isinstance(layer, torch.fx.GraphModule):  # a copy of one has another class of the same forward
            assert type(after[path]).__name__ == (type(layer).__name__ if became == "=" else became), path
    assert repr(network) == text
    torch.testing.assert_close(network.state_dict(), values, **EXACT.kwargs())
    return swapped


def leaves(outputs: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]
