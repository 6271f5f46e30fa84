"""The machine of a figure, written beside it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from deploynorm.ort.machine import processor_name

__all__ = ["describe"]


def describe(*packages: str) -> dict[str, object]:
    """Processor, cores this process may use, memory, and versions of Python and the packages."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return {
        "processor": processor_name(),
        "vector_sets": [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in flags],
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_1min": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
    }
