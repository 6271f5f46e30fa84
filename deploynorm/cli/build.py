"""Build a TensorRT engine from an ONNX file.

The engine has the types of the ONNX file: export with --dtype float16 for one in float16. TensorRT builds for the GPU
of this machine, TensorRT-RTX for the RTX cards that --compute-capability names, with or without a GPU. FRN layers
become our plugin or stay standard operators; `--frn auto` builds both, runs both where there is a GPU for it, and
keeps the faster. Beside the engine stands MODEL.engine.json, which tells what it was built from and what is in it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploynorm.cli import options

if TYPE_CHECKING:
    from deploynorm.cli.terminal import Terminal
    from deploynorm.inputs import Shape
    from deploynorm.trt.engine import Engine

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", type=Path, help="an ONNX file that deploynorm export has written")
    parser.add_argument("-o", "--output", type=Path, help="default: MODEL with the ending .engine")
    group = parser.add_argument_group("what the engine is for")
    group.add_argument(
        "--backend",
        choices=("auto", "tensorrt", "tensorrt-rtx"),
        default="auto",
        help="default: TensorRT where both are installed",
    )
    group.add_argument(
        "--compute-capability",
        metavar="X.Y",
        action="append",
        default=[],
        help="kind of GPU, as 8.9; TensorRT-RTX takes several (default: the GPU of this machine)",
    )
    group.add_argument(
        "--hardware-compatible", choices=("ampere+", "same"), help="GPUs besides this machine's (TensorRT alone)"
    )
    group.add_argument(
        "--version-compatible", action="store_true", help="for later versions of TensorRT too (TensorRT alone)"
    )
    group = parser.add_argument_group("shapes of inputs with free axes; one of the three is enough")
    for option, text in (("min", "smallest"), ("opt", "the one to be fast for"), ("max", "largest")):
        group.add_argument(f"--{option}-shapes", metavar="[NAME:]SHAPE", action="append", default=[],
                           help=f"{text}: x:1x3x64x64 or 1x3x64x64")  # fmt: skip
    group = parser.add_argument_group("how")
    group.add_argument(
        "--frn",
        choices=("auto", "plugin", "native"),
        default="auto",
        help="our plugin, or standard operators that TensorRT fuses (default: what is better)",
    )
    group.add_argument("--plugins", metavar="LIB", type=Path, action="append", help="plugin libraries instead of ours")
    group.add_argument(
        "--no-embed-plugin",
        action="store_true",
        help="leave the plugin library out: the engine runs only where ours is installed, and needs no --trust-engine",
    )
    group.add_argument("--tf32", action="store_true", help="let float32 products be rounded to 10 bits: faster")
    group.add_argument(
        "--timing-cache", metavar="FILE", type=Path, help="read where it exists, and written anew (TensorRT alone)"
    )
    group.add_argument("--workspace", metavar="MIB", type=int, help="scratch memory of a layer, in MiB (default: all)")
    group.add_argument("--optimization-level", metavar="0..5", type=int, help="how long to search")
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    from deploynorm._build import build
    from deploynorm.cli.engine_manifest import manifest
    from deploynorm.cli.terminal import Terminal
    from deploynorm.errors import InputError
    from deploynorm.files import staging
    from deploynorm.inputs import parse_input_shapes
    from deploynorm.trt.manifest import manifest_path

    terminal = Terminal(verbose=arguments.verbose, quiet=arguments.quiet)
    output: Path = arguments.output or arguments.model.with_suffix(".engine")
    if output.exists() and arguments.model.exists() and output.samefile(arguments.model):
        raise InputError("--output", "is MODEL itself", fix="choose another output file")
    shapes: dict[str, dict[str, Shape]] = {
        option: parse_input_shapes(getattr(arguments, option)) for option in ("min_shapes", "opt_shapes", "max_shapes")
    }
    with staging(output) as folder:
        with terminal.step("building"):
            engine = build(
                arguments.model,
                backend=arguments.backend,
                compute_capabilities=arguments.compute_capability,
                frn=arguments.frn,
                tf32=arguments.tf32,
                plugins=arguments.plugins,
                embed_plugin=not arguments.no_embed_plugin,
                timing_cache=_read_cache(arguments.timing_cache),
                workspace=None if arguments.workspace is None else arguments.workspace * 2**20,
                version_compatible=arguments.version_compatible,
                hardware_compatible=arguments.hardware_compatible,
                optimization_level=arguments.optimization_level,
                **_or_the_image(arguments.model, shapes),
            )
        _print_engine(terminal, engine)
        built = folder / output.name
        built.write_bytes(engine.plan)
        record = manifest(arguments, engine, built)
        Terminal.write_json(manifest_path(built), record)
        terminal.write_json(arguments.json, record)
    if arguments.timing_cache is not None and engine.timing_cache is not None:
        with staging(arguments.timing_cache) as folder:
            (folder / arguments.timing_cache.name).write_bytes(engine.timing_cache)
    terminal.line(f"wrote {output} and {manifest_path(output).name}")
    return 0


def _read_cache(path: Path | None) -> bytes | None:
    """The content of the timing cache; empty where the file is to be made."""
    from deploynorm.errors import InputError

    if path is None:
        return None
    try:
        return path.read_bytes() if path.exists() else b""
    except OSError as error:
        raise InputError(f"--timing-cache {path}", f"cannot be read: {error.strerror}") from error


def _or_the_image(model: Path, shapes: dict[str, dict[str, Shape]]) -> dict[str, dict[str, Shape]]:
    """The shapes as given; where none is, one image of the size that the model names."""
    if not any(shapes.values()) and model.is_file():
        from deploynorm.cli.onnx_file import image_and_labels, read_graph

        image, _ = image_and_labels(model)
        inputs = read_graph(model).graph.input
        if image is not None and len(inputs) == 1:
            batch = inputs[0].type.tensor_type.shape.dim[0]
            shapes["opt_shapes"] = {"": (batch.dim_value if batch.HasField("dim_value") else 1, *image.shape)}
    return shapes


def _print_engine(terminal: Terminal, engine: Engine) -> None:
    from deploynorm.trt.layers import layer_counts as table

    precision = engine.precision or "not told by TensorRT"
    if engine.precision is not None:
        precision += f" ({engine.verified_products} of {engine.products} products seen)"
    rows: list[tuple[str, Any]] = [
        ("for", f"{engine.backend} {engine.version}, compute capability {', '.join(engine.compute_capabilities)}"),
        ("type", precision + (", with TF32" if engine.tf32 and engine.precision == "float32" else "")),
        ("size", f"{len(engine.plan) / 2**20:.1f} MiB"),
    ]
    if engine.frn.way is not None:
        rows += [("FRN", f"{engine.frn.nodes} layers, {engine.frn.way}"), ("why", engine.frn.reason)]
    rows += [("plugins inside", ", ".join(engine.embedded))] if engine.embedded else []
    terminal.table("Engine", ("", ""), rows)
    terminal.table(
        "Shapes",
        ("input", "type", "in the graph", "min", "opt", "max"),
        ((x.name, x.dtype, *(_text(shape) for shape in (x.shape, *engine.ranges[x.name]))) for x in engine.inputs),
    )
    terminal.table("Layers", ("kind", "types", "count"), table(engine.layers))
    if terminal.verbose:
        terminal.table(
            "Each layer",
            ("layer", "kind", "types", "computes"),
            ((x.name, x.kind, ", ".join(x.dtypes) or "-", ", ".join(x.nodes) or "-") for x in engine.layers),
        )


def _text(shape: tuple[int | str, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
