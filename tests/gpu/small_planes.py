"""Runs the kernels on the maps where they are furthest from a copy, for ncu to count: a step of tests/gpu/prove.

ncu --profile-from-start off --section SpeedOfLight python tests/gpu/small_planes.py FOLDER_OF_OUR_LIBRARIES
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

import torch
from gpu_variants import FUNCTIONS, Kernels, Tensors

from deploynorm.libraries import TORCH_LIBRARY

SHAPES = ((32, 2048, 49), (32, 1024, 196), (32, 256, 3136))


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("small_planes.py: torch finds no CUDA device")
    kernels = Kernels(Path(sys.argv[1]) / TORCH_LIBRARY)
    for shape in SHAPES:
        for layout in ("nchw", "nhwc"):
            tensors = Tensors(shape, layout, torch.bfloat16)
            for which in FUNCTIONS:
                if kernels(which, tensors) != 0:  # warms up: the first call loads the kernel
                    sys.exit(f"{which} fails on {shape}, {layout}")
            torch.cuda.synchronize()
            print(f"{shape}, {layout}", flush=True)
            torch.cuda.profiler.start()
            for which in FUNCTIONS:
                kernels(which, tensors)
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
