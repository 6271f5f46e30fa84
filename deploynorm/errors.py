"""The exceptions of deploynorm; each carries the exit code that the command line returns for it."""

from __future__ import annotations

from collections.abc import Collection


class DeployNormError(Exception):
    """A fault that we foresee, in the form: where, what is wrong, got, expected, what to do.

    Args:
        where: The function, layer, file or graph node that found the fault.
        problem: What is wrong, in a few words and without a full stop.
        got: The offending value, if showing it helps.
        expected: What would have been accepted.
        fix: One action that fixes it.
    """

    exit_code = 2

    def __init__(
        self, where: str, problem: str, *, got: object = None, expected: object = None, fix: str | None = None
    ) -> None:
        self.where, self.problem, self.got, self.expected, self.fix = where, problem, got, expected, fix
        # Text taken from another library may bring its own full stop.
        sentences = [f"{where}: {problem.rstrip('.')}."]
        found = [f"{word} {value}" for word, value in (("got", got), ("expected", expected)) if value is not None]
        if found:
            text = "; ".join(found).rstrip(".")
            sentences.append(text[0].upper() + text[1:] + ".")
        if fix is not None:
            sentences.append(f"Fix: {fix}.")
        super().__init__(" ".join(sentences))


class InputError(DeployNormError, ValueError):
    """An argument or tensor has the wrong shape, rank, dtype or value."""


class ModelError(DeployNormError):
    """A model file or a network cannot be read, folded, exported or run as it stands."""


class BackendError(DeployNormError):
    """A package, library or device that the call needs is missing or too old."""

    exit_code = 3


class ParityError(DeployNormError):
    """Two forms of a network do not compute the same numbers."""

    exit_code = 1


def check_choice(where: str, problem: str, value: object, choices: Collection[str]) -> None:
    """Raises InputError for a value that is not one of the choices."""
    if value not in choices:
        raise InputError(where, problem, got=repr(value), expected=", ".join(choices))
