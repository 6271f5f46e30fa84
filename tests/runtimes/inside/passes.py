"""Passes of other tools over a file, which stock ONNX Runtime runs before and after: `how` is the name of one.

Returns the outputs, and as a note what became of the nodes of our operators, their functions, and the metadata.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import onnx
import onnxruntime

DOMAIN = "deploynorm"


def run(job, samples, how):
    before = onnx.load(job["model"])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.onnx"
        PASSES[how](job["model"], out, samples)
        after = onnx.load(out)
        session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
        got = [session.run(None, {session.get_inputs()[0].name: x})[0] for x in samples]
    return got, f"{_told(before, after)}; {_kept(before, after)}"


def _told(before, after):
    count = sum(node.domain == DOMAIN for node in before.graph.node)
    left = [node for node in after.graph.node if node.domain == DOMAIN]
    bodies = {function.name for function in after.functions if function.domain == DOMAIN}
    if not left:
        return f"all {count} FRN nodes written out, in {len(after.graph.node)} nodes"
    lost = "" if {node.op_type for node in left} <= bodies else ", without their function"
    return f"{len(left)} of {count} FRN nodes{lost}"


def _kept(before, after):
    lost = {entry.key for entry in before.metadata_props} - {entry.key for entry in after.metadata_props}
    return "metadata lost" if lost else "metadata kept"


def _onnxslim(model, out, samples):
    import onnxslim

    onnxslim.slim(model, str(out))


def _onnxsim(model, out, samples):
    import onnxsim

    simplified, good = onnxsim.simplify(onnx.load(model))
    if not good:
        raise RuntimeError("onnxsim's own check does not hold")
    onnx.save(simplified, out)


def _onnxoptimizer(model, out, samples):
    import onnxoptimizer

    onnx.save(onnxoptimizer.optimize(onnx.load(model)), out)


def _polygraphy(model, out, samples):
    words = ["surgeon", "sanitize", model, "--fold-constants", "-o", str(out)]
    done = subprocess.run([str(Path(sys.executable).with_name("polygraphy")), *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError((done.stdout + done.stderr).strip().splitlines()[-1])


def _graphsurgeon(model, out, samples):
    import onnx_graphsurgeon as gs

    onnx.save(gs.export_onnx(gs.import_onnx(onnx.load(model)).cleanup().toposort()), out)


def _quantize(model, out, samples):
    from onnxruntime.quantization import CalibrationDataReader, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self):
            name = onnx.load(model).graph.input[0].name
            self.left = iter([{name: x} for x in samples])

        def get_next(self):
            return next(self.left, None)

    quantize_static(model, str(out), Reader())


def _pre_process(model, out, samples):
    from onnxruntime.quantization.shape_inference import quant_pre_process

    quant_pre_process(model, str(out))


PASSES = {
    "onnxslim": _onnxslim,
    "onnxsim": _onnxsim,
    "onnxoptimizer": _onnxoptimizer,
    "polygraphy": _polygraphy,
    "graphsurgeon": _graphsurgeon,
    "quant_pre_process": _pre_process,
    "quantize_static": _quantize,
}
