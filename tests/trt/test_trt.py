"""Importing TensorRT, hearing what it says, and putting our plugin into it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import Severity, fake_tensorrt
from rtx_builds import plugin_library

from deploynorm import libraries
from deploynorm.errors import BackendError, InputError
from deploynorm.trt import (
    FLAVOURS,
    RUNTIMES,
    TensorRT,
    has_plugin,
    import_tensorrt,
    listen,
    load_library,
    load_plugin,
    logger,
)


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """install(tensorrt="11.4.0") makes that the TensorRT of this machine, and what is not named not installed."""

    def install(**versions: str) -> None:
        for name in (module for package in FLAVOURS.values() for module in package.modules):
            module = fake_tensorrt(versions[name], name=name) if name in versions else None
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setattr("deploynorm.trt.importing._LOGGERS", {})
        monkeypatch.setattr("deploynorm.trt.plugins._LOADED", {})

    return install


@pytest.fixture
def fake(install: Callable[..., None]) -> TensorRT:
    install(tensorrt="11.4.0")
    return import_tensorrt()


def test_tensorrt_is_taken_where_both_are(install: Callable[..., None]) -> None:
    install(tensorrt="10.9.0", tensorrt_rtx="1.7.1")
    assert import_tensorrt().name == "TensorRT 10.9.0"
    assert import_tensorrt("tensorrt-rtx").name == "TensorRT-RTX 1.7.1"
    install(tensorrt_rtx="1.7.1")
    assert (import_tensorrt().flavour, import_tensorrt().rtx) == ("tensorrt-rtx", True)


def test_a_runtime_is_taken_where_tensorrt_is_not_and_it_will_do(install: Callable[..., None]) -> None:
    install(tensorrt_lean_bindings="10.16.1", tensorrt_dispatch="11.4.0")
    assert import_tensorrt("tensorrt", *RUNTIMES).name == "TensorRT's lean runtime 10.16.1"
    assert import_tensorrt("tensorrt-dispatch").name == "TensorRT's dispatch runtime 11.4.0"
    with pytest.raises(BackendError, match="cannot be imported"):  # for a build it will not do
        import_tensorrt()
    install(tensorrt="11.4.0", tensorrt_lean="10.16.1")
    assert import_tensorrt("tensorrt", *RUNTIMES).flavour == "tensorrt"
    install()
    with pytest.raises(
        BackendError, match="Fix: pip install tensorrt or, for version-compatible engines, pip install t"
    ):
        import_tensorrt("tensorrt", *RUNTIMES)


def test_what_is_missing_is_reported_with_how_to_get_it(install: Callable[..., None]) -> None:
    install()
    with pytest.raises(BackendError, match=r"tensorrt: .*tensorrt_rtx: .*Fix: pip install tensorrt or, for RTX cards"):
        import_tensorrt()
    install(tensorrt="11.4.0")
    with pytest.raises(BackendError, match=r"imported \(tensorrt_rtx: .*\)\. Fix: pip install tensorrt_rtx_cu13\."):
        import_tensorrt("tensorrt-rtx")


def test_libraries_of_its_own_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise OSError("libnvinfer.so.11: cannot open shared object file")

    monkeypatch.setattr("deploynorm.trt.importing.importlib.import_module", broken)
    with pytest.raises(BackendError, match=r"libnvinfer\.so\.11: cannot open shared object file"):
        import_tensorrt("tensorrt")


@pytest.mark.parametrize("version", ["8.6.1", "9.3.0", "12.0.0"])
def test_versions_that_we_do_not_know_are_refused(version: str, install: Callable[..., None]) -> None:
    install(tensorrt=version)
    with pytest.raises(BackendError, match=f"TensorRT {version} is a version that .* not know. Expected tensorrt 10"):
        import_tensorrt()


def test_an_unknown_flavour_is_refused() -> None:
    with pytest.raises(InputError, match="Got 'tensorflow'; expected tensorrt or tensorrt-rtx"):
        import_tensorrt("tensorflow")


def test_what_is_said_goes_to_those_who_listen(fake: TensorRT) -> None:
    say = logger(fake)
    assert logger(fake) is say  # TensorRT keeps the first that it is given
    say.log(Severity.ERROR, "before")
    with listen() as outer:
        say.log(Severity.ERROR, "one")
        with listen() as inner:
            say.log(Severity.WARNING, "two")
        say.log(Severity.INFO, "three")
    say.log(Severity.ERROR, "after")
    assert outer == [("ERROR", "one"), ("WARNING", "two"), ("INFO", "three")]
    assert inner == [("WARNING", "two")]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / libraries.TENSORRT_LIBRARY
    path.touch()
    monkeypatch.setattr(libraries, "library_path", lambda name: path)
    return path


@pytest.mark.parametrize("before", [0, 1], ids=["by us", "by the user before"])
def test_the_plugin_is_loaded_once(before: int, fake: TensorRT, library: Path) -> None:
    assert not has_plugin(fake)
    for _ in range(before):
        fake.module.registry.load_library(str(library))
    load_plugin(fake)
    load_plugin(fake)
    if not before:
        load_library(fake, library)
    assert has_plugin(fake)
    assert fake.module.registry.libraries == [str(library)]


def test_a_library_without_the_plugin_is_reported(fake: TensorRT, library: Path) -> None:
    fake.module.registry.brings = set()
    with pytest.raises(BackendError, match=f"{library.name}: does not bring the plugin"):
        load_plugin(fake)


def test_tensorrts_words_come_with_a_refusal(fake: TensorRT, library: Path) -> None:
    fake.module.Runtime(logger(fake))  # which is when TensorRT gets our logger
    fake.module.registry.load_library(str(library))
    with pytest.raises(BackendError, match=r"11\.4\.0 does not load this plugin library. Got .* loaded already"):
        load_library(fake, library)


@pytest.mark.usefixtures("without_library")
def test_a_plugin_that_is_not_built_is_reported(fake: TensorRT) -> None:
    with pytest.raises(BackendError, match="deploynorm plugins build --cuda"):
        load_plugin(fake)


def in_a_process(program: str, *folders: Path) -> Any:
    """What a program prints as JSON in its last line."""
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return json.loads(done.stdout.splitlines()[-1])


def test_the_real_tensorrt_rtx_takes_our_plugin(require: Callable[[str], None], request: pytest.FixtureRequest) -> None:
    require("trt-rtx")
    program = f"""
import json
from pathlib import Path
from deploynorm.trt import has_plugin, import_tensorrt, load_library, load_plugin
trt = import_tensorrt("tensorrt-rtx")
before = has_plugin(trt)
for _ in range(2):
    load_library(trt, Path({str(plugin_library(request))!r}))
load_plugin(trt)
print(json.dumps([before, has_plugin(trt)]))
"""
    assert in_a_process(program) == [False, True]


RUNTIME_NAMES = {
    "Runtime": "deserialize_cuda_engine engine_host_code_allowed",
    "ICudaEngine": """
        create_execution_context create_engine_inspector num_io_tensors get_tensor_name get_tensor_shape
        get_tensor_dtype get_tensor_mode get_tensor_location get_tensor_profile_shape num_optimization_profiles
    """,
    "IExecutionContext": """
        set_input_shape set_tensor_address set_output_allocator infer_shapes get_tensor_shape execute_async_v3
        set_optimization_profile_async
    """,
    "IPluginRegistry": "get_creator load_library",
    "IOutputAllocator": "",
    "TensorIOMode": "INPUT",
    "TensorLocation": "DEVICE",
    "LayerInformationFormat": "JSON",
    "ILogger": "log",
    "DataType": "FLOAT HALF BF16",
}
"""What we call of TensorRT when an engine runs."""

BUILDER_NAMES = {
    "Builder": "create_network create_builder_config create_optimization_profile build_serialized_network",
    "OnnxParser": "parse num_errors get_error",
    "ParserError": "node_operator node_name desc",
    "INetworkDefinition": "num_inputs get_input num_outputs get_output num_layers get_layer",
    "ITensor": "name shape dtype is_shape_tensor",
    "IBuilderConfig": """
        profiling_verbosity set_flag clear_flag hardware_compatibility_level set_memory_pool_limit
        builder_optimization_level set_timing_cache create_timing_cache get_timing_cache plugins_to_serialize
        add_optimization_profile
    """,
    "IOptimizationProfile": "set_shape",
    "BuilderFlag": "TF32 VERSION_COMPATIBLE",
    "HardwareCompatibilityLevel": "AMPERE_PLUS SAME_COMPUTE_CAPABILITY",
    "MemoryPoolType": "WORKSPACE",
    "ProfilingVerbosity": "DETAILED",
    "LayerType": "PLUGIN_V3",
    "ITimingCache": "serialize",
    "EngineInspector": "get_engine_information",
}
"""What we call when one is built."""

MISSING = """
import json, {module} as trt
print(json.dumps([f"{{kind}}.{{name}}" for kind, names in {names}.items() for name in ["__doc__", *names.split()]
                  if not hasattr(getattr(trt, kind, None), name)]))
"""


def test_every_name_that_we_call_is_in_tensorrt_rtx(require: Callable[[str], None]) -> None:
    require("trt-rtx")
    names = RUNTIME_NAMES | BUILDER_NAMES
    assert in_a_process(MISSING.format(module="tensorrt_rtx", names=names)) == []


def test_every_name_that_running_needs_is_in_tensorrt_10_and_11(require: Callable[[str], None]) -> None:
    """In their lean runtimes, which are what registries have; nobody there has the builder."""
    require("trt-lean")
    versions = set()
    for folder in map(Path, os.environ["TENSORRT_LEAN_DIRS"].split(os.pathsep)):
        for flavour, package in ((name, FLAVOURS[name]) for name in RUNTIMES):
            if (folder / package.modules[-1]).is_dir():
                program = MISSING.format(module=package.modules[-1], names=RUNTIME_NAMES)
                assert in_a_process(program, folder) == []
                found = f"__import__('deploynorm.trt').trt.import_tensorrt({flavour!r}).version.partition('.')[0]"
                versions.add((flavour, in_a_process(f"print({found})", folder)))
    assert versions >= {("tensorrt-lean", 10), ("tensorrt-lean", 11)}


def test_a_version_compatible_engine_of_tensorrt_10_is_for_the_lean_runtime_of_11_too(
    require: Callable[[str], None], tmp_path: Path
) -> None:
    require("trt-lean")
    for name, compatible in (("new", True), ("old", False)):
        (tmp_path / f"{name}.engine").write_bytes(b"a plan")
        record = {"engine": {"backend": "tensorrt", "version": "10.9.0", "version_compatible": compatible}}
        (tmp_path / f"{name}.engine.json").write_text(json.dumps(record))
    program = f"""
import json, sys
sys.modules["tensorrt"] = None
from deploynorm.errors import BackendError
from deploynorm.trt import import_tensorrt
from deploynorm.trt.source import EngineSource
said = []
for name, backends in (("new", ()), ("old", ()), ("old", ["tensorrt-lean"])):
    source = EngineSource.of(f"{tmp_path}/{{name}}.engine")
    try:
        trt = import_tensorrt(*(backends or source.backends))
        source.check_version(trt)
        said.append(trt.name)
    except BackendError as error:
        said.append(error.problem)
print(json.dumps(said))
"""
    [*_, newest] = os.environ["TENSORRT_LEAN_DIRS"].split(os.pathsep)
    runs, no_tensorrt, not_compatible = in_a_process(program, Path(newest))
    assert runs.startswith("TensorRT's lean runtime 11.")
    assert no_tensorrt.startswith("cannot be imported (tensorrt: ")
    assert not_compatible == f"is not version compatible, and {runs} runs no other engines"
