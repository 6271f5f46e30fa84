"""The rewriting passes. A new one takes one row here and one file with its function."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from deploynorm.packages import import_module

if TYPE_CHECKING:
    import onnx_ir as ir

    from deploynorm.rewrite.result import RewriteResult

__all__ = ["PASSES", "Pass", "RewritePass", "sequence"]


class RewritePass(Protocol):
    """What a pass is: a function of a model, which it leaves untouched."""

    def __call__(self, model: ir.Model, *, source_sha256: str | None = None) -> RewriteResult:
        """Rewrites a model.

        Args:
            model: A graph, of an ONNX file or of another pass.
            source_sha256: Of the file that the model was read from, for a note in the result.
        """
        ...


class Pass(NamedTuple):
    """One row of `PASSES`.

    Attributes:
        module: Where its function is; imported when it is first asked for.
        function: A `RewritePass`.
        suffix: The ending of the file that it makes by default.
        summary: What it does, for --help.
    """

    module: str
    function: str
    suffix: str
    summary: str

    def load(self) -> RewritePass:
        """Its function.

        Raises:
            BackendError: A package that it imports is not installed.
        """
        found: RewritePass = getattr(import_module(self.module), self.function)
        return found


PASSES: Final[Mapping[str, Pass]] = {
    "optimize_for_cpu": Pass(
        "deploynorm.rewrite.cpu",
        "optimize_for_cpu",
        ".cpu.onnx",
        "for ONNX Runtime on this machine's processor, in float32",
    ),
}
"""By name, which is also the option of the command line: --optimize-for-cpu."""


def sequence(*passes: RewritePass) -> RewritePass:
    """One pass that runs several, each on the result of the one before."""

    def run(model: ir.Model, *, source_sha256: str | None = None) -> RewriteResult:
        first, *others = [*passes]
        result = first(model, source_sha256=source_sha256)
        for each in others:
            result = result.then(each(result.model, source_sha256=source_sha256))
        return result

    return run
