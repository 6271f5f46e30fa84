"""ONNX Runtime: sessions with our operator library, its errors, what a rewritten file asks of a machine.

For people with their own ONNX Runtime code:

    options = onnxruntime.SessionOptions()
    deploynorm.ort.register(options)                    # or, all in one:
    session = deploynorm.ort.session("model.onnx", providers=["cpu"])
"""

from deploynorm.libraries import library_path
from deploynorm.ort.errors import explain
from deploynorm.ort.runtime import PROVIDERS, import_onnxruntime, quiet_options
from deploynorm.ort.sessions import register, session

__all__ = ["PROVIDERS", "explain", "import_onnxruntime", "library_path", "quiet_options", "register", "session"]
