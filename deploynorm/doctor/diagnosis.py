"""Judges the facts: what is broken on this machine, what is missing that would help, and the remedies.

The failures that users of such libraries meet most, with the findings that report them:

1. The plugin is not found when a model is read: its library was never built, is that of other sources, or is not one
   of ours (`library-missing`, `library-unreadable`, `library-machine`, `library-not-ours`, `library-does-not-load`,
   `library-stale`).
2. TensorRT of one major version, and a host that was linked against another (`tensorrt-major`, `tensorrt-import`).
3. "No kernel image": the library has no code for the compute capability of the GPU (`gpu-code`).
4. onnxruntime is too old, cannot be imported, or two of its packages lie over each other (`onnxruntime-old`,
   `onnxruntime-import`, `onnxruntime-numpy`, `onnxruntime-twice`).
5. The CUDA provider does not start: CUDA or cuDNN is missing, or the driver is too old for it (`cuda-libraries`,
   `driver-old`, `driver-error`).
6. TensorRT, or what hosts it, ends the process or refuses the library (`tensorrt-plugin`, `tensorrt-rtx-name`,
   `onnxruntime-library`).
7. torchvision is for another torch (`torchvision-import`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

from deploynorm.doctor import _gpu, _libraries, _runtimes
from deploynorm.doctor.facts import Examination
from deploynorm.doctor.finding import Finding
from deploynorm.doctor.result import Diagnosis

__all__ = ["diagnose"]

_CHECKS: Final[tuple[Callable[[Examination], Iterator[Finding]], ...]] = (
    _runtimes.onnxruntime,
    _libraries.libraries,
    _runtimes.tensorrt,
    _runtimes.tensorrt_provider,
    _runtimes.torchvision,
    _gpu.driver,
    _gpu.code_for_gpus,
    _gpu.cuda_libraries,
    _gpu.toolkit,
)


def diagnose(examination: Examination) -> Diagnosis:
    """Judges the facts; in the result, what is broken comes first."""
    found = [finding for check in _CHECKS for finding in check(examination)]
    return Diagnosis(examination, tuple(sorted(found, key=lambda finding: finding.level != "broken")))
