"""nn.Module or model.pt -> an ONNX model that was checked against it."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import torch
from torch import nn

import deploynorm
from deploynorm._check.parity import Checks, Parity
from deploynorm._export import Exported, check_options, export
from deploynorm._export.names import as_names, as_patterns, by_argument
from deploynorm._export.precision import HALF, cast_floats, dtype_of, kept_layers, to_precision
from deploynorm._fold import FoldReport
from deploynorm._fold import fold as fold_network
from deploynorm.contract import METADATA_IMAGE, METADATA_LABELS, Lowering
from deploynorm.errors import InputError, ModelError
from deploynorm.files import as_path, is_stream, onnx_companions, scratch_folder, sha256, staging
from deploynorm.image import ImageSpec
from deploynorm.inputs import Shape, sizes_to_dict
from deploynorm.network import Network
from deploynorm.run.backends import ONNX_BACKENDS
from deploynorm.trace import Dynamic, ExampleInputs, Sizes, dynamic_places, find_sizes, inference_copy, repeats

_PACKAGES = ("torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "onnxruntime-gpu", "numpy")


@dataclass(frozen=True, eq=False)
class Conversion:
    """An exported model and what was found of it; true when every check holds. `print` shows all its tables.

    Attributes:
        exported: The model, its inputs and its notes.
        fold: What folding did; None where it was left out.
        parity: The checks: the folded network, then the file in each runtime at hand.
        network: What it was made from.
        function, seed: As given to `convert`.
    """

    exported: Exported
    fold: FoldReport | None
    parity: Parity
    network: Network
    function: bool
    seed: int

    def __bool__(self) -> bool:
        return bool(self.parity)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the file read, the sizes that the network takes, and what was not checked."""
        return (*self.network.notes, *self.exported.notes, *self.parity.notes)

    def tables(self, verbose: bool = False) -> str:
        """The layers folded, the nodes, the parity table and the notes; with `verbose` each layer and each sample."""
        parts = [] if self.fold is None else [self.fold.tables(verbose)]
        parts += [str(replace(self.exported, notes=())), self.parity.tables(verbose)]
        parts += ["\n".join(f"note: {note}" for note in self.notes)] if self.notes else []
        return "\n\n".join(part for part in parts if part)

    def __str__(self) -> str:
        return self.tables()

    __repr__ = __str__  # for notebooks, where the fields would fill pages

    def to_dict(self, file: Path | None = None) -> dict[str, Any]:
        """The manifest: what the model was made from, with which versions, what is in it, how an image becomes its
        input and what its classes are, and how it was checked; with the hashes of the file, where it was saved.
        """
        exported, checkpoint = self.exported, self.network.checkpoint
        if checkpoint is None:
            kind = type(self.network.model)
            source = {"class": f"{kind.__module__}.{kind.__qualname__}"}
        else:
            source = {"file": checkpoint.path.name}
            source |= {key: getattr(checkpoint, key) for key in ("sha256", "kind", "factory")}
        installed = {package: list(distributions(name=package)) for package in _PACKAGES}
        versions = {package: found[0].version for package, found in installed.items() if found}
        said = exported.model.metadata_props
        return {
            "deploynorm": deploynorm.__version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "source": source,
            "onnx": {
                **_hashes(file),
                "opset": exported.opset,
                "lowering": exported.lowering,
                "dtype": exported.dtype,
                "kept_float32": list(exported.kept_float32),
                "keep_io_types": exported.keep_io_types,
                "function": self.function,
                "inputs": [{"name": x.name, "shape": list(x.shape), "dtype": x.dtype} for x in exported.inputs],
                "outputs": list(exported.output_names),
                "nodes": dict(exported.node_counts()),
                "sizes": sizes_to_dict(exported.inputs, exported.notes),
                "notes": list(exported.notes),
            },
            # As the manifest of an engine has them, for a program that does not read ONNX files.
            "image": json.loads(said.get(METADATA_IMAGE, "null")),
            "labels": json.loads(said.get(METADATA_LABELS, "null")),
            "seed": self.seed,
            "versions": {"python": platform.python_version(), **versions},
            "fold": None if self.fold is None else self.fold.to_dict(),
            **self.parity.to_dict(),
        }

    def save(self, path: Path | str, *, external_data: bool | None = None) -> tuple[Path, ...]:
        """Writes model.onnx, and model.deploynorm.json with versions, hashes, sizes and checks; returns both paths.

        Args:
            path: The .onnx file. It is written beside and renamed when whole; an earlier one stays if that fails. A
                pipe or device gets the model alone.
            external_data: Weights in a file of their own; None does so past 2 GB.

        Raises:
            ParityError: A check does not hold; nothing is written.
            InputError: The path is that of the network's own file, or cannot be written to.
        """
        self.parity.raise_if_broken()
        path, checkpoint = as_path("Conversion.save", path), self.network.checkpoint
        inputs = () if checkpoint is None else (checkpoint.path,)
        _, record = companions = onnx_companions(path)
        with staging(path, inputs=inputs, companions=companions) as folder:
            self.exported.save(folder / path.name, external_data=external_data)
            if is_stream(path):
                return (path,)
            text = json.dumps(self.to_dict(folder / path.name), indent=2) + "\n"
            (folder / record.name).write_text(text, encoding="utf-8")
        return path, record


def convert(
    model: nn.Module | str | Path,
    example_inputs: ExampleInputs | None = None,
    *,
    input_shapes: Mapping[str, Shape] | None = None,
    input_dtypes: Mapping[str, str] | None = None,
    factory: str | None = None,
    factory_kwargs: Mapping[str, Any] | None = None,
    key: str | None = None,
    strip_prefix: str | None = None,
    trust_pickle: bool = False,
    fold: bool = True,
    dtype: torch.dtype | str | None = None,
    keep_float32: Sequence[str] = (),
    keep_io_types: bool = False,
    dynamic: Dynamic | None = None,
    opset: int | None = None,
    lowering: Lowering = "custom",
    function: bool = True,
    residual: bool = True,
    input_names: str | Sequence[str] | None = None,
    output_names: str | Sequence[str] | None = None,
    image: ImageSpec | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    labels: Sequence[str] | Path | None = None,
    freeze_buffers: bool = False,
    backend: str | None = None,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
) -> Conversion:
    """Folds a network, exports it to ONNX and checks the result; what `deploynorm export` does.

    1. Finds by running a copy which sizes of its inputs the network takes.
    2. Folds MABN, BatchNorm and weight centralisation (`deploynorm.fold`), and checks the folded network.
    3. Exports it (`deploynorm.export`).
    4. Checks the model on several of those sizes against the network in float64: in stock ONNX Runtime, and where it
       has FRN nodes with our operator library too. A model in half precision is run with every tensor rounded, and
       overflowing, as on a GPU.

    Args:
        model: A network, which is left as it is, or a file that `deploynorm.load` reads.
        example_inputs: See `deploynorm.export`; may be left out for a file.
        input_shapes: Shape of an input by name, "" for the only one, in place of `example_inputs`.
        input_dtypes: Type of an input by name ({"label": "int64"}); by default the network's own, or int64 where it
            refuses that.
        factory, factory_kwargs, key, strip_prefix, trust_pickle: For a file, see `deploynorm.load`.
        fold: False exports the network as it is.
        dtype, keep_float32, keep_io_types, dynamic, opset, lowering, function, residual, input_names, output_names: See
            `deploynorm.export`.
        image: How an image becomes the input; by default as the file has it. It is put into the model, for
            `deploynorm run`.
        mean, std: In place of `image`: of each channel, for images of the size of the first input.
        labels: Name of each class, or a text file with one a line; by default as the file has them.
        freeze_buffers: Accept that forward changes buffers: in the file each call starts from their values of now.
        backend: What runs the model for the check: see `deploynorm check`.
        seed: Of the random inputs of the check.
        rtol, atol: See `deploynorm.check`.

    Returns:
        The model and all that was found; nothing is written.

    Raises:
        InputError: An argument does not fit.
        ModelError: The file or the network cannot be read, traced or translated, or forward changes buffers.
        BackendError: A backend that was asked for is missing.
    """
    network = Network.of(
        model,
        example_inputs,
        input_shapes=input_shapes,
        input_dtypes=input_dtypes,
        factory=factory,
        factory_kwargs=factory_kwargs,
        key=key,
        strip_prefix=strip_prefix,
        trust_pickle=trust_pickle,
    )
    # What is wrong in an argument is reported at once.
    keep_float32 = as_patterns(keep_float32)
    new_checks = partial(Checks, network, keep_float32=keep_float32, seed=seed, rtol=rtol, atol=atol)
    new_checks()
    dtype, _ = check_options(dtype, opset, lowering)
    if backend is not None and backend not in ONNX_BACKENDS:
        raise InputError("convert", "unknown backend", got=repr(backend), expected=", ".join(ONNX_BACKENDS))
    kept_layers(network.model, keep_float32)
    input_names = as_names("input_names", input_names, len(network.names))
    names = network.names if input_names is None else network.examples.by_argument(input_names)
    dynamic = by_argument(dynamic, names, network.names)
    if dynamic is not None:
        dynamic_places(network.examples, dynamic)
    labels = network.labels if labels is None else _labels(labels)
    image = _image(network, image, mean, std)
    metadata = {}
    if image is not None:
        metadata[METADATA_IMAGE] = json.dumps(image.to_dict())
    if labels is not None:
        metadata[METADATA_LABELS] = json.dumps(labels)
    own, working, examples = dtype_of(network.model), network.model, network.examples
    tried, tensors = inference_copy(working), examples.replaced(example.cpu() for example in examples)
    sizes = find_sizes(tried, tensors) if dynamic != "none" else None
    if own in HALF and dtype not in (None, own) and (dtype == torch.float32 or not keep_io_types):
        # Folding in the network's own half type would round its weights once more.
        working = to_precision(working, torch.float32, keep_io_types=keep_io_types)
        examples = examples if keep_io_types else examples.replaced(cast_floats(examples, torch.float32))

    def attempt(sizes: Sizes | None) -> Conversion:
        checks = new_checks()
        folded, report = fold_network(working, examples, dynamic=dynamic, sizes=sizes) if fold else (working, None)
        exported = export(
            folded,
            examples,
            dtype=dtype,
            keep_float32=keep_float32,
            keep_io_types=keep_io_types,
            dynamic=dynamic,
            opset=opset,
            lowering=lowering,
            function=function,
            residual=residual,
            input_names=input_names,
            output_names=output_names,
            metadata=metadata,
            sizes=sizes,
        )
        kinds = set(exported.narrowed.values())
        if sizes is not None and sizes.kinds & kinds and report is not None and report.left:
            # These axes are fixed in the file, and with that what could not fold for their sake does.
            return attempt(sizes.fixed(kinds, f"it holds for some sizes only: {'; '.join(exported.narrowed)}"))
        _check_labels(labels, exported)
        if report is not None and report.modified:
            checks.add_folded(folded, exported.output_names, dtype_of(folded), exported.row_groups)
        with scratch_folder() as folder:
            path = folder / "model.onnx"
            exported.save(path)
            checks.add_file(path, backend)
        return Conversion(exported, report, checks.parity(), network, function, seed)

    result = _first_that_holds(attempt, sizes, narrow=dynamic is None)
    changed = result.exported.changed_buffers
    if changed and not freeze_buffers:
        problem = "forward changes buffers or parameters, and an ONNX file keeps nothing from one call to the next"
        fix = "pass freeze_buffers=True (--freeze-buffers), so that each call starts from their values of now"
        raise ModelError(type(network.model).__name__, problem, got=", ".join(changed), fix=fix)
    if not repeats(tried, tensors):
        problem = "the network computes something else from the same input the second time"
        fix = "do not let forward change attributes of the network: an ONNX file keeps nothing from call to call"
        raise ModelError(type(network.model).__name__, problem, fix=fix)
    return result


def _first_that_holds(attempt: Callable[[Sizes | None], Conversion], sizes: Sizes | None, narrow: bool) -> Conversion:
    """The conversion with all dynamic axes; where it fails at other sizes than the example's, one with fewer of them.

    Some operators are translated for the size of the example alone, or take no size that is not a plain number.
    """
    first: Conversion | ModelError
    try:
        first = attempt(sizes)
        if first or not first.parity.holds_first:
            return first
        problem = "the file is wrong"
    except ModelError as error:
        first, problem = error, error.problem
    for kinds in (("spatial",), ("batch", "spatial")):
        if narrow and sizes is not None and sizes.kinds & set(kinds):
            with suppress(ModelError):
                if result := attempt(sizes.fixed(kinds, f"at others {problem}")):
                    return result
    if isinstance(first, ModelError):
        raise first
    return first


def _image(
    network: Network, image: object, mean: Sequence[float] | None, std: Sequence[float] | None
) -> ImageSpec | None:
    if mean is None and std is None:
        if image is None or isinstance(image, ImageSpec):
            return network.image if image is None else image
        fix = "pass a deploynorm.ImageSpec; ImageSpec.from_dict makes one of a dict"
        raise InputError("convert", "image is no ImageSpec", got=repr(image), fix=fix)
    if image is not None or mean is None or std is None:
        raise InputError("convert", "mean and std belong together, in place of image", got=f"mean={mean}, std={std}")
    size: Any = network.examples.tensors[0].shape[1:]
    given: tuple[object, ...] = (mean, std)
    fields: Any = [tuple(values) if isinstance(values, Iterable) else values for values in given]
    return ImageSpec(tuple(map(int, size)), *fields)  # type: ignore[arg-type]


def _labels(labels: Sequence[str] | Path) -> tuple[str, ...]:
    if isinstance(labels, Path):
        try:
            lines = labels.read_text(encoding="utf-8").rstrip().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            problem = f"cannot be read: {error}"
            raise InputError(f"labels {labels}", problem, expected="text, one name a line") from error
        if not lines:
            raise InputError(f"labels {labels}", "the file names no class", expected="text, one name a line")
        return tuple(lines)
    given: object = labels
    names = tuple(given) if isinstance(given, Iterable) and not isinstance(given, str) else ()
    if not names or any(not isinstance(name, str) for name in names):
        raise InputError("convert", "labels are not the names of classes", got=repr(labels), expected="a list of text")
    return names


def _check_labels(labels: tuple[str, ...] | None, exported: Exported) -> None:
    """Raises InputError where the network has outputs of classes, and none of as many classes as there are labels."""
    classes = [v.shape[1] for v in exported.model.graph.outputs if v.shape is not None and len(v.shape) == 2]
    counts = [size for size in classes if isinstance(size, int)]
    if labels is not None and counts and len(labels) not in counts:
        raise InputError("convert", "another number of labels than classes", got=len(labels), expected=counts[0])


def _hashes(file: Path | None) -> dict[str, Any]:
    if file is None:
        return {}
    data, _ = onnx_companions(file)
    external = {"file": data.name, "sha256": sha256(data)} if data.exists() else None
    return {"file": file.name, "sha256": sha256(file), "external_data": external}
