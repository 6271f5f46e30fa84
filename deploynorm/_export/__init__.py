"""nn.Module -> ONNX: translation, lowering, half precision."""

from deploynorm._export.exporting import DEFAULT_OPSET, Exported, check_options, export

__all__ = ["DEFAULT_OPSET", "Exported", "check_options", "export"]
