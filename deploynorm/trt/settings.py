"""What a build of an engine is asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from deploynorm.trt.profile import Range

__all__ = ["HARDWARE_COMPATIBILITY", "Settings", "Way"]

Way = Literal["plugin", "native"]
"""plugin: our kernel. native: the operator's body in standard operators, which TensorRT fuses as it can."""

HARDWARE_COMPATIBILITY: Final = {"ampere+": "AMPERE_PLUS", "same": "SAME_COMPUTE_CAPABILITY"}
"""Which other GPUs an engine of TensorRT runs on: our names, and TensorRT's."""


@dataclass(frozen=True)
class Settings:
    """What a build was asked for, less the model."""

    ranges: Mapping[str, Range]
    targets: tuple[str, ...]
    named_targets: bool
    tf32: bool
    plugins: Sequence[Path] | None
    embed_plugin: bool
    timing_cache: bytes | None
    workspace: int | None
    version_compatible: bool
    hardware_compatible: str | None
    optimization_level: int | None
