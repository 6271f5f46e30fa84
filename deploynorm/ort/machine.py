"""Files that were rewritten for one machine: what they say of it, and whether this machine is like it."""

from __future__ import annotations

import json
import platform
from functools import cache
from pathlib import Path
from typing import Any

import deploynorm
from deploynorm.errors import BackendError, ModelError
from deploynorm.files import scratch_folder
from deploynorm.ort.runtime import quiet_options

_FIX = "deploynorm rewrite ORIGINAL.onnx --optimize-for-cpu"
_BINDING = {"onnxruntime": "onnxruntime {}", "machine": "{}", "block": "blocks of {} channels"}
"""The facts that must be equal where a rewritten file runs, and their words in an error."""


def describe(runtime: Any, source_sha256: str | None = None) -> dict[str, str | int | None]:
    """What a file rewritten here says of this machine, and of the file that it was made from."""
    return {
        "onnxruntime": str(runtime.__version__),
        "machine": platform.machine(),
        "block": block_size(runtime),
        "processor": processor_name(),
        "deploynorm": deploynorm.__version__,
        "source_sha256": source_sha256,
    }


def check_this_machine(where: str, metadata_json: str, runtime: Any) -> None:
    """Refuses a file, by its metadata entry `METADATA_CPU`, that was rewritten for another machine.

    With another block size it would run and give wrong numbers: ONNX Runtime does not look.
    """
    try:
        note = json.loads(metadata_json)
        facts = {key: note[key] for key in _BINDING}
    except (ValueError, TypeError, KeyError) as error:
        problem, fix = "its note of the machine that it was rewritten for is damaged", f"make it again: {_FIX}"
        raise ModelError(where, problem, got=metadata_json, fix=fix) from error
    here = describe(runtime)
    if any(facts[key] != here[key] for key in _BINDING):
        problem = "was rewritten for another machine or another onnxruntime"
        got = f"{_words(facts)}, rewritten on {note.get('processor') or 'an unknown processor'}"
        fix = f"run here, on the file it was made from: {_FIX}"
        raise BackendError(where, problem, got=got, expected=f"{_words(here)}, as here", fix=fix)


@cache
def block_size(runtime: Any) -> int:
    """How many channels ONNX Runtime puts side by side on this processor: 16 with AVX-512, 8 with AVX.

    It has no call that says so. It pads the output channels of a convolution to whole blocks, so a convolution with one
    is optimised, and its weight read. BackendError where it does not block channels on this processor.
    """
    import onnx.parser

    # Old versions on purpose, so that every onnxruntime reads it.
    probe = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["": 13]>
        probe (float[1, 1, 1, 1] x) => (float[1, 1, 1, 1] y)
        <float[1, 1, 1, 1] weight = {1.0}> { y = Conv (x, weight) }
    """)
    with scratch_folder() as folder:
        options = quiet_options()  # it would warn that what it writes is for this machine only, as it should be
        options.optimized_model_filepath = str(folder / "probe.onnx")
        runtime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(options.optimized_model_filepath)
    for node in optimized.graph.node:
        if (node.domain, node.op_type) == ("com.microsoft.nchwc", "Conv"):
            shapes = {tensor.name: tensor.dims for tensor in optimized.graph.initializer}
            return int(shapes[node.input[1]][0])
    problem = f"onnxruntime {runtime.__version__} does not block channels on this processor"
    expected, fix = "an x86-64 processor with AVX, or another for which it has the blocked layout", "use it as exported"
    raise BackendError("onnxruntime", problem, got=processor_name(), expected=expected, fix=fix)


def _words(facts: dict[str, str | int | None]) -> str:
    return ", ".join(text.format(facts[key]) for key, text in _BINDING.items())


def processor_name() -> str:
    """The processor's name as people know it: from Linux's /proc/cpuinfo, else what Python says."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
