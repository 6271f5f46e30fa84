"""A network in float64 against what was made of it: the folded network, or an ONNX file in all runtimes at hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy.typing as npt
import torch
from torch import nn

from deploynorm._check.comparison import Report, check_known, check_tolerances, parity_table
from deploynorm._export.precision import DTYPES, cast_floats, dtype_of, first_overflow, to_precision
from deploynorm.dtypes import numpy_dtype
from deploynorm.errors import BackendError, InputError, ModelError
from deploynorm.inputs import TensorSpec, with_sizes
from deploynorm.libraries import find_library
from deploynorm.losses import find_losses
from deploynorm.manifest import check_unchanged
from deploynorm.network import Network
from deploynorm.onnx_file import OnnxFile
from deploynorm.ort import import_onnxruntime
from deploynorm.run import open_runner
from deploynorm.run.base import Runner
from deploynorm.run.eager import EagerRunner
from deploynorm.samples import check_seed, sample_inputs
from deploynorm.trace import ExampleInputs

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from deploynorm.network import Reading

_Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Parity:
    """The checks of one network or file; true when there are any and all of them hold. `print` shows the table.

    Attributes:
        reports: One for each runtime.
        notes: How the network was read, where `check_file` read it, and what was not checked, and why.
        itself: Where a check is broken: the network in the type of the candidate, with nothing exported.
        advice: What follows from that.
    """

    reports: tuple[Report, ...]
    notes: tuple[str, ...] = ()
    itself: Report | None = None
    advice: str = ""

    def __bool__(self) -> bool:
        return bool(self.reports) and all(self.reports)

    @property
    def holds_first(self) -> bool:
        """Whether each check holds on its first sample, which has the sizes of the example."""
        return all(
            each.ok
            for report in self.reports
            for each in report.comparisons
            if each.sample == report.comparisons[0].sample
        )

    def tables(self, verbose: bool = False) -> str:
        """The table of errors, of the worst sample or with `verbose` of all, and what explains a broken check."""
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


def check_file(
    model: str | Path | nn.Module,
    path: Path | str,
    example_inputs: ExampleInputs | None = None,
    *,
    backend: str | None = None,
    accept_changed: bool = False,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
    **reading: Unpack[Reading],
) -> Parity:
    """An ONNX file against the network that it was made from; what `deploynorm check` does.

    Args:
        model: The network or its file. It, `example_inputs` and `reading` are those of `deploynorm.convert`.
        path: The ONNX file.
        backend: See `Checks.add_file`.
        accept_changed: Check a file that is not the one that its manifest was written for; a warning says so.
        seed: Of the random inputs.
        rtol, atol: See `deploynorm.check`.
    """
    if str(model).endswith(".onnx") and not str(path).endswith(".onnx"):
        raise InputError("check", "the network comes first, and the ONNX file second", got=f"{model} and {path}")
    file = OnnxFile.read(path)
    check_unchanged(Path(path), accept=accept_changed)
    network = Network.of(model, example_inputs, **reading)
    checks = Checks(network, seed=seed, rtol=rtol, atol=atol)
    checks.add_file(file, backend)
    parity = checks.parity()
    return replace(parity, notes=(*network.notes, *parity.notes, *map(str, find_losses(file))))


class Checks:
    """What was made of a network, against the network as given in float64, on inputs that both take.

    Args:
        network: As given.
        keep_float32: Layers that stayed in float32 in a half file, for the comparison of a broken check.
        seed: Of the random inputs.
        rtol, atol: See `deploynorm.check`.

    Raises:
        InputError: The seed or a tolerance is none.
    """

    def __init__(
        self,
        network: Network,
        *,
        keep_float32: Sequence[str] = (),
        seed: int = 0,
        rtol: float | None = None,
        atol: float | None = None,
    ) -> None:
        check_seed("check", seed)
        check_tolerances(rtol, atol)
        self._network, self._keep_float32, self._seed = network, keep_float32, seed
        self._tolerances = {"rtol": rtol, "atol": atol}
        self._reports: list[Report] = []
        self._notes: list[str] = []
        # What the last candidate was checked on, with what the network computes of it; the next may take the same.
        self._samples: list[tuple[str, dict[str, _Array], dict[str, _Array]]] = []
        self._made_for: tuple[tuple[TensorSpec, ...], str | None] | None = None
        self._truth_type: torch.dtype | None = torch.float64
        self._row_groups: tuple[tuple[str, ...], ...] = ()
        self._output_names: tuple[str, ...] = ()

    def add_folded(
        self,
        folded: nn.Module,
        output_names: Sequence[str] | None = None,
        dtype: torch.dtype | None = None,
        row_groups: tuple[tuple[str, ...], ...] = (),
    ) -> None:
        """Checks the folded network in PyTorch, on inputs of the example's shape.

        The output names are for the table, and row_groups of them are those of the export; dtype is that of folding,
        where it is not the network's own.
        """
        wide = None if dtype == dtype_of(self._network.model) else dtype
        inputs, arguments = self._network.inputs, self._network.examples.arguments
        with EagerRunner(folded, inputs, output_names, dtype=wide, arguments=arguments) as candidate:
            candidate.name = f"folded, {candidate.name}"
            candidate.row_groups = row_groups
            self._reports.append(self._check(candidate))

    def add_file(self, model: Path | str | OnnxFile, backend: str | None = None) -> None:
        """Checks an ONNX file, on several shapes inside its dynamic range.

        A file in half precision is judged by "half", which rounds every tensor. ONNX Runtime then shows that it loads:
        its CPU computes half graphs in float32, where nothing overflows.

        ONNX Runtime runs a file stock, and where it holds our operator, with our library too, if that is built: one
        file is to give the same numbers in both. A file without function bodies runs with the library only.

        Args:
            model: The file, with its external data beside it.
            backend: One of the backends of ONNX files alone; by default half and onnxruntime as above, or reference
                where onnxruntime is not installed.

        Raises:
            ModelError: The file cannot be read or run.
            BackendError: The backend is missing.
            InputError: The file has other inputs than the network.
        """
        file = OnnxFile.read(model)
        if backend is None:
            try:
                import_onnxruntime()
            except BackendError:
                backend = "reference"
        if backend not in (None, "onnxruntime"):
            self._add_runner(file, backend)
            return
        precision = file.half_type
        if precision and backend is None:
            self._add_runner(file, "half")
        with_library = file.has_operator and find_library() is not None
        ways: dict[str, Sequence[Path] | None] = {} if with_library and not file.has_body else {"": []}
        if with_library:
            ways[", deploynorm library"] = None
        for suffix, plugins in ways.items():
            suffix += f", {precision} as float32" if precision else ""
            try:
                self._add_runner(file, "onnxruntime", suffix, plugins)
            except BackendError as error:
                if precision is None or backend is not None:
                    raise
                self._notes.append(f"onnxruntime cannot load it on the CPU: it {error.problem} ({error.got})")
                break

    def parity(self) -> Parity:
        """The checks so far and, where one is broken, how far off the network's own rounding is.

        Some networks amplify rounding: FRN over maps of one or two pixels does, with random weights above all. The
        network in its own type, or in the half type of the candidate, is then as far from float64 as the candidate is,
        and no export could be nearer.
        """
        parity = Parity(tuple(self._reports), tuple(self._notes))
        broken = [report for report in parity.reports if not report]
        if not broken:
            return parity
        network, precision = self._network, broken[0].precision
        model, inputs, examples = network.model, network.inputs, network.examples
        if precision is not None:
            model = to_precision(model, DTYPES[precision], keep_float32=self._keep_float32)
            inputs = tuple(replace(x, dtype=precision) if "float" in x.dtype else x for x in inputs)
            examples = examples.replaced(cast_floats(examples, DTYPES[precision]))
        names = self._output_names if self._row_groups else None
        with EagerRunner(model, inputs, names, arguments=examples.arguments) as itself:
            itself.name = f"the network itself, {inputs[0].dtype}"
            itself.row_groups = self._row_groups
            own = self._check(itself)
        advice = ""
        if not own and precision is not None and (layer := first_overflow(model, examples)) is not None:
            advice = (
                f"In {precision} the output of layer {layer or '(the network)'} is not finite. Take bfloat16, or keep "
                "the network in float32 from there to where its values are small again (--keep-float32)."
            )
        elif not own:
            advice = "The network itself is as far off: it amplifies rounding. Try larger inputs or trained weights."
        return replace(parity, itself=own, advice=advice)

    def _add_runner(
        self, file: OnnxFile, backend: str, suffix: str = "", plugins: Sequence[Path] | None = None
    ) -> None:
        with open_runner(file, backend, plugins=plugins) as candidate:
            candidate.name += suffix
            self._reports.append(self._check(candidate, file.sizes))

    def _check(self, candidate: Runner, sizes: Mapping[str, Any] | None = None) -> Report:
        got, expected = [spec.name for spec in candidate.inputs], self._network.names
        if len(got) != len(expected):
            problem = "has another number of inputs than the network"
            raise InputError(candidate.name, problem, got=", ".join(got), expected=", ".join(expected))
        self._row_groups, self._output_names = candidate.row_groups, candidate.output_names
        if self._made_for != (candidate.inputs, candidate.precision):
            self._make_samples(candidate, sizes or {})
        names = candidate.output_names
        samples = [
            (label, feeds, dict(zip(names, want.values(), strict=True)) if len(names) == len(want) else want)
            for label, feeds, want in self._samples
        ]
        return check_known(candidate, "eager float64", samples, self._nearby, **self._tolerances)

    def _nearby(self, feeds: Mapping[str, _Array], eps: float, times: int) -> Iterator[Mapping[str, _Array]]:
        """See `EagerRunner.nearby`."""
        assert self._made_for is not None
        arguments, inputs = self._network.examples.arguments, self._made_for[0]
        with EagerRunner(self._network.model, inputs, dtype=self._truth_type, arguments=arguments) as truth:
            yield from truth.nearby(feeds, eps, times)

    def _make_samples(self, candidate: Runner, sizes: Mapping[str, Any]) -> None:
        """Inputs that the network and the candidate take, and what the network computes of them in float64."""
        inputs = with_sizes(candidate.inputs, sizes)
        # A file may have been given other names than forward has: inputs are paired in order.
        base = {spec.name: shape for spec, shape in zip(inputs, self._network.base.values(), strict=True)}
        self._samples, self._made_for, self._truth_type = [], (candidate.inputs, candidate.precision), torch.float64
        arguments = self._network.examples.arguments
        with ExitStack() as runners:
            run = partial(EagerRunner, self._network.model, inputs, arguments=arguments)
            truth = runners.enter_context(run(dtype=torch.float64))
            for label, feeds in sample_inputs(inputs, seed=self._seed, base=base):
                feeds = self._fitted(feeds, candidate.precision)
                try:
                    self._samples.append((label, feeds, truth.infer(feeds)))
                except ModelError as error:
                    if self._samples:
                        self._notes.append(f"not checked on {label}, which the network itself refuses")
                        continue
                    self._truth_type = None
                    truth = runners.enter_context(run())
                    self._samples.append((label, feeds, truth.infer(feeds)))
                    self._notes.append(f"compared with the network in its own types, since in float64 {error.problem}")

    def _fitted(self, feeds: Mapping[str, _Array], precision: str | None) -> dict[str, _Array]:
        """Floats that the half type holds exactly; integers, which may index a table, within the example's range."""
        fitted = dict(feeds)
        for (name, x), example in zip(feeds.items(), self._network.examples, strict=True):
            if x.dtype.kind == "f" and precision is not None:
                fitted[name] = x.astype(numpy_dtype(precision)).astype(x.dtype)
            elif x.dtype.kind in "iu" and example.numel():
                low, high = int(example.min()), int(example.max())
                fitted[name] = (low + x % (high - low + 1)).astype(x.dtype)
        return fitted
