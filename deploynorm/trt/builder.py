"""One engine from one model: what TensorRT is asked for, and whether it did that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deploynorm import libraries
from deploynorm.contract import DOMAIN
from deploynorm.errors import BackendError, ModelError
from deploynorm.trt import (
    TensorRT,
    gpu_here,
    has_plugin,
    listen,
    load_library,
    load_plugin,
    load_stock_plugins,
    logger,
)
from deploynorm.trt.engine import Engine, FrnRecord
from deploynorm.trt.errors import Message, explain
from deploynorm.trt.importing import tensor_spec
from deploynorm.trt.layers import Layer, layers_of_inspector, layers_of_log, profiles_listed, types_of_products
from deploynorm.trt.manifest import origin
from deploynorm.trt.model import TensorRTModel
from deploynorm.trt.settings import HARDWARE_COMPATIBILITY, Settings, Way


def load_plugins(trt: TensorRT, settings: Settings, way: Way) -> tuple[Path, ...]:
    """The libraries, now in TensorRT's registry beside NVIDIA's own plugins."""
    load_stock_plugins(trt)
    if settings.plugins is None:
        if way == "native":
            return ()
        load_plugin(trt)
        library = libraries.find_library(libraries.TENSORRT_LIBRARY)
        return () if library is None else (library,)
    for path in settings.plugins:
        load_library(trt, Path(path))
    if way == "plugin" and not has_plugin(trt):
        raise BackendError("--plugins", "none of them brings our FRN plugin", got=", ".join(map(str, settings.plugins)))
    return tuple(map(Path, settings.plugins))


def build_way(trt: TensorRT, model: TensorRTModel, way: Way, settings: Settings, reason: str) -> Engine:
    """One engine, whose layers were checked to be what was asked for."""
    loaded = load_plugins(trt, settings, way)
    with listen() as heard:
        try:
            builder = trt.module.Builder(logger(trt))
        except (TypeError, RuntimeError) as error:  # raised where there is no driver
            raise explain("build", trt.name, heard or str(error)) from error
        network = _parse(trt, builder, model, way, heard)
        expected = _plugins_in(trt, network)
        built = [network.get_output(index) for index in range(network.num_outputs)]
        outputs = tuple(tensor_spec(tensor.name, tensor.shape, tensor.dtype) for tensor in built)
        config = _config(trt, builder, model, settings)
        notes = () if settings.timing_cache is None else _attach_timing_cache(config, settings.timing_cache)
        if settings.embed_plugin and loaded:
            config.plugins_to_serialize = [str(path) for path in loaded]
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise explain(model.file.where, trt.name, heard)
        content = bytes(plan)
        layers = layers_of_log(heard) or _inspect(trt, content)
        cache = None if settings.timing_cache is None else config.get_timing_cache()
    types, wrong = types_of_products(layers, model.products)
    if wrong:
        problem = f"{trt.name} built {len(wrong)} of {len(model.products)} products in another type than the graph has"
        fix = "please report it, with the file and the version of TensorRT"
        raise ModelError(model.file.where, problem, got=", ".join(wrong[:3]), fix=fix)
    taken = [layer for layer in layers if layer.plugin]
    times = profiles_listed(layers)
    if way == "plugin" and layers and len(taken) < expected * times:
        problem = f"{trt.name} did not keep the plugin for every FRN layer"
        raise ModelError(
            model.file.where, problem, got=len(taken), expected=expected * times, fix="build with --frn native"
        )
    ours = [layer for layer in taken if set(layer.nodes) & set(model.frn)]
    plugin_layers = len(ours or taken) // times if way == "plugin" else 0
    # Of a product that the layers do not tell of, what the graph says; TensorRT gives no layers, no type at all.
    precisions = {types.get(node, product.dtype) for node, product in model.products.items()}
    return Engine(
        plan=content,
        backend=trt.flavour,
        version=trt.version,
        compute_capabilities=settings.targets,
        inputs=model.file.inputs,
        profiles=tuple(settings.profiles),
        outputs=outputs,
        frn=FrnRecord(len(model.frn), way if model.frn else None, plugin_layers, reason),
        layers=layers,
        precision=None if not types else precisions.pop() if len(precisions) == 1 else "mixed",
        verified_products=len(types),
        products=len(model.products),
        tf32=settings.tf32,
        hardware_compatible=settings.hardware_compatible,
        version_compatible=settings.version_compatible,
        embedded=tuple(path.name for path in loaded) if settings.embed_plugin else (),
        timing_cache=None if cache is None else bytes(cache.serialize()),
        notes=notes,
        origin=origin(model.file, loaded),
        sources=model.file.files,
    )


def _parse(trt: TensorRT, builder: Any, model: TensorRTModel, way: Way, heard: Sequence[Message]) -> Any:
    """The network, with the plugin in it where that is the way."""
    flags = trt.module.NetworkDefinitionCreationFlag
    typed = getattr(flags, "STRONGLY_TYPED", None)  # the only kind since TensorRT 11
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.module.OnnxParser(network, logger(trt))
    try:
        content = model.prepared(way).SerializeToString()
    except ValueError as error:
        raise ModelError(model.file.where, "is past 2 GB in one piece", fix="export it with --external-data") from error
    read = parser.parse(content) if model.file.path is None else parser.parse(content, str(model.file.path))
    if not read:
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        said = [" ".join(f"{e.node_operator()} {e.node_name()}: {e.desc()}".split()) for e in errors]
        ours = [text for _, text in heard if text.startswith(f"{DOMAIN}::")]  # of a plugin the parser says no more
        raise explain(model.file.where, trt.name, "; ".join([*ours, *said]))
    for index in range(network.num_inputs):
        if network.get_input(index).is_shape_tensor:
            problem = f"input {network.get_input(index).name!r} holds sizes that other tensors take"
            fix = "export with those sizes fixed, or taken from a tensor's shape"
            raise ModelError(model.file.where, problem, fix=fix)
    found = _plugins_in(trt, network)
    if way == "plugin" and found < len(model.frn):
        problem = f"the parser of {trt.name} did not take the plugin for every FRN layer"
        raise ModelError(model.file.where, problem, got=found, expected=len(model.frn), fix="build with --frn native")
    return network


def _plugins_in(trt: TensorRT, network: Any) -> int:
    kinds = [network.get_layer(index).type for index in range(network.num_layers)]
    return kinds.count(trt.module.LayerType.PLUGIN_V3)


def _config(trt: TensorRT, builder: Any, model: TensorRTModel, settings: Settings) -> Any:
    module = trt.module
    config = builder.create_builder_config()
    config.profiling_verbosity = module.ProfilingVerbosity.DETAILED  # without it layers have no types
    if not settings.tf32:
        config.clear_flag(module.BuilderFlag.TF32)
    strict_nans = getattr(module.BuilderFlag, "STRICT_NANS", None)  # a NaN that goes in comes out
    if strict_nans is not None:
        config.set_flag(strict_nans)
    if settings.version_compatible:
        config.set_flag(module.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatible is not None:
        level = HARDWARE_COMPATIBILITY[settings.hardware_compatible]
        config.hardware_compatibility_level = getattr(module.HardwareCompatibilityLevel, level)
    if settings.workspace is not None:
        config.set_memory_pool_limit(module.MemoryPoolType.WORKSPACE, settings.workspace)
    if settings.optimization_level is not None:
        config.builder_optimization_level = settings.optimization_level
    if trt.rtx:
        names = [f"SM{text.replace('.', '')}" for text in settings.targets] if settings.named_targets else ["CURRENT"]
        config.num_compute_capabilities = len(names)
        for index, name in enumerate(names):
            config.set_compute_capability(getattr(module.ComputeCapability, name), index)
    free = [spec.name for spec in model.file.inputs if any(isinstance(size, str) for size in spec.shape)]
    for ranges in settings.profiles if free else ():
        profile = builder.create_optimization_profile()
        for name in free:
            profile.set_shape(name, *ranges[name])
        config.add_optimization_profile(profile)
    return config


def _attach_timing_cache(config: Any, content: bytes) -> tuple[str, ...]:
    """Gives the build a timing cache, and returns what there is to say of that: a refused one is no fault."""
    cache = config.create_timing_cache(content)
    if cache is not None and config.set_timing_cache(cache, False):
        return ()
    config.set_timing_cache(config.create_timing_cache(b""), False)
    return ("the timing cache was begun anew: the one given is of another GPU or another TensorRT",)


def _inspect(trt: TensorRT, plan: bytes) -> tuple[Layer, ...]:
    """The layers by TensorRT's inspector, which reads an engine on a GPU; empty where it cannot."""
    if gpu_here() is None:
        return ()
    with listen():
        runtime = trt.module.Runtime(logger(trt))
        runtime.engine_host_code_allowed = True  # this process has just built the plan, with the plugin inside
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            return ()
        inspector = engine.create_engine_inspector()
        return layers_of_inspector(inspector.get_engine_information(trt.module.LayerInformationFormat.JSON))
