"""Made-up machines: those that the doctor looks at, and one with a TensorRT of Python that builds."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from typing import Any

import pytest
from fake_tensorrt import fake_tensorrt, with_builder

from deploynorm.doctor.facts import Driver, Examination, Gpu, Library, OnnxRuntime, Provider, TensorRT
from deploynorm.libraries import ORT_LIBRARY, TENSORRT_LIBRARY, TENSORRT_REGISTER_LIBRARY, TORCH_LIBRARY
from deploynorm.libraries.elf import CudaCode

FATBIN = tuple(CudaCode("sm", each) for each in [(7, 5), (8, 0), (9, 0), (10, 0), (12, 0)])
FATBIN += (CudaCode("compute", (9, 0), 13),)

ORT = Library(ORT_LIBRARY, "/c/ort.so", 2**20, "built here", "x86-64", ("libc.so.6",), ("RegisterCustomOps",), FATBIN)
TRAINING = replace(
    ORT, name=TORCH_LIBRARY, path="/c/torch.so", exports=("deploynorm_frn_cpu", "deploynorm_frn_backward_cpu")
)
PLUGIN = replace(ORT, name=TENSORRT_LIBRARY, path="/c/trt.so", exports=("getCreators", "setLoggerFinder"))
REGISTER = replace(ORT, name=TENSORRT_REGISTER_LIBRARY, path="/c/register.so", exports=(), code=())

H100 = Gpu("NVIDIA H100", (9, 0), 80 * 2**30)
CUDA_NEEDS = ("libcublas.so.13", "libcudart.so.13", "libc.so.6", "libcudnn.so.9")
TRT_NEEDS = ("libnvinfer.so.10", "libcudart.so.13")

GPU_MACHINE = Examination(
    python="3.12.1 (/usr/bin/python3)",
    system="Linux",
    packages={
        "numpy": "2.4.6",
        "nvidia-cudnn-cu13": "9.20",
        "onnxruntime-gpu": "1.31.1",
        "tensorrt": "10.14.1",
        "torch": "2.13.0+cu130",
    },
    torch_cuda="13.0",
    onnxruntime=OnnxRuntime(
        "1.31.1", ("onnxruntime-gpu",), ("CUDAExecutionProvider", "CPUExecutionProvider"), takes_library=True
    ),
    providers=(Provider("cuda", CUDA_NEEDS), Provider("tensorrt", TRT_NEEDS)),
    tensorrt=(TensorRT("tensorrt", "10.14.1", takes_plugin=True, creators=41),),
    compiler="g++ 14",
    nvcc="/usr/local/cuda/bin/nvcc (release 13.0)",
    nvcc_release=(13, 0),
    driver=Driver("580.95.05", (13, 0), (H100,)),
    machine="x86-64",
    libraries=(ORT, TRAINING, PLUGIN, REGISTER),
)
"""One on which everything is there and works."""

CPU_MACHINE = Examination(
    packages={"numpy": "2.4.6", "onnxruntime": "1.32.0", "torch": "2.13.0+cpu"},
    onnxruntime=OnnxRuntime("1.32.0", ("onnxruntime",), ("CPUExecutionProvider",), takes_library=True),
    compiler="g++ 14",
    machine="x86-64",
    libraries=(replace(ORT, code=()), replace(TRAINING, code=())),
)
"""One without a GPU, as `pip install 'deploynorm[cpu]'` leaves it."""


def install_builder(
    patch: pytest.MonkeyPatch, version: str = "11.4.0", *, gpu: str | None = "9.0", **facts: Any
) -> Any:
    """Makes it the TensorRT of this machine, with a GPU that is not there, and returns its module."""
    module = with_builder(fake_tensorrt(version), gpu=gpu is not None, **facts)
    patch.setitem(sys.modules, "tensorrt", module)
    patch.setattr("deploynorm.trt.importing._LOGGERS", {})
    patch.setattr("deploynorm.trt.plugins._LOADED", {})
    for name in ("deploynorm._build", "deploynorm.trt.builder"):
        patch.setattr(importlib.import_module(name), "gpu_here", lambda: gpu)
    return module
