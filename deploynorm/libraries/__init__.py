"""The native libraries: where they are, what is in them, and building them on this machine."""

from deploynorm.libraries.compile import build
from deploynorm.libraries.describe import describe
from deploynorm.libraries.find import (
    LIBRARIES,
    ORT_LIBRARY,
    TENSORRT_LIBRARY,
    TENSORRT_REGISTER_LIBRARY,
    TORCH_LIBRARY,
    cpu_variants,
    cuda_variants,
    find_library,
    library_path,
    source_folder,
)
from deploynorm.libraries.tools import find_cuda, find_tools

__all__ = [
    "LIBRARIES",
    "ORT_LIBRARY",
    "TENSORRT_LIBRARY",
    "TENSORRT_REGISTER_LIBRARY",
    "TORCH_LIBRARY",
    "build",
    "cpu_variants",
    "cuda_variants",
    "describe",
    "find_cuda",
    "find_library",
    "find_tools",
    "library_path",
    "source_folder",
]
