"""LiteRT, converted by onnx2tf, once for each shape: of free sizes it makes models that return other shapes.

Channels are last on the inside, so inputs and outputs of rank 4 are transposed.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnx2tf
from ai_edge_litert.interpreter import Interpreter


def run(job, samples, how):
    return [_one(job["model"], x) for x in samples]


def _one(file, x):
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "m.onnx"  # a copy: it overwrites what it reads
        onnx.save(_fixed(onnx.load(file), x.shape), model)
        onnx2tf.convert(input_onnx_file_path=str(model), output_folder_path=folder, verbosity="error")
        interpreter = Interpreter(str(Path(folder) / "m_float32.tflite"))
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], x.transpose(0, 2, 3, 1))
    interpreter.invoke()
    y = np.array(interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))
    return y.transpose(0, 3, 1, 2) if y.ndim == 4 else y


def _fixed(model, shape):
    """The model for one shape of its input. Its own option, overwrite_input_shape, leaves the sizes behind free."""
    del model.graph.value_info[:]
    for dim, size in zip(model.graph.input[0].type.tensor_type.shape.dim, shape, strict=True):
        dim.dim_value = size
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(model, data_prop=True)
