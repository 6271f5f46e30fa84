"""Run a network on arrays or images.

Takes an ONNX file, a TensorRT engine, or any model that `deploynorm export` takes. Images are prepared as the model
says, and their most likely classes are printed by name. Arrays are .npy files, one for each input, or one .npz with
all of them. A file in half precision takes float32 arrays too, and on the CPU runs with every tensor rounded as on a
GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploynorm.cli import options

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from deploynorm.cli.terminal import Terminal
    from deploynorm.inputs import ImageSpec
    from deploynorm.run.base import Runner

__all__ = ["add_arguments", "run"]

_ARRAY_ENDINGS = (".npy", ".npz")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "inputs", metavar="INPUT", nargs="+", help=".npy, .npz or image file; NAME=FILE where there are several inputs"
    )
    parser.add_argument("-o", "--output", type=Path, help="write the outputs to this .npz file")
    parser.add_argument("--top", type=int, default=5, help="classes to print for each image (default 5)")
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend",
        choices=("onnxruntime", "half", "reference", "tensorrt", "eager"),
        help="default onnxruntime for an ONNX file, half for one in half precision, tensorrt for an engine, else eager",
    )
    group.add_argument(
        "--provider",
        choices=("cpu", "cuda", "tensorrt"),
        action="append",
        help="of onnxruntime, the preferred first (default cpu)",
    )
    library = group.add_mutually_exclusive_group()
    library.add_argument(
        "--plugins", metavar="LIB", type=Path, action="append", help="operator libraries instead of ours"
    )
    library.add_argument("--stock", action="store_true", help="onnxruntime without our operator library")
    group.add_argument(
        "--trust-engine",
        action="store_true",
        help="let the plugin that is inside an engine run; only for files from a source you trust",
    )
    options.add_output_control(parser)


def run(arguments: argparse.Namespace) -> int:
    import numpy as np

    from deploynorm.cli.terminal import Terminal
    from deploynorm.files import staging

    terminal = Terminal(verbose=arguments.verbose, quiet=arguments.quiet)
    with terminal.step(f"reading {arguments.model}"):
        runner, image, labels = _open(arguments)
    results: list[dict[str, Any]] = []
    outputs: dict[str, list[npt.NDArray[Any]]] = {}
    with runner:
        for name, given in _feeds(arguments.inputs, runner, image):
            feeds = _as_declared(terminal, runner, given)
            with terminal.step(f"running {name}"):
                got = runner.infer(feeds)
            for output, value in got.items():
                outputs.setdefault(output, []).append(value)
            results.append({"input": name, "outputs": _tell(terminal, name, got, labels, arguments.top)})
    if arguments.output is not None:
        with staging(arguments.output) as folder:
            whole: dict[str, Any] = {name: np.concatenate(each) for name, each in outputs.items()}
            for name, value in whole.items():
                if value.dtype.name == "bfloat16":
                    terminal.line(f"note: {name} is written as float32, since NumPy's files have no bfloat16")
                    whole[name] = value.astype(np.float32)
            np.savez(folder / arguments.output.name, **whole)
    terminal.write_json(arguments.json, {"runner": runner.name, "results": results})
    return 0


def _open(arguments: argparse.Namespace) -> tuple[Runner, ImageSpec | None, tuple[str, ...] | None]:
    """The runner, how images become its input, and the class names."""
    from deploynorm.errors import InputError

    if arguments.model.suffix in (".engine", ".plan") or arguments.backend == "tensorrt":
        return _open_engine(arguments)
    if arguments.model.suffix == ".onnx":
        if arguments.backend == "eager":
            raise InputError("--backend", "eager runs a model, not an ONNX file", got=arguments.model)
        from deploynorm.cli.onnx_file import image_and_labels
        from deploynorm.run import open_runner

        runner = open_runner(
            arguments.model,
            arguments.backend,
            providers=arguments.provider or ("cpu",),
            plugins=[] if arguments.stock else arguments.plugins,
        )
        return runner, *image_and_labels(arguments.model)
    if arguments.backend not in (None, "eager"):
        raise InputError(
            "--backend",
            "an ONNX file is needed",
            got=f"{arguments.model} and {arguments.backend}",
            fix=f"deploynorm export {arguments.model}",
        )
    from deploynorm.cli.network import load_network
    from deploynorm.inputs import TensorSpec
    from deploynorm.run.eager import EagerRunner

    network = load_network(arguments)
    free = [TensorSpec(x.name, tuple("?" if axis != 1 else size for axis, size in enumerate(x.shape)), x.dtype)
            for x in network.inputs]  # fmt: skip
    return EagerRunner(network.model, free), network.checkpoint.image, network.checkpoint.labels


def _open_engine(arguments: argparse.Namespace) -> tuple[Runner, ImageSpec | None, tuple[str, ...] | None]:
    from deploynorm.cli.engine_manifest import image_and_labels_of_engine
    from deploynorm.errors import InputError
    from deploynorm.run import open_runner

    if arguments.backend not in (None, "tensorrt") or arguments.provider or arguments.stock:
        raise InputError(
            "run", "an engine runs on TensorRT, with no provider", got=arguments.model, fix="leave the options out"
        )
    plugins, trust = arguments.plugins, arguments.trust_engine
    runner = open_runner(arguments.model, "tensorrt", plugins=plugins, trust_engine=trust)
    return runner, *image_and_labels_of_engine(arguments.model)


def _feeds(
    inputs: list[str], runner: Runner, image: ImageSpec | None
) -> list[tuple[str, Mapping[str, npt.NDArray[Any]]]]:
    """What to run: each image on its own, or one set of arrays."""
    from deploynorm.errors import InputError

    only = runner.inputs[0].name
    named = [tuple(text.split("=", 1)) if "=" in text and not Path(text).exists() else ("", text) for text in inputs]
    arrays = [Path(text).suffix in _ARRAY_ENDINGS for _, text in named]
    if not any(arrays):
        if image is None:
            raise InputError(
                "run",
                "the model does not say how an image becomes its input",
                got=inputs[0],
                fix="pass a .npy file, or export from a checkpoint that has 'input' with shape, mean and std",
            )
        return [(text, {only: image.read(Path(text))}) for _, text in named]
    if not all(arrays):
        raise InputError("run", "arrays and images together", got=", ".join(inputs), fix="run them separately")
    feeds: dict[str, npt.NDArray[Any]] = {}
    for name, text in named:
        feeds.update(_read_arrays(Path(text), name or only))
    return [(", ".join(text for _, text in named), feeds)]


def _read_arrays(path: Path, name: str) -> dict[str, npt.NDArray[Any]]:
    import numpy as np

    from deploynorm.errors import InputError

    try:
        content = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"input {path}", f"not an array file: {error}", fix="save it with numpy.save") from error
    return {name: content} if isinstance(content, np.ndarray) else dict(content)


def _as_declared(
    terminal: Terminal, runner: Runner, feeds: Mapping[str, npt.NDArray[Any]]
) -> dict[str, npt.NDArray[Any]]:
    """The arrays, float32 and float64 ones in the half type of their input: NumPy's files have no bfloat16."""
    import ml_dtypes
    import numpy as np

    from deploynorm.errors import InputError

    declared = {spec.name: spec.dtype for spec in runner.inputs}
    cast = dict(feeds)
    for name, value in feeds.items():
        dtype = declared.get(name)
        if dtype not in ("float16", "bfloat16") or value.dtype not in (np.float32, np.float64):
            continue
        with np.errstate(over="ignore"):
            cast[name] = value.astype(getattr(ml_dtypes, dtype, dtype))
        if (np.isfinite(value) & ~np.isfinite(cast[name])).any():
            raise InputError(
                f"input {name}",
                f"does not fit into {dtype}",
                got=f"{np.abs(value[np.isfinite(value)]).max():.5g}",
                expected=f"at most {float(ml_dtypes.finfo(dtype).max):.5g}",  # type: ignore[no-untyped-call]
                fix="scale the input, or export in another type",
            )
        terminal.line(f"note: {name} is cast from {value.dtype.name} to {dtype}")
    return cast


def _tell(
    terminal: Terminal, name: str, got: Mapping[str, np.ndarray[Any, Any]], labels: tuple[str, ...] | None, top: int
) -> dict[str, Any]:
    """Prints the classes of a classifier's output, and what any other output looks like; returns the same."""
    import numpy as np

    told: dict[str, Any] = {}
    for output, value in got.items():
        if labels is not None and value.ndim == 2 and value.shape[1] == len(labels):
            told[output] = [_classes(row, labels, top) for row in value]
            for ranking in told[output]:
                rows = [(entry["label"], f"{entry['probability']:.1%}") for entry in ranking]
                terminal.table(name, ("class", "probability"), rows)
        else:
            told[output] = {"shape": list(value.shape), "dtype": value.dtype.name}
            if value.size:
                wide = value.astype(np.float64) if value.dtype.name in ("float16", "bfloat16") else value
                told[output] |= {key: float(getattr(wide, key)()) for key in ("min", "max", "mean")}
            terminal.table(name, ("output", *told[output]), [(output, *told[output].values())])
    return told


def _classes(scores: np.ndarray[Any, Any], labels: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    import numpy as np

    scores = scores.astype(np.float64)
    exponentials = np.exp(scores - scores.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [{"label": labels[index], "probability": float(probabilities[index])} for index in order]
