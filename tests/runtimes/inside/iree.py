"""IREE on LLVM's CPU backend."""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import iree.compiler
import iree.runtime
import numpy as np


def run(job, samples, how):
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "m.mlir"
        words = [sys.executable, "-m", "iree.compiler.tools.import_onnx", job["model"], "-o", str(text)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        options = {"target_backends": ["llvm-cpu"], "extra_args": ["--iree-llvmcpu-target-cpu=host"]}
        try:
            binary = iree.compiler.compile_file(str(text), input_type="onnx", **options)
        except iree.compiler.CompilerToolError as error:  # it prints the line of each, with its types
            refused = sorted(set(re.findall(r'failed to legalize .*?name = "([\w.]+)"', str(error))))
            if not refused:
                raise
            raise RuntimeError(f"failed to legalize {', '.join(refused)}") from error
    module = iree.runtime.load_vm_flatbuffer(binary, driver="local-task")
    function = next(name for name in module.vm_module.function_names if not name.startswith("__") and "$" not in name)
    return [np.array(module[function](x).to_host()) for x in samples]
