"""A check of the checks: each of these faults in the sources of the CUDA kernels is found on the emulation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from emulated import build_broken_kernels, find_faults

pytestmark = pytest.mark.slow  # each fault is a build of its own

FORWARD = {
    "a barrier is missing": ("    __syncthreads();\n  }\n\n  // Of all threads", "  }\n\n  // Of all threads"),
    "a tail is forgotten": ("const bool in_tail = chunk == tiling.chunks.by - 1 && ", "const bool in_tail = false && "),
    "a vector is not aligned": ("if (head > tiling.spatial)", "head = 0;\n      if (head > tiling.spatial)"),
    "a warp leaves before its shuffle": ("    const bool has_plane = plane < count;\n",
                                         "    const bool has_plane = plane < count;\n    if (!has_plane) return;\n"),
    "an element of a run's next plane": ("element < of_first", "element <= of_first"),
    "the end of the last run is forgotten": ("const bool has_end = ", "const bool has_end = false && "),
    "squares in the type itself": ("sums[0] += x * x;", "Storage half; narrow(x * x, &half); sums[0] += widen(half);"),
    "a cluster does not wait for all sums": ("    cluster.sync();\n", ""),
    "rstd of another group": ("problem.rstd[statistic] = rstd", "problem.rstd[statistic % problem.channels.by] = rstd"),
}  # fmt: skip

BACKWARD = {
    "a barrier is missing": ("    __syncthreads();\n#pragma unroll\n    for (int i = 0; i < T::kChannels; ++i) read",
                             "#pragma unroll\n    for (int i = 0; i < T::kChannels; ++i) read"),
    "the edge of a plane is forgotten": ("if constexpr (!T::kStrip) thread.add(edge);", ""),
    "the threshold is forgotten on the second reading": ("    thread.mask(in);\n    thread.store(in, thread",
                                                         "    thread.store(in, thread"),
    "a tie goes to tau": ("beta) < tau;", "beta) <= tau;"),
    "y is rounded twice": ("return normalised(x, scale, beta) <", "return scale * x + beta <"),
    "the mean is over a position too many": ("sums[kDot] / problem.positions", "sums[kDot] / (problem.positions + 1)"),
    "a chunk is left out": ("if (channel < tile.valid) thread", "if (channel < tile.valid && chunk > 0) thread"),
    "a sample is left out": ("int64_t sample = row;", "int64_t sample = row + 1;"),
    "a run's channels are not shared": ("    if constexpr (Op::kAddsByChannel) share();\n", ""),
}  # fmt: skip

RESIDUAL = {
    "a cluster takes what it holds for it": ("input < Op::kAdded ? held(input, i) :", "true ? held(0, i) :"),
}

_THERE = "if (head > tiling.spatial)"
FAULTS = {"forward": FORWARD, "residual": RESIDUAL, "backward": BACKWARD}
SOURCES = dict(zip(FAULTS, ("frn.cu", "frn.cu", "frn_backward.cu"), strict=True))
SOUND = {(which, "no fault"): (_THERE, _THERE) for which in FAULTS}
BROKEN = {(which, fault): change for which, faults in FAULTS.items() for fault, change in faults.items()}

_CHECK = """
from math import prod
from cases import ADD_CASES, CASES
from cuda_kernels import BACKWARD_LAYOUTS, VARIANTS, CudaKernel, check_backward, check_ties, sized
from cuda_kernels import check as check_case

def check(library):
    kernel = CudaKernel(library, "cpu")
    which = library.parent.parent.name
    all_cases = ADD_CASES if which == "residual" else CASES
    cases = [case for case in all_cases if case.dtype == "float16" and prod(case.shape) < 10**5]
    for layout in BACKWARD_LAYOUTS:
        if which != "backward":
            for case in cases:
                check_case(kernel, case, VARIANTS, layout=layout)
            continue
        check_ties(kernel, "float16", VARIANTS, layout=layout)
        for case in (sized("float16", 1, 2, 5000), *cases):
            check_backward(kernel, case, VARIANTS, layout=layout)
"""


def test_the_emulation_finds_every_fault_and_nothing_without_one(
    require: Callable[[str], None], build_once: Callable[..., Path]
) -> None:
    require("compiler")
    changes = SOUND | BROKEN

    def build(folder: Path) -> None:
        for number, ((which, _), change) in enumerate(changes.items()):
            build_broken_kernels(folder / which / str(number), SOURCES[which], *change, residual=which == "residual")

    folder = build_once("broken", build)
    libraries = [folder / which / str(number) / "libemulated.so" for number, (which, _) in enumerate(changes)]
    found = dict(zip(changes, find_faults(libraries, _CHECK), strict=True))
    assert found == dict.fromkeys(SOUND, False) | dict.fromkeys(BROKEN, True)
