"""Every known failure, from made-up facts, beside what looks like it and is none."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from machines import CPU_MACHINE, CUDA_NEEDS, GPU_MACHINE, H100, ORT, PLUGIN, REGISTER, TRAINING, TRT_NEEDS

from deploynorm.doctor import Examination, diagnose
from deploynorm.doctor import diagnosis as diagnosis_module
from deploynorm.doctor.facts import Driver, Gpu, Library, OnnxRuntime, Provider, TensorRT
from deploynorm.libraries.elf import CudaCode


def gpu(**changes: object) -> Examination:
    return replace(GPU_MACHINE, **changes)  # type: ignore[arg-type]


def runtime(**changes: object) -> OnnxRuntime:
    assert GPU_MACHINE.onnxruntime is not None
    return replace(GPU_MACHINE.onnxruntime, **changes)  # type: ignore[arg-type]


def packages(**versions: str) -> dict[str, str]:
    named = {name.replace("_", "-"): version for name, version in versions.items()}
    return {name: version for name, version in {**GPU_MACHINE.packages, **named}.items() if version}


def libraries(**changes: object) -> tuple[Library, ...]:
    """Ours, with the operator library changed."""
    return (replace(ORT, **changes), TRAINING, PLUGIN, REGISTER)  # type: ignore[arg-type]


def providers(missing: dict[str, str | None], trt_missing: dict[str, str | None] | None = None) -> tuple[Provider, ...]:
    return Provider("cuda", CUDA_NEEDS, missing), Provider("tensorrt", TRT_NEEDS, trt_missing or {})


RTX_4090 = Gpu("GeForce RTX 4090", (8, 9), 24 * 2**30)
SM_90 = CudaCode("sm", (9, 0))
CUDA_12 = Driver("550.54", (12, 4), (H100,))
_CODE_12 = (SM_90, CudaCode("compute", (9, 0), 12))
MADE_FOR_CUDA_12 = (replace(ORT, code=_CODE_12), replace(TRAINING, code=_CODE_12))


Cases = dict[str, tuple[Examination, dict[str, tuple[str, str]]]]
"""What is the case -> a machine, and the only findings that there are to be: what problem and remedy say of each."""

BROKEN: Cases = {
    "a torchvision for another torch": (
        gpu(
            packages=packages(torchvision="0.28.0"),
            torchvision_problem="RuntimeError: operator torchvision::nms does not exist",
        ),
        {
            "torchvision-import": (
                r"torchvision 0\.28\.0 cannot be imported beside torch 2\.13\.0\+cu130.*torchvision::nms",
                "pytorch.org/get-started.*pip uninstall torchvision",
            ),
        },
    ),
    "two onnxruntimes over each other": (
        gpu(onnxruntime=runtime(packages=("onnxruntime", "onnxruntime-gpu"))),
        {
            "onnxruntime-twice": (
                "onnxruntime and onnxruntime-gpu are both installed",
                r"pip uninstall -y onnxruntime onnxruntime-gpu, then pip install 'deploynorm\[gpu\]'",
            )
        },
    ),
    "onnxruntime 1.17": (
        gpu(onnxruntime=runtime(version="1.17.3", takes_library=False, library_problem="refused")),
        {"onnxruntime-old": ("1.17.3 is too old", "pip install --upgrade onnxruntime-gpu")},
    ),
    "onnxruntime 1.18 beside NumPy 2": (
        gpu(onnxruntime=runtime(version="1.18.1", problem="the package cannot be imported", takes_library=None)),
        {"onnxruntime-numpy": (r"1\.18\.1 was built for NumPy 1 .* beside NumPy 2\.4\.6", "'numpy<2'")},
    ),
    "one of two onnxruntimes was removed, and took the files of both": (
        gpu(onnxruntime=runtime(problem="module 'onnxruntime' has no attribute 'SessionOptions'", takes_library=None)),
        {"onnxruntime-import": ("has no attribute", "pip install --force-reinstall onnxruntime-gpu")},
    ),
    "onnxruntime 1.19 that fails for another reason than NumPy 2": (
        gpu(onnxruntime=runtime(version="1.19.0", problem="a file is missing", takes_library=None)),
        {"onnxruntime-import": ("a file is missing", "--force-reinstall")},
    ),
    "onnxruntime 1.18 that fails beside NumPy 1": (
        gpu(
            packages=packages(numpy="1.26.4"),
            onnxruntime=runtime(version="1.18.1", problem="a file is missing", takes_library=None),
        ),
        {"onnxruntime-import": ("a file is missing", "--force-reinstall")},
    ),
    "onnxruntime refuses a library in which nothing else is wrong": (
        gpu(onnxruntime=runtime(takes_library=False, library_problem="Domain already set in registry")),
        {"onnxruntime-library": ("does not take our operator library: Domain", "deploynorm plugins build")},
    ),
    "a library that is not ours, which onnxruntime then refuses": (
        gpu(
            libraries=libraries(exports=("getCreators",)),
            onnxruntime=runtime(takes_library=False, library_problem="undefined symbol: RegisterCustomOps"),
        ),
        {"library-not-ours": ("/c/ort.so does not export RegisterCustomOps", "deploynorm plugins build --cuda")},
    ),
    "a plugin without what TensorRT looks for": (
        gpu(
            libraries=(ORT, TRAINING, replace(PLUGIN, exports=("getPluginCreators",)), REGISTER),
            tensorrt=(TensorRT("tensorrt", "10.14.1", takes_plugin=False, plugin_problem="no getCreators"),),
        ),
        {"library-not-ours": ("does not export getCreators and setLoggerFinder", "plugins build --cuda")},
    ),
    "a library that was cut short": (
        gpu(libraries=libraries(machine="", exports=(), code=(), problem="damaged or cut short")),
        {"library-unreadable": ("/c/ort.so: damaged or cut short", "deploynorm plugins build")},
    ),
    "a library from another kind of machine": (
        gpu(libraries=libraries(machine="aarch64", problem="cannot open shared object file")),
        {"library-machine": ("is for aarch64, and this Python is for x86-64", "plugins build --cuda")},
    ),
    "a library that needs another": (
        gpu(libraries=libraries(problem="libnvinfer.so.8: cannot open shared object file")),
        {"library-does-not-load": (r"libnvinfer\.so\.8: cannot open", "plugins build --cuda")},
    ),
    "TensorRT whose libraries are missing": (
        gpu(tensorrt=(TensorRT("tensorrt", problem="libnvinfer.so.10: cannot open shared object file"),)),
        {"tensorrt-import": ("tensorrt is installed and cannot be used: libnvinfer", "--force-reinstall tensorrt$")},
    ),
    "TensorRT for another CUDA, by the name of its package": (
        gpu(
            packages=packages(tensorrt_rtx_cu13="1.7.1"),
            tensorrt=(*GPU_MACHINE.tensorrt, TensorRT("tensorrt_rtx", problem="it ended its process with SIGABRT")),
        ),
        {"tensorrt-import": ("tensorrt_rtx is .* SIGABRT", "--force-reinstall tensorrt-rtx-cu13")},
    ),
    "TensorRT refuses the plugin": (
        gpu(tensorrt=(TensorRT("tensorrt", "11.4.0", takes_plugin=False, plugin_problem="API mismatch"),)),
        {"tensorrt-plugin": (r"tensorrt 11\.4\.0 does not take our plugin: API mismatch", "plugins build --cuda")},
    ),
    "TensorRT 11 beside a provider that is linked against 10": (
        gpu(
            packages=packages(tensorrt="11.4.0.106"),
            tensorrt=(TensorRT("tensorrt", "11.4.0.106", takes_plugin=True),),
            providers=providers({}, {"libnvinfer.so.10": None}),
        ),
        {"tensorrt-major": (r"TensorRT 11\.4\.0\.106 is installed, .* libnvinfer\.so\.10", r"'tensorrt==10\.\*'")},
    ),
    "a GPU for which the libraries have no code": (
        gpu(libraries=libraries(code=(SM_90,)), driver=replace(GPU_MACHINE.driver, gpus=(H100, RTX_4090, RTX_4090))),
        {"gpu-code": (r"ort\.so has sm_90, and nothing for GeForce RTX 4090 .*8\.9", "--architectures 89$")},
    ),
    "a GPU older than all code of ours": (
        gpu(
            libraries=(ORT, replace(TRAINING, code=())),
            tensorrt=(),
            driver=replace(GPU_MACHINE.driver, gpus=(Gpu("NVIDIA V100", (7, 0), 16 * 2**30),)),
        ),
        {
            "gpu-code": (r"nothing for NVIDIA V100 \(compute capability 7\.0\)", "plugins build, without CUDA"),
            "library-missing": ("libdeploynorm_trt", ""),
            "tensorrt-missing": ("", ""),
        },
    ),
    "CUDA libraries are missing": (
        gpu(providers=providers({"libcublas.so.13": None, "libcudnn.so.9": "/v/nvidia/cudnn/lib"})),
        {"cuda-libraries": (r"cannot start: libcublas\.so\.13 not found", r"onnxruntime-gpu\[cuda,cudnn\]")},
    ),
    "a driver for CUDA 12 and a torch for CUDA 13": (
        gpu(driver=CUDA_12, providers=(), libraries=MADE_FOR_CUDA_12, tensorrt=GPU_MACHINE.tensorrt),
        {
            "driver-old": (
                r"torch 2\.13\.0\+cu130 is for CUDA 13, and the NVIDIA driver 550\.54 knows CUDA 12\.4",
                r"to 580\.65 or later",
            ),
            "library-missing": ("libdeploynorm_trt", ""),
        },
    ),
    "a driver for CUDA 12 and an onnxruntime-gpu for CUDA 13": (
        gpu(driver=CUDA_12, torch_cuda="12.8", libraries=MADE_FOR_CUDA_12),
        {"driver-old": ("this onnxruntime-gpu is for CUDA 13", "older CUDA"), "library-missing": ("", "")},
    ),
    "a driver for CUDA 12 and a plugin that nvcc 13 built": (
        gpu(driver=CUDA_12, torch_cuda="12.8", providers=(), libraries=(*MADE_FOR_CUDA_12, PLUGIN)),
        {"driver-old": (r"libdeploynorm_trt\.so is for CUDA 13", "older nvcc")},
    ),
    "a driver whose version is unknown, and TensorRT for a CUDA to come": (
        gpu(packages=packages(tensorrt_cu14="12.0"), driver=replace(GPU_MACHINE.driver, version=None)),
        {"driver-old": (r"tensorrt-cu14 12\.0 is for CUDA 14, and the NVIDIA driver knows", "to one for CUDA 14")},
    ),
    "a driver that was updated under a running kernel": (
        gpu(driver=Driver("580.95", (13, 0), problem="CUDA_ERROR_SYSTEM_DRIVER_MISMATCH")),
        {"driver-error": ("580.95 does not start CUDA: CUDA_ERROR_SYSTEM_DRIVER_MISMATCH", "restart")},
    ),
    "a driver that ends the process": (
        gpu(driver=Driver(problem="it ended its process with SIGSEGV")),
        {"driver-error": ("the NVIDIA driver does not start CUDA: it ended", "restart")},
    ),
}

NOTES: Cases = {
    "nothing but Python": (
        Examination(machine="x86-64", packages={"torch": "2.13.0+cpu"}),
        {
            "onnxruntime-missing": ("runs and checks ONNX files", r"pip install 'deploynorm\[cpu\]'"),
            "library-missing": ("", "install g"),
            "tensorrt-missing": ("builds and runs engines", r"pip install 'deploynorm\[tensorrt\]'"),
            "driver-missing": ("everything here runs on the CPU", r"580\.65"),
        },
    ),
    "a machine without a GPU": (
        CPU_MACHINE,
        {
            "library-missing": (
                "TensorRT as one plugin",
                r"pip install 'deploynorm\[cuda\]', then deploynorm .*--cuda$",
            ),
            "tensorrt-missing": ("", ""),
            "driver-missing": ("", ""),
        },
    ),
    "libraries of other sources": (
        gpu(libraries=(ORT, TRAINING, REGISTER), stale=("/c/other",), tensorrt=(TensorRT("tensorrt", "10.14.1"),)),
        {
            "library-missing": (
                "libdeploynorm_trt.so is not built: .* of other sources",
                "^deploynorm plugins build --cuda$",
            )
        },
    ),
    "a clone that was changed after its installation": (
        gpu(libraries=libraries(origin="installed", outdated=True)),
        {"library-stale": ("installed before the sources in this clone", "plugins build --cuda")},
    ),
    "CUDA libraries lie where pip has put them": (
        gpu(providers=providers({"libcublas.so.13": "/v/nvidia/cu13/lib", "libcudnn.so.9": "/v/nvidia/cudnn/lib"})),
        {
            "cuda-libraries": (
                r"does not find libcublas\.so\.13, libcudnn\.so\.9",
                "LD_LIBRARY_PATH=/v/nvidia/cu13/lib:/v/nvidia/cudnn/lib$",
            )
        },
    ),
    "a GPU for which there is PTX alone": (
        gpu(libraries=libraries(code=(CudaCode("sm", (8, 0)), CudaCode("compute", (8, 0), 13)))),
        {"gpu-ptx": ("has sm_80, compute_80: for NVIDIA H100 .* compiles the PTX", "--architectures 90$")},
    ),
    "a GPU, and a library for the CPU alone": (
        gpu(libraries=libraries(code=()), nvcc=None),
        {"library-without-cuda": ("without CUDA", r"pip install 'deploynorm\[build,cuda\]', then deploynorm")},
    ),
    "a provider for a TensorRT that is not installed": (
        gpu(packages=packages(tensorrt=""), providers=providers({}, {"libnvinfer.so.10": None})),
        {"tensorrt-provider": ("it needs TensorRT 10", r"'tensorrt==10\.\*'")},
    ),
    "TensorRT-RTX with our plugin, and without the name that it asks for": (
        gpu(tensorrt=(TensorRT("tensorrt_rtx", "1.7.1", takes_plugin=True, nameless="/v/libtensorrt_rtx.so.1"),)),
        {"tensorrt-rtx-name": ("ends the process", "ln -s /v/libtensorrt_rtx.so.1 rtx/libtensorrt_rtx.so")},
    ),
    "onnxruntime-gpu on a machine without a GPU has no use for CUDA's libraries": (
        gpu(driver=Driver(), providers=providers({"libcublas.so.13": None, "libcudnn.so.9": "/v/nvidia/cudnn/lib"})),
        {"driver-missing": ("everything here runs on the CPU", "")},
    ),
    "a GPU that the environment hides": (
        gpu(driver=Driver("580.95", (13, 0), problem="CUDA_ERROR_NO_DEVICE"), visible_devices=""),
        {"driver-no-gpu": ("with CUDA_VISIBLE_DEVICES=$", "unset CUDA_VISIBLE_DEVICES")},
    ),
    "a driver without a GPU": (
        gpu(driver=Driver("580.95", (13, 0), problem="CUDA_ERROR_NO_DEVICE")),
        {"driver-no-gpu": ("offers no GPU$", "nvidia-smi")},
    ),
    "nvcc 12.4": (gpu(nvcc_release=(12, 4)), {"nvcc-old": (r"nvcc 12\.4", r"CUDA 12\.8 or later")}),
    "a GPU, and a torch for CPUs": (
        gpu(packages=packages(torch="2.13.0+cpu"), torch_cuda=None),
        {"torch-cpu": ("for CPUs only", "pytorch.org")},
    ),
}

NOTHING: dict[str, Examination] = {
    "everything is there and works": GPU_MACHINE,
    "onnxruntime 1.18 beside NumPy 1": gpu(packages=packages(numpy="1.26.4"), onnxruntime=runtime(version="1.18.0")),
    "onnxruntime 1.18 that NumPy 2 does not hinder": gpu(onnxruntime=runtime(version="1.18.0+rebuilt")),
    "onnxruntime 1.100": gpu(onnxruntime=runtime(version="1.100.0")),
    "onnxruntime-extensions beside it": gpu(packages=packages(onnxruntime_extensions="0.15.2")),
    "onnxruntime from no package": gpu(onnxruntime=runtime(packages=())),
    "a driver newer than all": gpu(driver=Driver("700.1", (15, 2), (H100,))),
    "a driver older than a library within one major version of CUDA": gpu(
        driver=CUDA_12,
        torch_cuda="12.9",
        providers=(Provider("cuda", ("libcudart.so.12",)),),
        libraries=(*MADE_FOR_CUDA_12, replace(PLUGIN, code=(SM_90,))),
    ),
    "machine code of an earlier device of the generation": gpu(driver=Driver("580.95", (13, 0), (RTX_4090,))),
    "a processor of which nothing is known": gpu(machine=None),
    "TensorRT 10 that the loader does not find, since Python's module loads it": gpu(
        providers=providers({}, {"libnvinfer.so.10": "/v/tensorrt_libs"})
    ),
    "TensorRT 10 and 11 by the names of their packages": gpu(
        packages=packages(tensorrt_cu13="11.4.0"), providers=providers({}, {"libnvinfer.so.10": None})
    ),
    "TensorRT 11 for engines, and 10 on the loader's path for the provider": gpu(
        packages=packages(tensorrt="11.4.0"), tensorrt=(TensorRT("tensorrt", "11.4.0", takes_plugin=True),)
    ),
    "TensorRT-RTX without our plugin has no need of the name": gpu(
        tensorrt=(TensorRT("tensorrt_rtx", "1.7.1", nameless="/v/libtensorrt_rtx.so.1"),)
    ),
}


@pytest.mark.parametrize("name", [*BROKEN, *NOTES, *NOTHING])
def test_what_is_broken_or_missing_is_reported_with_its_remedy_and_nothing_else(name: str) -> None:
    facts, findings = (NOTHING[name], {}) if name in NOTHING else (BROKEN | NOTES)[name]
    diagnosis = diagnose(facts)
    found = list(diagnosis.findings)
    assert {finding.name for finding in found} == set(findings), found
    assert len(set(found)) == len(found), "two GPUs of one kind are one finding"
    for finding in found:
        problem, remedy = findings[finding.name]
        assert re.search(problem, finding.problem), finding
        assert re.search(remedy, finding.remedy), finding
        for text in (finding.problem, finding.remedy):
            assert text == text.strip().rstrip("."), finding
            assert "\n" not in text, finding
    assert any(finding.level == "broken" for finding in found) is (name in BROKEN)
    assert bool(diagnosis) is (name not in BROKEN)
    assert found == sorted(found, key=lambda finding: finding.level != "broken"), "what is broken comes first"


def test_every_failure_of_the_list_has_a_case() -> None:
    listed = set(re.findall(r"`([a-z-]+)`", diagnosis_module.__doc__ or ""))
    tested = {name for _, findings in (BROKEN | NOTES).values() for name in findings}
    assert len(listed) > 15
    assert listed <= tested
