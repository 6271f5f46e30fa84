"""An engine before TensorRT reads it: its bytes, and what its manifest says of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from deploynorm.dtypes import HALF
from deploynorm.errors import BackendError, InputError, ModelError
from deploynorm.inputs import TensorSpec
from deploynorm.trt import BUILDERS, RUNTIMES, Flavour, TensorRT
from deploynorm.trt.engine import Engine
from deploynorm.trt.manifest import facts_of

_PROCESSORS: Final = (3, 40, 62, 183)
"""e_machine of x86, ARM, x86-64 and AArch64 in an ELF header. Code for the GPU, which every plan holds, has 190."""


def holds_library(plan: bytes) -> bool:
    """Whether an ELF file for a processor lies anywhere in a plan."""
    at = plan.find(b"\x7fELF")
    while at >= 0:
        order: Literal["little", "big"] = "big" if plan[at + 5 : at + 6] == b"\2" else "little"
        if int.from_bytes(plan[at + 18 : at + 20], order) in _PROCESSORS:
            return True
        at = plan.find(b"\x7fELF", at + 1)
    return False


def _major(version: str | None) -> int | None:
    major = str(version).partition(".")[0]
    return int(major) if major.isdecimal() else None


@dataclass(frozen=True)
class EngineSource:
    """The bytes of an engine, and what is known of it before TensorRT reads them."""

    where: str
    plan: bytes
    known: Mapping[str, Any]

    @classmethod
    def of(cls, engine: str | Path | bytes | Engine) -> EngineSource:
        if isinstance(engine, Engine):
            return cls("engine (in memory)", engine.plan, engine.to_dict())
        if isinstance(engine, bytes):
            return cls("engine (bytes)", engine, {})
        path = Path(engine)
        if not path.is_file():
            raise ModelError(str(path), "no such file", fix="check the path")
        if path.suffix == ".onnx":
            raise ModelError(str(path), "is an ONNX file, and TensorRT runs engines", fix=f"deploynorm build {path}")
        plan = path.read_bytes()
        return cls(str(path), plan, facts_of(path, plan))

    @property
    def backends(self) -> tuple[Flavour, ...]:
        """Those that may run it, the best first."""
        named = next((flavour for flavour in BUILDERS if flavour == self.known.get("backend")), None)
        if named == "tensorrt" and self.version_compatible:
            return (named, *RUNTIMES)
        return BUILDERS if named is None else (named,)

    @property
    def version_compatible(self) -> bool:
        return bool(self.known.get("version_compatible"))

    @property
    def needs_plugin(self) -> bool:
        return self.known.get("frn", {}).get("way") == "plugin" and not self.known.get("embedded_plugins")

    @property
    def half_type(self) -> str | None:
        precision = self.known.get("precision")
        return precision if precision in HALF else None

    def check_host_code(self) -> None:
        """InputError for a plan with a library inside, which TensorRT may run although it was told not to."""
        if holds_library(self.plan):
            problem = "holds code for the processor (a plugin library or a lean runtime), which loading it would run"
            fix = "pass trust_engine=True (--trust-engine) for a file from a source you trust"
            raise InputError(self.where, problem, fix=fix)

    def check_version(self, trt: TensorRT) -> None:
        """BackendError for an engine that this TensorRT does not run, as far as the manifest tells."""
        flavour, version = self.known.get("backend"), self.known.get("version")
        got, expected = f"{flavour} {version}", f"{trt.flavour} {trt.version}, as installed here"
        fix = "build it here: deploynorm build MODEL.onnx"
        if self.known and trt.flavour in RUNTIMES and not self.version_compatible:
            problem = f"is not version compatible, and {trt.name} runs no other engines"
            raise BackendError(self.where, problem, got=got, fix="build it with --version-compatible")
        runs = "tensorrt" if trt.flavour in RUNTIMES else trt.flavour
        built, here = _major(version), _major(trt.version)
        fits = built is None or here is None or built == here or (self.version_compatible and built < here)
        if flavour not in (None, runs) or not fits:
            raise BackendError(self.where, "was built with another TensorRT", got=got, expected=expected, fix=fix)

    def check_gpu(self, here: str | None) -> None:
        targets = self.known.get("compute_capabilities") or [here]
        if here not in targets and not self.known.get("hardware_compatible"):
            got, expected = f"compute capability {', '.join(targets)}", f"{here}, as here"
            fix = f"deploynorm build MODEL.onnx --compute-capability {here}"
            raise BackendError(self.where, "was built for another kind of GPU", got=got, expected=expected, fix=fix)

    def named(self, spec: TensorSpec) -> TensorSpec:
        """With the names that dynamic axes had in the ONNX graph, where they are known."""
        for entry in self.known.get("inputs", ()):
            if entry.get("name") == spec.name and len(entry.get("shape", ())) == len(spec.shape):
                return TensorSpec(spec.name, tuple(entry["shape"]), spec.dtype)
        return spec
