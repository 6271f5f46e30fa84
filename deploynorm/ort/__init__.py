"""ONNX Runtime: sessions with our operator library, its errors in our words, what a rewritten file asks of a machine.

For people with their own ONNX Runtime code:

    options = onnxruntime.SessionOptions()
    deploynorm.ort.register(options)                    # or, all in one:
    session = deploynorm.ort.session("model.onnx", providers=["cpu"])
"""

from deploynorm.libraries import library_path
from deploynorm.ort.sessions import (
    PROVIDERS,
    explain,
    import_onnxruntime,
    quiet_options,
    register,
    session,
)

__all__ = ["PROVIDERS", "explain", "import_onnxruntime", "library_path", "quiet_options", "register", "session"]
