"""What there is of the native libraries, and of what builds and runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from deploynorm.errors import BackendError
from deploynorm.libraries.find import LIBRARIES, cpu_variants, cuda_variants, find_library
from deploynorm.libraries.tools import find_cuda, find_tools
from deploynorm.tables import table


@dataclass(frozen=True)
class Description:
    """What `describe` found, a line of text by subject; `print` shows it."""

    facts: Mapping[str, str]

    def __str__(self) -> str:
        return table("Native libraries", ("", ""), self.facts.items())

    def to_dict(self) -> dict[str, str]:
        return dict(self.facts)


def describe() -> Description:
    """Finds our libraries, the kernels that this processor runs, the compilers, and whether onnxruntime takes ours."""
    facts = {}
    subjects = {"onnxruntime": "library", "torch": "for training", "tensorrt": "TensorRT plugin"}
    for name, subject in subjects.items():
        library = find_library(name)
        facts[subject] = f"none: run {LIBRARIES[name].command}" if library is None else str(library)
        if library is not None and name == "onnxruntime":
            facts["processor runs"] = ", ".join(cpu_variants(library))
            facts["CUDA kernels"] = ", ".join(cuda_variants(library)) or "none: run deploynorm plugins build --cuda"
    facts["compiler"] = _or_the_error(lambda: "{0.compiler} ({0.compiler_version})".format(find_tools()))
    facts["cmake"] = _or_the_error(lambda: str(find_tools().cmake))
    facts["CUDA compiler"] = _or_the_error(lambda: "{0.nvcc} ({0.version})".format(find_cuda()))
    facts["onnxruntime"] = _or_the_error(_onnxruntime)
    return Description(facts)


def _onnxruntime() -> str:
    from deploynorm import ort  # which imports this package

    version = str(ort.import_onnxruntime().__version__)
    if find_library() is None:
        return version
    ort.register(ort.quiet_options())
    return f"{version}, takes the library"


def _or_the_error(fact: Callable[[], str]) -> str:
    try:
        return fact()
    except BackendError as error:
        return str(error)
