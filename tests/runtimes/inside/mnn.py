"""MNN. Its command `mnnconvert` installs packages by itself: the function behind it does not."""

import os
import tempfile
from pathlib import Path

import _tools
import MNN
import numpy as np


def run(job, samples, how):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.mnn"
        options = {"-f": "ONNX", "--modelFile": job["model"], "--MNNModel": str(path), "--bizCode": "none"}
        printed = _printed(["mnnconvert", *(word for pair in options.items() for word in pair)])
        if not path.exists():
            raise RuntimeError(f"mnnconvert writes no file:\n{printed}")
        net = MNN.nn.load_module_from_file(str(path), [], [])
        return [_one(net, x) for x in samples]


def _printed(words):
    """What the converter, which is C++, writes to standard output and error."""
    with tempfile.TemporaryFile("w+", errors="replace") as file:
        kept = os.dup(1), os.dup(2)
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        try:
            _tools.mnnconvert(words)
        finally:
            for descriptor, own in enumerate(kept, 1):
                os.dup2(own, descriptor)
                os.close(own)
        file.seek(0)
        return file.read()


def _one(net, x):
    given = MNN.expr.const(np.ascontiguousarray(x), list(x.shape), MNN.expr.data_format.NCHW)
    (got,) = net.onForward([given])
    if got.data_format == MNN.expr.data_format.NC4HW4:
        got = MNN.expr.convert(got, MNN.expr.data_format.NCHW)
    return np.array(got.read())
