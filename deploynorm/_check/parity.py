"""A network in float64 against what was made of it: the folded network, or an ONNX file in all runtimes at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import nn

from deploynorm._check.comparison import Report, check, parity_table
from deploynorm._export.precision import DTYPES, dtype_of, first_overflow, to_precision
from deploynorm.dtypes import numpy_dtype
from deploynorm.errors import BackendError, InputError, ModelError
from deploynorm.inputs import Shape, TensorSpec, with_sizes
from deploynorm.libraries import find_library
from deploynorm.network import Network
from deploynorm.onnx_file import OnnxFile
from deploynorm.ort import import_onnxruntime
from deploynorm.run import open_runner
from deploynorm.run.base import Runner
from deploynorm.run.eager import EagerRunner
from deploynorm.samples import sample_inputs

__all__ = ["Parity", "check_file", "check_folded", "check_onnx"]

_Array = npt.NDArray[Any]
_Sample = tuple[str, Mapping[str, _Array]]


@dataclass(frozen=True)
class Parity:
    """The checks of one network or file; true when there are any and all of them hold. `print` shows the table.

    Attributes:
        reports: One for each runtime.
        notes: What was not checked, and why.
        itself: Where a check is broken: the network in the type of the candidate, with nothing exported.
        advice: What follows from that.
    """

    reports: tuple[Report, ...]
    notes: tuple[str, ...] = ()
    itself: Report | None = None
    advice: str = ""

    def __bool__(self) -> bool:
        return bool(self.reports) and all(self.reports)

    def __add__(self, other: Parity) -> Parity:
        """The checks of both."""
        return Parity(
            (*self.reports, *other.reports),
            (*self.notes, *other.notes),
            other.itself if self.itself is None else self.itself,  # a broken report is false
            self.advice or other.advice,
        )

    def tables(self, verbose: bool = False) -> str:
        """The table of errors, and where a check is broken, how far off the network itself is.

        Args:
            verbose: Show each sample, and not only the worst of each output.
        """
        parts = [parity_table(self.reports, "Parity with the network in float64", verbose)]
        if self.itself is not None:
            parts.append(parity_table([self.itself], "For comparison, with nothing exported", verbose))
        parts += [self.advice] if self.advice else []
        return "\n\n".join(parts)

    def __str__(self) -> str:
        return self.tables()

    def to_dict(self) -> dict[str, Any]:
        """What JSON has of it."""
        return {"ok": bool(self), "checks": [report.to_dict() for report in self.reports], "notes": list(self.notes)}

    def raise_if_broken(self) -> None:
        """Raises ParityError for the first report that is broken."""
        for report in self.reports:
            report.raise_if_broken()


@dataclass(frozen=True)
class _Settings:
    """How a check is made."""

    seed: int = 0
    rtol: float | None = None
    atol: float | None = None


def check_folded(
    network: Network,
    folded: nn.Module,
    output_names: Sequence[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
) -> Parity:
    """The folded network in PyTorch against the network as given in float64, on inputs of the example's shape.

    Args:
        network: As given.
        folded: To be checked.
        output_names: Of its outputs, for the table.
        dtype: The type that it is folded in, where that is not the network's own.
        seed: Of the random inputs.
        rtol: See `deploynorm.check`.
        atol: Likewise.
    """
    wide = None if dtype == dtype_of(network.model) else dtype
    candidate = EagerRunner(folded, network.inputs, output_names, dtype=wide)
    candidate.name = f"folded, {candidate.name}"
    comparing = _Comparing(network, network.inputs, network.base, _Settings(seed, rtol, atol))
    return _explained(Parity((comparing.check(candidate),)), comparing, ())


def check_onnx(
    network: Network,
    model: Path | str | OnnxFile,
    *,
    backend: str | None = None,
    keep_float32: Sequence[str] = (),
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
) -> Parity:
    """An ONNX file against the network as given in float64, on several shapes inside the file's dynamic range.

    A file in half precision is judged by "half", which rounds every tensor. ONNX Runtime then shows that it loads: its
    CPU computes half graphs in float32, where nothing overflows.

    ONNX Runtime runs a file stock, and where it holds our operator, with our library too, if that is built: one file
    is to give the same numbers in both. A file without function bodies runs with the library only.

    Args:
        network: As given.
        model: The file, with its external data beside it.
        backend: "onnxruntime", "half" or "reference" alone; by default half and onnxruntime as above, or reference
            where onnxruntime is not installed.
        keep_float32: Layers that stayed in float32 in a half file, for the comparison of a broken check.
        seed: Of the random inputs.
        rtol: See `deploynorm.check`.
        atol: Likewise.

    Raises:
        ModelError: The file cannot be read or run.
        BackendError: The backend is missing.
        InputError: The file has other inputs than the network.
    """
    file, notes = OnnxFile.read(model), []
    if backend is None and not _has_onnxruntime():
        backend = "reference"
    comparing = _Comparing(network, (), network.base, _Settings(seed, rtol, atol), file.sizes)
    if backend in ("half", "reference"):
        return _explained(Parity((_check_file(file, backend, comparing),)), comparing, keep_float32)
    precision = file.half_type
    reports = [_check_file(file, "half", comparing)] if precision and backend is None else []
    ways: list[tuple[str, Sequence[Path] | None]] = []
    if not file.has_operator or file.has_body or find_library() is None:
        ways.append(("", []))
    if file.has_operator and find_library() is not None:
        ways.append((", deploynorm library", None))
    for suffix, plugins in ways:
        suffix += f", {precision} as float32" if precision else ""
        try:
            reports.append(_check_file(file, "onnxruntime", comparing, plugins, suffix))
        except BackendError as error:
            if precision is None or backend is not None:
                raise
            notes.append(f"onnxruntime cannot load it on the CPU: it {error.problem} ({error.got})")
            break
    return _explained(Parity(tuple(reports), (*notes, *comparing.notes)), comparing, keep_float32)


def check_file(
    model: str | Path | nn.Module,
    path: Path | str,
    example_inputs: Any = None,
    *,
    input_shapes: Mapping[str, Shape] | None = None,
    factory: str | None = None,
    factory_kwargs: Mapping[str, Any] | None = None,
    trust_pickle: bool = False,
    **options: Any,
) -> Parity:
    """An ONNX file against the network that it was made from; what `deploynorm check` does.

    Args:
        model: The network or its file, as for `deploynorm.convert`.
        path: The ONNX file.
        example_inputs: As for `deploynorm.convert`.
        input_shapes: Likewise.
        factory: Likewise.
        factory_kwargs: Likewise.
        trust_pickle: Likewise.
        options: See `check_onnx`.
    """
    network = Network.of(
        model,
        example_inputs,
        input_shapes=input_shapes,
        factory=factory,
        factory_kwargs=factory_kwargs,
        trust_pickle=trust_pickle,
    )
    return check_onnx(network, path, **options)


class _Comparing:
    """Candidates against one network in float64, which runs once for each sample."""

    def __init__(
        self,
        network: Network,
        inputs: Sequence[TensorSpec],
        base: Mapping[str, Shape],
        settings: _Settings,
        found: Mapping[str, Any] | None = None,
    ) -> None:
        self.network, self.inputs, self.settings = network, tuple(inputs), settings
        self.notes: list[str] = []
        self._base, self._found = base, found or {}
        self._samples: list[_Sample] = []
        self._wanted: dict[int, dict[str, _Array]] = {}
        self._precision: str | None = None

    def check(self, candidate: Runner) -> Report:
        if len(candidate.inputs) != len(self._base):
            raise InputError(
                candidate.name,
                "has another number of inputs than the network",
                got=", ".join(spec.name for spec in candidate.inputs),
                expected=", ".join(self._base),
            )
        if not self._samples or candidate.precision != self._precision or candidate.inputs != self.inputs:
            self._prepare(candidate)
        want = _Known(self._wanted, self.inputs, candidate.output_names)
        return check(candidate, want, self._samples, rtol=self.settings.rtol, atol=self.settings.atol)

    def _prepare(self, candidate: Runner) -> None:
        """Makes the samples that the network takes, and what it computes of them in float64."""
        self.inputs, self._precision = with_sizes(candidate.inputs, self._found), candidate.precision
        # A file may have been given other names than forward has: inputs are paired in order.
        base = {spec.name: shape for spec, shape in zip(self.inputs, self._base.values(), strict=True)}
        self._samples, self._wanted = [], {}
        with EagerRunner(self.network.model, self.inputs, dtype=torch.float64) as truth:
            for label, feeds in sample_inputs(self.inputs, seed=self.settings.seed, base=base):
                feeds = self._in_range(_rounded(feeds, candidate.precision))
                try:
                    want = truth.infer(feeds)
                except ModelError:
                    if not self._samples:
                        raise
                    self.notes.append(f"not checked on {label}, which the network itself refuses")
                    continue
                self._samples.append((label, feeds))
                self._wanted[id(feeds)] = want

    def _in_range(self, feeds: dict[str, _Array]) -> dict[str, _Array]:
        """Integers within the range of the example's, which may be the indices of a table."""
        for (name, x), example in zip(list(feeds.items()), self.network.examples, strict=True):
            if x.dtype.kind in "iu" and example.numel():
                low, high = int(example.min()), int(example.max())
                feeds[name] = (low + x % (high - low + 1)).astype(x.dtype)
        return feeds


class _Known(Runner):
    """What the network in float64 computed, by the inputs that it was given."""

    name = "eager float64"

    def __init__(
        self, wanted: Mapping[int, dict[str, _Array]], inputs: tuple[TensorSpec, ...], names: tuple[str, ...]
    ) -> None:
        self._wanted, self.inputs, self.output_names = wanted, inputs, names

    def infer(self, feeds: Mapping[str, _Array]) -> dict[str, _Array]:
        want = self._wanted[id(feeds)]
        return dict(zip(self.output_names, want.values(), strict=True)) if len(self.output_names) == len(want) else want

    def close(self) -> None:
        pass


def _explained(parity: Parity, comparing: _Comparing, keep_float32: Sequence[str]) -> Parity:
    """The checks, with how far off the network's own rounding is where one is broken.

    Some networks amplify rounding: FRN over maps of one or two pixels does, with random weights above all. The
    network in its own type, or in the half type of the candidate, is then as far from float64 as the candidate is, and
    no export could be nearer.
    """
    broken = [report for report in parity.reports if not report]
    if not broken:
        return parity
    network, precision = comparing.network, broken[0].precision
    model, inputs = network.model, network.inputs
    if precision is not None:
        model = to_precision(model, DTYPES[precision], keep_float32=keep_float32)
        inputs = tuple(TensorSpec(x.name, x.shape, precision if "float" in x.dtype else x.dtype) for x in inputs)
    with EagerRunner(model, inputs) as itself:
        itself.name = f"the network itself, {inputs[0].dtype}"
        own = _Comparing(network, inputs, network.base, comparing.settings).check(itself)
    advice = ""
    layer = None
    if not own and precision is not None:
        examples = [x.to(DTYPES[precision]) if x.is_floating_point() else x for x in network.examples]
        layer = first_overflow(model, examples)
    if layer is not None:
        advice = (
            f"In {precision} the output of layer {layer or '(the network)'} is not finite. Take bfloat16, or keep the "
            "network in float32 from there to where its values are small again (--keep-float32)."
        )
    elif not own:
        advice = "The network itself is as far off: it amplifies rounding. Try larger inputs or trained weights."
    return replace(parity, itself=own, advice=advice)


def _check_file(
    file: OnnxFile,
    backend: str,
    comparing: _Comparing,
    plugins: Sequence[Path] | None = None,
    suffix: str = "",
) -> Report:
    with open_runner(file, backend, plugins=plugins) as candidate:
        candidate.name += suffix
        return comparing.check(candidate)


def _rounded(feeds: dict[str, _Array], precision: str | None) -> dict[str, _Array]:
    """The inputs less what a half network would round away of them."""
    if precision is None:
        return feeds
    low = numpy_dtype(precision)
    return {name: x.astype(low).astype(x.dtype) if x.dtype.kind == "f" else x for name, x in feeds.items()}


def _has_onnxruntime() -> bool:
    try:
        import_onnxruntime()
    except BackendError:
        return False
    return True
