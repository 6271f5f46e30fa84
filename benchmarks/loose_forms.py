"""FRN as other projects write it, in loose operators: what `rewrite --fuse` is measured and tested on."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["CHANNELS", "EXPORTERS", "FORMS", "exported", "loose"]

CHANNELS = 8
_SIZES = (2, CHANNELS, 9, 7)


class Loose(nn.Module):
    """A layer with gamma g, beta b, threshold t and epsilon e for each channel, (1, C, 1, 1), around a formula."""

    def __init__(self, formula: Callable[[Loose, Tensor], Tensor], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.formula = formula
        for name in "gbt":
            setattr(self, name, nn.Parameter(torch.randn(1, CHANNELS, 1, 1, dtype=dtype)))
        self.e = nn.Parameter(torch.rand(1, CHANNELS, 1, 1, dtype=dtype) * 1e-2 + 1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.formula(self, x)


def _mean(x: Tensor) -> Tensor:
    return x.pow(2).mean((2, 3), keepdim=True)


def _inverse(x: Tensor, eps: float | Tensor = 1e-3) -> Tensor:
    return torch.rsqrt(_mean(x) + eps)


def _tlu(m: Loose, y: Tensor) -> Tensor:
    return torch.max(y, m.t)


def _affine(m: Loose, x: Tensor) -> Tensor:
    return m.g * x + m.b


def _view_mean(m: Loose, x: Tensor) -> Tensor:
    n, c = x.shape[:2]
    square = x.view(n, c, -1).pow(2).mean(-1).view(n, c, 1, 1)
    return _tlu(m, _affine(m, x * torch.rsqrt(square + 1e-3)))


def _all_flat(m: Loose, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    flat = x.reshape(n, c, h * w)
    unit = flat / torch.sqrt((flat * flat).mean(-1, keepdim=True) + 1e-3)
    y = torch.max(unit * m.g.view(1, c, 1) + m.b.view(1, c, 1), m.t.view(1, c, 1))
    return y.reshape(n, c, h, w)


def _two_dimensional(m: Loose, x: Tensor) -> Tensor:
    square = x.pow(2).mean((2, 3))
    return _tlu(m, _affine(m, x * torch.rsqrt(square + 1e-3)[:, :, None, None]))


def _rms_flat(m: Loose, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    unit = F.rms_norm(x.reshape(n, c, h * w), (h * w,), eps=1e-3).reshape(n, c, h, w)
    return _tlu(m, _affine(m, unit))


def _rms(m: Loose, x: Tensor) -> Tensor:
    return _tlu(m, _affine(m, F.rms_norm(x, x.shape[2:], eps=1e-3)))


def _half_around(m: Loose, x: Tensor) -> Tensor:
    wide = x.float()
    return _tlu(m, _affine(m, wide * _inverse(wide)).to(x.dtype))


def _half(m: Loose, x: Tensor) -> Tensor:
    return _tlu(m, _affine(m, x * _inverse(x)))


def _sum_by_size(m: Loose, x: Tensor) -> Tensor:
    square = x.pow(2).sum((2, 3), keepdim=True) / (x.shape[2] * x.shape[3])
    return _tlu(m, _affine(m, x * torch.rsqrt(square + 1e-3)))


def _norm_by_size(m: Loose, x: Tensor) -> Tensor:
    square = torch.linalg.vector_norm(x, dim=(2, 3), keepdim=True) ** 2 / (x.shape[2] * x.shape[3])
    return _tlu(m, _affine(m, x * torch.rsqrt(square + 1e-3)))


def _width_then_height(m: Loose, x: Tensor) -> Tensor:
    square = x.pow(2).mean(3, keepdim=True).mean(2, keepdim=True)
    return _tlu(m, _affine(m, x * torch.rsqrt(square + 1e-3)))


def _residual(m: Loose, x: Tensor) -> Tensor:
    y = F.relu(x - 0.5)
    return torch.max(_affine(m, y * _inverse(y)) + x, m.t)


def _residual_of_a_difference(m: Loose, x: Tensor) -> Tensor:
    y = F.relu(x - 0.5)
    return F.relu(_affine(m, y * _inverse(y)) + x - m.t) + m.t


FORMS: dict[str, Callable[[], Loose]] = {
    "paper": lambda: Loose(lambda m, x: _tlu(m, _affine(m, x * _inverse(x)))),
    "gupta-abhay": lambda: Loose(lambda m, x: _tlu(m, m.g * (x * torch.rsqrt(_mean(x) + m.e.abs())) + m.b)),
    "yukkyo": lambda: Loose(lambda m, x: _tlu(m, m.g * (x * torch.rsqrt(_mean(x) + m.e.abs() + 1e-6)) + m.b)),
    "tattaka": lambda: Loose(lambda m, x: _tlu(m, x / torch.sqrt(_mean(x) + 1e-3) * m.g + m.b)),
    "TensorFlow Addons": lambda: Loose(
        lambda m, x: m.g * x * torch.rsqrt(torch.mean(torch.square(x), (2, 3), True) + m.e.abs()) + m.b
    ),
    "kornia": lambda: Loose(lambda m, x: _tlu(m, x * torch.rsqrt(_mean(x) + m.e.abs()) * m.g + m.b)),
    "mean of a view": lambda: Loose(_view_mean),
    "all flattened": lambda: Loose(_all_flat),
    "mean without its axes": lambda: Loose(_two_dimensional),
    "gamma first": lambda: Loose(lambda m, x: _tlu(m, (m.g * x) * _inverse(x) + m.b)),
    "power -0.5": lambda: Loose(lambda m, x: _tlu(m, _affine(m, x * (_mean(x) + 1e-3).pow(-0.5)))),
    "root of the inverse": lambda: Loose(lambda m, x: _tlu(m, _affine(m, x * (1 / (_mean(x) + 1e-3)).sqrt()))),
    "bare": lambda: Loose(lambda m, x: x * _inverse(x)),
    "ReLU": lambda: Loose(lambda m, x: F.relu(_affine(m, x * _inverse(x)))),
    "clamp": lambda: Loose(lambda m, x: _affine(m, x * _inverse(x)).clamp(min=-0.25)),
    "where": lambda: Loose(lambda m, x: torch.where((y := _affine(m, x * _inverse(x))) > m.t, y, m.t)),
    "ReLU of a difference": lambda: Loose(lambda m, x: F.relu(_affine(m, x * _inverse(x)) - m.t) + m.t),
    "addcmul": lambda: Loose(lambda m, x: _tlu(m, torch.addcmul(m.b, m.g, x * _inverse(x)))),
    "pool": lambda: Loose(lambda m, x: _tlu(m, _affine(m, x * torch.rsqrt(F.adaptive_avg_pool2d(x * x, 1) + 1e-3)))),
    "rms_norm of a view": lambda: Loose(_rms_flat),
    "rms_norm": lambda: Loose(_rms),
    "float16 around float32": lambda: Loose(_half_around, torch.float16),
    "float16": lambda: Loose(_half, torch.float16),
    "width, then height": lambda: Loose(_width_then_height),
    "sum by the size": lambda: Loose(_sum_by_size),
    "norm by the size": lambda: Loose(_norm_by_size),
    "residual": lambda: Loose(_residual),
    "residual, ReLU of a difference": lambda: Loose(_residual_of_a_difference),
}
"""By name; each is one FRN."""

EXPORTERS = {
    "TorchScript 11": (False, 11),
    "TorchScript 13": (False, 13),
    "TorchScript 17": (False, 17),
    "dynamo 18": (True, 18),
    "dynamo 20": (True, 20),
    "dynamo 23": (True, 23),
}
"""By name: whether it is the new exporter of torch.onnx, and the opset."""


def loose(name: str) -> Loose:
    """The layer of this form, with the same parameters each time."""
    torch.manual_seed(0)
    return FORMS[name]().eval()


@cache
def exported(form: str, exporter: str, dynamic: bool = True) -> bytes | None:
    """The form as an exporter writes it, with free sizes; None where it cannot."""
    if form.startswith("rms_norm") and exporter.startswith("TorchScript"):
        return None
    layer = loose(form)
    return export(layer, torch.randn(_SIZES).to(layer.g.dtype), exporter, dynamic)  # type: ignore[arg-type]


def export(layer: nn.Module, x: Tensor, exporter: str, dynamic: bool = True, optimize: bool = True) -> bytes:
    """The file of an exporter, perhaps without what it folds on its own."""
    dynamo, opset = EXPORTERS[exporter]
    names = {0: "N", 2: "H", 3: "W"} if dynamic else {}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options: dict[str, Any] = {"opset_version": opset, "input_names": ["x"], "verbose": False}
        if not dynamo:
            file, axes = io.BytesIO(), {"x": names} if dynamic else None
            options |= {"dynamic_axes": axes, "do_constant_folding": optimize}
            torch.onnx.export(layer, (x,), file, dynamo=False, **options)
            return file.getvalue()
        shapes = (dict.fromkeys(names, torch.export.Dim.DYNAMIC),) if dynamic else None
        program = torch.onnx.export(layer, (x,), dynamo=True, dynamic_shapes=shapes, optimize=optimize, **options)
        assert program is not None
        return bytes(program.model_proto.SerializeToString())
