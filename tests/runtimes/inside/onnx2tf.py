"""LiteRT, converted by onnx2tf: channels last on the inside, so inputs and outputs of rank 4 are transposed."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import onnx2tf
from ai_edge_litert.interpreter import Interpreter


def run(job, samples, how):
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "m.onnx"
        shutil.copyfile(job["model"], model)  # it overwrites its input
        onnx2tf.convert(input_onnx_file_path=str(model), output_folder_path=folder, verbosity="error")
        interpreter = Interpreter(str(Path(folder) / "m_float32.tflite"))
    (given,), (wanted,) = interpreter.get_input_details(), interpreter.get_output_details()
    got = []
    for x in samples:
        x = x.transpose(0, 2, 3, 1)
        interpreter.resize_tensor_input(given["index"], x.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(given["index"], x)
        interpreter.invoke()
        y = np.array(interpreter.get_tensor(wanted["index"]))
        got.append(y.transpose(0, 3, 1, 2) if y.ndim == 4 else y)
    return got
