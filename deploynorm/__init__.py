"""From a PyTorch CNN with FRN or MABN layers to a checked ONNX file and a TensorRT engine.

    result = deploynorm.convert("model.pt")             # or any nn.Module of yours, with example inputs
    print(result)                                       # layers folded, nodes, errors in each runtime, sizes taken
    result.save("model.onnx")                           # refused where a check does not hold

The stages one by one, for any nn.Module:

    example = (torch.randn(2, 3, 224, 224),)
    folded, report = deploynorm.fold(model, example)    # constants into weights
    exported = deploynorm.export(folded, example)       # nn.Module -> ONNX
    exported.save("model.onnx")
    truth = deploynorm.EagerRunner(model, exported.inputs, dtype=torch.float64)
    with deploynorm.open_runner("model.onnx") as candidate:             # ONNX -> numbers
        samples = deploynorm.sample_inputs(exported.inputs)
        deploynorm.check(candidate, truth, samples).raise_if_broken()   # the same numbers?

Importing the package imports none of torch, onnx, onnxruntime and tensorrt; each comes with the first name that
needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from deploynorm.packages import load as _load

if TYPE_CHECKING:
    from deploynorm._adopt import adopt as adopt
    from deploynorm._build import build as build
    from deploynorm._check import check as check
    from deploynorm._convert import Conversion as Conversion
    from deploynorm._convert import convert as convert
    from deploynorm._export import export as export
    from deploynorm._export import onnx_translations as onnx_translations
    from deploynorm._fold import fold as fold
    from deploynorm._swap import swap as swap
    from deploynorm.checkpoint import load as load
    from deploynorm.checkpoint import save as save
    from deploynorm.errors import BackendError as BackendError
    from deploynorm.errors import DeployNormError as DeployNormError
    from deploynorm.errors import InputError as InputError
    from deploynorm.errors import ModelError as ModelError
    from deploynorm.errors import ParityError as ParityError
    from deploynorm.image import ImageSpec as ImageSpec
    from deploynorm.openvino import openvino_extension as openvino_extension
    from deploynorm.run import open_runner as open_runner
    from deploynorm.run.eager import EagerRunner as EagerRunner
    from deploynorm.samples import sample_inputs as sample_inputs

__version__ = "0.1.0"

_HOME = {
    **dict.fromkeys(("convert", "Conversion"), "deploynorm._convert"),
    **dict.fromkeys(("load", "save"), "deploynorm.checkpoint"),
    "adopt": "deploynorm._adopt",
    "swap": "deploynorm._swap",
    "fold": "deploynorm._fold",
    **dict.fromkeys(("export", "onnx_translations"), "deploynorm._export"),
    "build": "deploynorm._build",
    "open_runner": "deploynorm.run",
    "openvino_extension": "deploynorm.openvino",
    "EagerRunner": "deploynorm.run.eager",
    "check": "deploynorm._check",
    "sample_inputs": "deploynorm.samples",
    "ImageSpec": "deploynorm.image",
    **dict.fromkeys(
        ("DeployNormError", "InputError", "ModelError", "BackendError", "ParityError"), "deploynorm.errors"
    ),
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return globals().setdefault(name, _load(f"{_HOME[name]}.{name}"))


def __dir__() -> list[str]:
    return sorted(__all__)
