"""MNN. Its command `mnnconvert` installs packages by itself: the function behind it does not."""

import sys
import tempfile
from pathlib import Path

import _tools
import MNN
import numpy as np


def run(job, samples, how):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.mnn"
        options = {"-f": "ONNX", "--modelFile": job["model"], "--MNNModel": str(path), "--bizCode": "none"}
        _tools.mnnconvert(["mnnconvert", *(word for pair in options.items() for word in pair)])
        if not path.exists():
            raise RuntimeError("mnnconvert wrote no file; it says why on its output")
        net = MNN.nn.load_module_from_file(str(path), [], [])
        return [_one(net, x) for x in samples]


def _one(net, x):
    given = MNN.expr.const(np.ascontiguousarray(x), list(x.shape), MNN.expr.data_format.NCHW)
    (got,) = net.onForward([given])
    if got.data_format == MNN.expr.data_format.NC4HW4:
        got = MNN.expr.convert(got, MNN.expr.data_format.NCHW)
    return np.array(got.read())
