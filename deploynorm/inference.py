"""Running a network of any kind on files: arrays and images in, classes and arrays out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from deploynorm.dtypes import HALF, numpy_dtype
from deploynorm.errors import InputError
from deploynorm.files import as_path, onnx_companions, staging
from deploynorm.image import ImageSpec
from deploynorm.inputs import TensorSpec, parse_named_file
from deploynorm.manifest import check_unchanged
from deploynorm.memory import check_fits
from deploynorm.onnx_file import OnnxFile
from deploynorm.run import BACKENDS, ENGINE_SUFFIXES, open_runner
from deploynorm.run.base import Runner
from deploynorm.tables import table

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from deploynorm.network import Reading

_ARRAY_ENDINGS = (".npy", ".npz")
_Array = npt.NDArray[Any]

_NO_IMAGE = (
    "pass a .npy file, or export with --mean and --std; where a tool has dropped what the file said, "
    "deploynorm rewrite --restore ORIGINAL"
)


@dataclass(frozen=True, eq=False)
class Result:
    """The outputs of one run on some files, and of an output with class names the most likely ones of each image."""

    input: str
    outputs: Mapping[str, _Array]
    classes: Mapping[str, list[list[dict[str, Any]]]]

    def summary(self) -> dict[str, Any]:
        """For each output its classes, or else its shape, type and range."""
        found: dict[str, Any] = {}
        for name, value in self.outputs.items():
            if name in self.classes:
                found[name] = self.classes[name]
                continue
            found[name] = {"shape": list(value.shape), "dtype": value.dtype.name}
            if value.size and value.dtype.kind != "c":
                wide = value.astype(np.float64) if value.dtype.name in HALF else value
                found[name] |= {key: float(getattr(wide, key)()) for key in ("min", "max", "mean")}
        return found

    def __str__(self) -> str:
        summary = self.summary()
        rankings = [ranking for name in self.classes for ranking in summary.pop(name)]
        rows = [[(entry["label"], f"{entry['probability']:.1%}") for entry in ranking] for ranking in rankings]
        tables = [table(self.input, ("class", "probability"), each) for each in rows]
        if summary:
            columns = ("output", "shape", "dtype", "min", "max", "mean")
            cells = [[name, *(_cell(value.get(key, "-")) for key in columns[1:])] for name, value in summary.items()]
            tables.append(table(self.input, columns, cells))
        return "\n\n".join(tables)


def _joined(name: str, values: Sequence[_Array]) -> _Array:
    """An output of several images along the batch, or a scalar of each one after the other."""
    if len(values) == 1:
        return values[0]
    try:
        return np.stack(values) if values[0].ndim == 0 else np.concatenate(values)
    except ValueError as error:
        problem, got = f"output {name!r} has another shape for each image", ", ".join(str(x.shape) for x in values[:4])
        raise InputError("run", problem, got=got, fix="run the images one by one") from error


def _cell(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, eq=False)
class Inference:
    """What a network gave for some files: a result for each image, or one for all arrays; `print` shows their tables.

    Attributes:
        runner: Name of the backend.
        notes: How the file was read, and what was converted.
        inputs: The files that were read, which no output is to overwrite.
    """

    runner: str
    results: tuple[Result, ...]
    notes: tuple[str, ...]
    inputs: tuple[Path, ...] = ()

    def __str__(self) -> str:
        return "\n\n".join([*map(str, self.results), *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        results = [{"input": result.input, "outputs": result.summary()} for result in self.results]
        return {"runner": self.runner, "results": results}

    def save(self, path: Path | str) -> Path:
        """Writes the outputs to an .npz file, those of several images one after the other along the batch.

        bfloat16 is written as float32, since NumPy's files do not have it. InputError where the path is that of a file
        that was read, or cannot be written to.
        """
        path = Path(path)
        whole: dict[str, Any] = {}
        for name in self.results[0].outputs if self.results else ():
            value = _joined(name, [result.outputs[name] for result in self.results])
            whole[name] = value.astype(np.float32) if value.dtype.name == "bfloat16" else value
        with staging(path, inputs=self.inputs) as folder, (folder / path.name).open("wb") as file:
            np.savez(file, **whole)  # a file, since to a path it would add an ending of its own
        return path


def run_on_files(
    model: str | Path,
    files: Sequence[str],
    *,
    backend: str | None = None,
    providers: Sequence[str] = ("cpu",),
    plugins: Sequence[Path] | None = None,
    trust_engine: bool = False,
    accept_changed: bool = False,
    top: int = 5,
    **reading: Unpack[Reading],
) -> Inference:
    """Runs an ONNX file, a TensorRT engine or a network on arrays and images; what `deploynorm run` does.

    Images without a name are fed one after the other. Arrays, and files with a name, are fed together.

    Args:
        model: An ONNX file, an engine, or a file that `deploynorm.load` reads.
        files: .npy, .npz or image files; NAME=FILE for a named input. Float arrays are cast to a half input's type.
        backend, providers, plugins, trust_engine: See `deploynorm.open_runner`; backend "eager" for a network.
        accept_changed: Run an ONNX file that is not the one that its manifest was written for; a warning says so.
        top: How many classes are listed for each image.
        reading: For a network, its file and input shapes: see `deploynorm.convert`.

    Raises:
        InputError: A file cannot be read or does not fit the network, or options do not fit the model.
        ModelError: The model cannot be read or run.
        BackendError: The backend is missing.
    """
    _check_top(top)
    model = as_path("run", model)
    is_file = model.suffix in (".onnx", *ENGINE_SUFFIXES)
    if backend == "eager" and is_file:
        raise InputError("--backend", f"eager runs a network, not an ONNX file or engine ({model.suffix})", got=model)
    if backend == "eager" or (backend is None and not is_file):
        from deploynorm.network import Network  # an ONNX file runs where torch is not installed
        from deploynorm.run.eager import EagerRunner

        network = Network.of(model, **reading)
        # Nothing is known of the sizes that it takes, so any may be tried.
        free = [
            TensorSpec(x.name, tuple("?" if axis != 1 else size for axis, size in enumerate(x.shape)), x.dtype)
            for x in network.inputs
        ]
        runner: Runner = EagerRunner(network.model, free, arguments=network.examples.arguments)
        image, labels, notes = network.image, network.labels, list(network.notes)
    else:
        notes = []
        runner, image, labels = _open_file(model, backend, providers, plugins, trust_engine, accept_changed)
    results = []
    with runner:
        for name, given in _feeds(files, runner, image):
            got = runner.infer(_as_declared(runner, given, notes))
            classes = {
                output: [_classes(row, labels, top) for row in value]
                for output, value in got.items()
                if labels is not None and value.ndim == 2 and value.shape[1] == len(labels)
            }
            results.append(Result(name, got, classes))
            notes += [
                f"{output} is bfloat16, and written as float32, since NumPy's files do not have it"
                for output, value in got.items()
                if value.dtype.name == "bfloat16"
            ]
    read = (model, *onnx_companions(model), *(Path(parse_named_file(text)[1]) for text in files))
    return Inference(runner.name, tuple(results), tuple(dict.fromkeys(notes)), read)


def _open_file(
    model: Path,
    backend: Any,
    providers: Sequence[str],
    plugins: Sequence[Path] | None,
    trust_engine: bool,
    accept_changed: bool,
) -> tuple[Runner, ImageSpec | None, tuple[str, ...] | None]:
    """The runner of an ONNX file or engine, how images become its input, and the class names."""
    if model.suffix in ENGINE_SUFFIXES or (backend and BACKENDS[backend].runs == "engine"):
        from deploynorm.trt.manifest import image_and_labels

        runner = open_runner(model, "tensorrt", providers=providers, plugins=plugins, trust_engine=trust_engine)
        return runner, *image_and_labels(model)
    if model.suffix != ".onnx":
        fix = f"deploynorm export {model}"
        raise InputError("--backend", "an ONNX file is needed", got=f"{model} and {backend}", fix=fix)
    file = OnnxFile.read(model)
    check_unchanged(model, accept=accept_changed)
    return open_runner(file, backend, providers=providers, plugins=plugins), *file.image_and_labels


def _feeds(files: Sequence[str], runner: Runner, image: ImageSpec | None) -> Iterable[tuple[str, Mapping[str, _Array]]]:
    """What to run: each image on its own, or all files together where one is an array or has a name."""
    if not runner.inputs:
        raise InputError("run", "the model has no inputs, so that no file can be fed", got=", ".join(files))
    named = [parse_named_file(text) for text in files]
    inputs = [spec.name for spec in runner.inputs]
    if unknown := [name for name, _ in named if name and name not in inputs]:
        problem, expected = f"the model has no input {unknown[0]!r}", ", ".join(inputs)
        raise InputError("run", problem, got=", ".join(files), expected=expected)
    if not any(name or Path(text).suffix in _ARRAY_ENDINGS for name, text in named):
        return [(text, _read(text, inputs[0], image)) for _, text in named]
    feeds: dict[str, _Array] = {}
    for name, text in named:
        found = _read(text, name or inputs[0], image)
        if twice := sorted(set(found) & set(feeds)):
            problem = f"two files for input {twice[0]!r}"
            raise InputError("run", problem, got=", ".join(files), fix="name them: NAME=FILE")
        feeds.update(found)
    return [(", ".join(text for _, text in named), feeds)]


def _read(path: str, name: str, image: ImageSpec | None) -> dict[str, _Array]:
    """The arrays of a file by input: those of an .npz by their own names, any other under the name given."""
    if not Path(path).exists():
        raise InputError(f"input {path}", "no such file", fix="check the path")
    if not Path(path).is_file():  # a fifo would be waited for
        raise InputError(f"input {path}", "not a regular file", fix="pass a .npy, .npz or image file")
    if Path(path).suffix not in _ARRAY_ENDINGS:
        if image is None:
            problem = "the model does not say how an image becomes its input"
            raise InputError("run", problem, got=path, fix=_NO_IMAGE)
        return {name: image.read(path)}
    try:
        content = np.load(path, allow_pickle=False)
        if isinstance(content, np.ndarray):
            return {name: content}
        with content:  # whose arrays are read here, and not before
            check_fits(f"input {path}", sum(member.file_size for member in content.zip.infolist()), "its arrays")
            return dict(content)
    except InputError:
        raise
    except Exception as error:  # NumPy and zipfile raise nearly anything for a damaged file
        cause = str(error) or type(error).__name__
        raise InputError(f"input {path}", f"not an array file: {cause}", fix="save it with numpy.save") from error


def _as_declared(runner: Runner, feeds: Mapping[str, _Array], notes: list[str]) -> dict[str, _Array]:
    """The arrays, float32 and float64 ones in the half type of their input: NumPy's files have no bfloat16."""
    declared = {spec.name: spec.dtype for spec in runner.inputs}
    cast = dict(feeds)
    for name, value in feeds.items():
        dtype = declared.get(name)
        if dtype not in HALF or value.dtype not in (np.float32, np.float64):
            continue
        with np.errstate(over="ignore"):
            cast[name] = value.astype(numpy_dtype(dtype))
        if (np.isfinite(value) & ~np.isfinite(cast[name])).any():
            got = f"{np.abs(value[np.isfinite(value)]).max():.5g}"
            expected = f"at most {float(ml_dtypes.finfo(cast[name].dtype).max):.5g}"  # type: ignore[no-untyped-call]
            fix = "scale the input, or export in another type"
            raise InputError(f"input {name}", f"does not fit into {dtype}", got=got, expected=expected, fix=fix)
        notes.append(f"{name} is cast from {value.dtype.name} to {dtype}")
    return cast


def _check_top(top: object) -> None:
    """Raises InputError for a number of classes that none is."""
    if type(top) is not int or top < 1:
        raise InputError("--top", "not a number of classes", got=repr(top), expected="1 or more")


def _classes(scores: _Array, labels: tuple[str, ...], top: int) -> list[dict[str, Any]]:
    scores = scores.astype(np.float64)
    exponentials = np.exp(scores - scores.max())
    probabilities = exponentials / exponentials.sum()
    order = np.argsort(-probabilities, kind="stable")[:top]
    return [{"label": labels[index], "probability": float(probabilities[index])} for index in order]
