"""TensorRT: importing it, hearing what it says, and putting our plugin into it.

For people with their own TensorRT code:

    deploynorm.trt.load_plugin(deploynorm.trt.import_tensorrt())    # before an engine or an ONNX file is read
"""

from deploynorm.trt.importing import (
    BUILDERS,
    FLAVOURS,
    RUNTIMES,
    Flavour,
    TensorRT,
    gpu_here,
    import_tensorrt,
    listen,
    logger,
)
from deploynorm.trt.plugins import has_plugin, load_library, load_plugin, load_stock_plugins

__all__ = [
    "BUILDERS",
    "FLAVOURS",
    "RUNTIMES",
    "Flavour",
    "TensorRT",
    "gpu_here",
    "has_plugin",
    "import_tensorrt",
    "listen",
    "load_library",
    "load_plugin",
    "load_stock_plugins",
    "logger",
]
