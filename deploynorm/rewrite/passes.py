"""The rewriting passes. A new one takes one row here and one file with its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from deploynorm.contract import LOWERINGS
from deploynorm.errors import InputError, check_choice
from deploynorm.packages import load

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploynorm.rewrite.result import RewriteResult

RewritePass: TypeAlias = "Callable[..., RewriteResult]"
"""pass(model, source_sha256=None). It leaves untouched the model, which was read from the file of that hash, or made
from it by another pass."""


class Pass(NamedTuple):
    """One row of `PASSES`.

    Attributes:
        function: A `RewritePass`, as `deploynorm.packages.load` finds it.
        suffix: The ending of the file that it makes by default.
        summary: What it does, for --help.
        choices: The values of its second argument, one of which is chosen: "expand=primitives".
        argument: What its second argument is, where it may be any text: "surgery=edit.py:shorten".
        needs_change: Whether a file in which it finds nothing to do is refused, and not written as it is.
    """

    function: str
    suffix: str
    summary: str
    choices: tuple[str, ...] = ()
    argument: str = ""
    needs_change: bool = False


PASSES: Final[Mapping[str, Pass]] = {
    "optimize_for_cpu": Pass(
        "deploynorm.rewrite.cpu.optimize_for_cpu",
        ".cpu.onnx",
        "for ONNX Runtime on this machine's processor, in float32",
        needs_change=True,
    ),
    "fuse": Pass(
        "deploynorm.rewrite.fuse.fuse",
        ".fused.onnx",
        "FRN in loose operators, whoever exported it, becomes one node",
    ),
    "fold": Pass(
        "deploynorm.rewrite.fold.fold",
        ".folded.onnx",
        "what stands behind convolutions for each channel (MABN, BatchNormalization) goes into their weights",
    ),
    "expand": Pass(
        "deploynorm.rewrite.expand.expand",
        ".expanded.onnx",
        "each FRN node becomes operators of ONNX",
        choices=tuple(name for name in LOWERINGS if name != "custom"),
    ),
    "surgery": Pass(
        "deploynorm.rewrite.surgery.surgery",
        ".surgery.onnx",
        "your function changes the graph, with onnx-graphsurgeon; FILE.py is run, so name only code you trust",
        argument="FILE.py:FUNCTION",
    ),
    "restore": Pass(
        "deploynorm.rewrite.restore.restore",
        ".restored.onnx",
        "what another tool has dropped from ORIGINAL, a file of ours, without a word: function bodies, names of "
        "operators, attributes, metadata",
        argument="ORIGINAL",
    ),
}
"""By name, which is also the option of the command line: --optimize-for-cpu, --expand primitives."""


def row(name: str) -> Pass:
    """The row of a pass that is named with its choice, if it has one; InputError for another name."""
    key, equals, choice = name.partition("=")
    check_choice("rewrite", "unknown pass", key, PASSES)
    found = PASSES[key]
    if found.choices:
        check_choice("rewrite", f"no choice of {key}", choice, found.choices)
    elif found.argument and not choice:
        raise InputError("rewrite", f"{key} needs an argument", got=repr(name), expected=f"{key}={found.argument}")
    elif equals and not found.argument:
        raise InputError("rewrite", f"{key} has no choices", got=repr(name), expected=key)
    return found


def load_pass(name: str) -> RewritePass:
    """The function of a pass, with its choice."""
    function: RewritePass = load(row(name).function)
    choice = name.partition("=")[2]
    return partial(_chosen, function, choice) if choice else function


def _chosen(function: RewritePass, choice: str, model: ir.Model, *, source_sha256: str | None = None) -> RewriteResult:
    return function(model, choice, source_sha256=source_sha256)


def sequence(*passes: RewritePass) -> RewritePass:
    """One pass that runs several, each on the result of the one before."""

    def run(model: ir.Model, *, source_sha256: str | None = None) -> RewriteResult:
        result = passes[0](model, source_sha256=source_sha256)
        for each in passes[1:]:
            later = each(result.model, source_sha256=source_sha256)
            result = replace(
                later,
                changes=(*result.changes, *later.changes),
                before=result.before,
                read=(*result.read, *later.read),
            )
        return result

    return run
