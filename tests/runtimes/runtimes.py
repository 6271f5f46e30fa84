"""The rows of the matrix: to add a runtime, add one here, its pins in environments.py, and its adapter in inside/."""

from __future__ import annotations

from dataclasses import dataclass

from environments import ENVIRONMENTS, ONNXRUNTIME

__all__ = ["PASSES", "RUNTIMES", "Runtime"]


@dataclass(frozen=True)
class Runtime:
    """A row.

    Attributes:
        title: What the table calls it.
        environment: A name of ENVIRONMENTS; "" is that of this program.
        adapter: A file of inside/.
        how: For an adapter of several rows.
        takes: "files", or "networks" where it converts the module itself.
        quick: Whether CI runs it.
        seconds: What one file may take.
        remark: For the page.
    """

    title: str
    environment: str
    adapter: str
    how: str = ""
    takes: str = "files"
    quick: bool = False
    seconds: float = 120
    remark: str = ""


def _version(environment: str, index: int = 0, npm: bool = False) -> str:
    found = ENVIRONMENTS[environment]
    return (found.npm[index].rpartition("@") if npm else found.pip[index].partition("=="))[2]


_WEB, _NODE = _version("node", 0, npm=True), _version("node", 1, npm=True)

RUNTIMES = (
    *(Runtime(f"ONNX Runtime {x}", f"onnxruntime-{x}", "ort.py", quick=True) for x in ONNXRUNTIME),
    Runtime(f"onnxruntime-node {_NODE}", "node", "ort_js.mjs", "onnxruntime-node", quick=True),
    Runtime(f"onnxruntime-web {_WEB}, WASM, Node.js", "node", "ort_js.mjs", "onnxruntime-web", quick=True),
    Runtime(f"onnxruntime-web {_WEB}, WASM, Chromium", "browser", "chromium.mjs", "wasm"),
    Runtime(f"onnxruntime-web {_WEB}, WebGPU, Chromium", "browser", "chromium.mjs", "webgpu",
            remark="on SwiftShader, Chromium's GPU on a CPU"),
    Runtime(f"OpenVINO {_version('openvino')}", "openvino", "openvino.py", quick=True,
            remark="with `INFERENCE_PRECISION_HINT` f32"),
    Runtime(f"OpenVINO {_version('openvino')}, our extension", "openvino", "openvino.py", "extension", quick=True,
            remark="as the row above, with `core.add_extension(deploynorm.openvino_extension())`"),
    Runtime(f"ncnn {_version('ncnn')}", "ncnn", "ncnn.py", quick=True,
            remark="converted by pnnx; images of a batch one by one"),
    Runtime(f"MNN {_version('mnn')}", "mnn", "mnn.py"),
    Runtime(f"OpenCV {_version('opencv')}", "opencv", "opencv.py"),
    Runtime(f"IREE {_version('iree')}", "iree", "iree.py"),
    Runtime(f"TVM {_version('tvm')}", "tvm", "tvm.py"),
    Runtime(f"ReferenceEvaluator of onnx {_version('onnx')}", "onnx", "reference.py"),
    Runtime("TensorRT-RTX", "", "rtx.py", remark="1.7.1 builds for compute capability 8.9; nothing runs the engine"),
    Runtime(f"LiteRT by onnx2tf {_version('onnx2tf')}", "onnx2tf", "onnx2tf.py", seconds=600,
            remark="converted once for each shape, which is set in the file before"),
    Runtime(f"LiteRT by litert-torch {_version('litert-torch')}", "litert-torch", "litert_torch.py", takes="networks",
            seconds=600),
)  # fmt: skip

PASSES = ("onnxslim", "onnxsim", "onnxoptimizer", "polygraphy", "graphsurgeon", "quant_pre_process", "quantize_static")
"""Of inside/passes.py, in the environment "passes"."""
