"""TVM's Relax on LLVM."""

import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx


def run(job, samples, how):
    module = from_onnx(onnx.load(job["model"]), keep_params_in_input=False)
    module = relax.transform.DecomposeOpsForInference()(module)
    machine = relax.VirtualMachine(tvm.compile(relax.transform.LegalizeOps()(module), target="llvm"), tvm.cpu())
    return [machine["main"](tvm.runtime.tensor(x)).numpy() for x in samples]
