"""The rewriting passes. A new one takes one row here and one file with its function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

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
    """

    function: str
    suffix: str
    summary: str


PASSES: Final[Mapping[str, Pass]] = {
    "optimize_for_cpu": Pass(
        "deploynorm.rewrite.cpu.optimize_for_cpu",
        ".cpu.onnx",
        "for ONNX Runtime on this machine's processor, in float32",
    ),
}
"""By name, which is also the option of the command line: --optimize-for-cpu."""


def sequence(*passes: RewritePass) -> RewritePass:
    """One pass that runs several, each on the result of the one before."""

    def run(model: ir.Model, *, source_sha256: str | None = None) -> RewriteResult:
        result = passes[0](model, source_sha256=source_sha256)
        for each in passes[1:]:
            later = each(result.model, source_sha256=source_sha256)
            result = replace(later, changes=(*result.changes, *later.changes), before=result.before)
        return result

    return run
