"""ONNX file -> ONNX file, checked: what `deploynorm rewrite` does."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploynorm.contract import METADATA_CPU
from deploynorm.errors import InputError, ModelError
from deploynorm.files import as_path, onnx_companions, scratch_folder, sha256, staging
from deploynorm.inputs import Shape
from deploynorm.libraries import find_library
from deploynorm.packages import load
from deploynorm.rewrite.passes import load_pass, row, sequence
from deploynorm.run import open_runner

if TYPE_CHECKING:
    from deploynorm._check import Report
    from deploynorm.onnx_file import OnnxFile
    from deploynorm.rewrite.result import RewriteResult


@dataclass(frozen=True)
class Rewritten:
    """A rewritten file and its check, which makes it true or false; `print` shows both.

    Attributes:
        source: The file as it was read.
        passes: Names in `PASSES`, in the order in which they ran.
        result: The rewritten graph, and what became of each node.
        parity: The check against the source; None where nothing was rewritten.
    """

    source: OnnxFile
    passes: tuple[str, ...]
    result: RewriteResult
    parity: Report | None

    def __bool__(self) -> bool:
        return self.is_source if self.parity is None else bool(self.parity)

    def __str__(self) -> str:
        return self.tables()

    @property
    def is_source(self) -> bool:
        """Whether nothing was to be done, and the file is what it was."""
        return self.parity is None and not any(row(name).needs_change for name in self.passes)

    @property
    def machine(self) -> dict[str, Any] | None:
        """The machine that the file is for, as its metadata has it; None for one that runs anywhere."""
        note = self.result.model.metadata_props.get(METADATA_CPU)
        return None if note is None else dict(json.loads(note))

    def tables(self, verbose: bool = False) -> str:
        """What was rewritten, and the errors of the check: of each sample (verbose), or the worst of each output."""
        from deploynorm._check import parity_table

        if self.parity is None:
            return str(self.result)
        return f"{self.result}\n\n{parity_table([self.parity], f'Parity with {self.source.where}', verbose)}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "rewrite": ", ".join(self.passes),
            "machine": self.machine,
            "nodes": {"before": dict(self.result.before), "after": dict(self.result.after)},
            "changes": [change._asdict() for change in self.result.changes],
            "checks": [] if self.parity is None else [self.parity.to_dict()],
        }

    def save(self, path: Path | str | None = None, *, external_data: bool | None = None) -> str:
        """Writes the file, by default beside the source, and says what was written and for which machine.

        Raises:
            ModelError: Nothing was rewritten.
            ParityError: It does not compute what its source does.
            InputError: The path is the source itself, which other machines need, or cannot be written to.
        """
        from deploynorm.onnx_file import save

        source = self.source.path
        if path is None:
            if source is None:
                raise InputError("rewrite", "a model in memory gives no name to its file", fix="pass a path to save")
            path = source.with_suffix(row(self.passes[-1]).suffix)
        path = as_path("save", path)
        if self.parity is None and not self.is_source:
            problem = "nothing in it can be rewritten, for the reasons above"
            raise ModelError(self.source.where, problem, fix="use it as it is")
        if self.parity is not None:
            self.parity.raise_if_broken()
        with staging(path, inputs=(*self.source.files, *self.result.read), companions=onnx_companions(path)) as folder:
            if self.is_source and source is not None and self.source.files == (source,) and not external_data:
                (folder / path.name).write_bytes(source.read_bytes())  # equal to the last byte
            else:
                save(self.result.model, folder / path.name, external_data=external_data)
        text = "wrote {path}, as MODEL is: nothing in it was to be rewritten" if self.is_source else "wrote {path}"
        if self.machine is not None:
            text += ", only for onnxruntime {onnxruntime} on {machine} processors with blocks of {block} channels"
        return text.format(path=path, **self.machine or {})


def rewrite(
    model: str | Path | OnnxFile,
    passes: Sequence[str] = ("optimize_for_cpu",),
    *,
    input_shapes: Mapping[str, Shape] | None = None,
    accept_changed: bool = False,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
) -> Rewritten:
    """Rewrites an ONNX file and checks the result against it, on several shapes. Nothing is written before `save`.

    Args:
        model: A file that `deploynorm export` or another tool has written, or what OnnxFile.read has read.
        passes: Names in `PASSES`, in the order in which they run; "expand=primitives" with a choice,
            "restore=frn.onnx" with a file.
        input_shapes: A shape by input that the network takes, "" for the only one; by default what the metadata says.
        accept_changed: Take a file that is not the one that its manifest was written for; a warning says so.
        seed: Of the random inputs.
        rtol, atol: See `deploynorm.check`.

    Raises:
        InputError: An unknown pass, or the shape of an input is not known.
        ModelError: The file cannot be read, run or rewritten.
        BackendError: What a pass or the check needs is missing.
    """
    from deploynorm._check.comparison import check_known
    from deploynorm.onnx_file import OnnxFile, save
    from deploynorm.samples import sample_inputs

    names = [name.partition("=")[0] for name in passes]
    for name in passes or ["none"]:
        row(name)
    source = OnnxFile.read(model)
    source.begin(accept_changed=accept_changed, loose=not {"fuse", "surgery"}.intersection(names))
    load("deploynorm.rewrite.intake.check_graph")(source)
    run = sequence(*map(load_pass, passes))
    # Opening the source first reports what is wrong with it under its own name.
    alone = source.has_operator and not source.has_body and find_library() is None
    with scratch_folder() as folder:
        with open_runner(source, "reference" if alone else None) as truth:
            result = run(source.to_ir(), source_sha256=None if source.path is None else sha256(source.path))
            if not result.modified:
                return Rewritten(source, tuple(passes), result, None)
            save(result.model, folder / "rewritten.onnx")
            rewritten = OnnxFile.read(folder / "rewritten.onnx")  # which may know of more sizes than the source
            samples = sample_inputs(rewritten.inputs, seed=seed, base=input_shapes or rewritten.image_shape(batch=2))
            known = [(name, feeds, truth.infer(feeds)) for name, feeds in samples]
        # The source is closed, or large weights would be in memory twice.
        # A body that was put back is run, and not our kernel again.
        stock = "restore" in names and not source.has_body and rewritten.half_type is None
        with open_runner(rewritten, plugins=[] if stock and rewritten.has_body else None) as candidate:
            candidate.name = f"{candidate.name}, rewritten"
            parity = check_known(candidate, f"{truth.name}, as exported", known, rtol=rtol, atol=atol)
    return Rewritten(source, tuple(passes), result, parity)
