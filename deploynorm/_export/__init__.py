"""nn.Module -> ONNX: translation, lowering, half precision."""

from deploynorm._export.exporting import DEFAULT_OPSET, Exported, check_options, export
from deploynorm._export.translation import onnx_translations

__all__ = ["DEFAULT_OPSET", "Exported", "check_options", "export", "onnx_translations"]
