"""What every backend offers: one protocol, and the check of what is fed to it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from deploynorm.errors import InputError
from deploynorm.inputs import TensorSpec

if TYPE_CHECKING:  # the command line lists the backends before it may import NumPy
    import numpy.typing as npt

_R = TypeVar("_R", bound="Runner")

CheckOne = Callable[[str, TensorSpec, Any], None]
"""Raises InputError where what is fed to an input is of a wrong kind or type."""


class Runner(Protocol):
    """A network that a backend runs on NumPy arrays. As a context manager it is closed at the end.

    `infer` of one runner may not be called from several threads at once.

    Attributes:
        name: Backend, device and type, as tables and messages show it.
        inputs: What `infer` takes. A string in a shape is a size that may change, one size wherever the name
            stands; "?" is independent of all others.
        output_names: What `infer` returns, in the network's order.
        precision: The half type that the network computes in, whatever type its outputs have; None of a network in
            full precision, or where it is not known.
        row_groups: Names of outputs whose number of rows depends on the values of the inputs, as that of the boxes that
            a detector finds: those that have a row for each of the same things together.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    output_names: tuple[str, ...]
    precision: str | None = None
    row_groups: tuple[tuple[str, ...], ...] = ()

    @classmethod
    def check_available(cls) -> None:
        """Raises BackendError where this machine lacks what every runner of this class needs."""
        return

    def infer(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        """Runs the network once.

        Args:
            feeds: One array for each of `inputs`; they are not changed.

        Returns:
            Arrays by output name, in the order of the network's outputs, that no later call changes.

        Raises:
            InputError: The feeds do not fit `inputs`, or the runner is closed.
            ModelError: The network cannot be run on these feeds.
        """
        ...

    def close(self) -> None:
        """Frees the network and its memory; a second call does nothing."""
        ...

    def __enter__(self: _R) -> _R:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def closed_error(where: str) -> InputError:
    """What `infer` raises after `close`."""
    return InputError(where, "the runner is closed", fix="call infer inside its with block, or make a new runner")


def check_feeds(
    where: str, specs: Sequence[TensorSpec], feeds: Mapping[str, Any], check: CheckOne | None = None
) -> None:
    """Raises InputError unless feeds holds exactly the tensors that specs describe, by name, type, rank and size.

    Two dimensions of one symbolic name must be equal. `check` looks at the kind and type of each; by default they are
    to be NumPy arrays.
    """
    names = [spec.name for spec in specs]
    if not isinstance(feeds, Mapping):
        raise InputError(where, "no dict of arrays by names of inputs", got=type(feeds).__name__, expected=names)
    missing = [name for name in names if name not in feeds]
    unknown = [name for name in feeds if name not in names]
    if missing or unknown:
        problem = f"inputs missing: {missing}" if missing else f"unknown inputs: {unknown}"
        fix = "feed one array under each expected name"
        raise InputError(where, problem, got=list(feeds), expected=names, fix=fix)
    sizes: dict[str, tuple[int, str]] = {}
    for spec in specs:
        value = feeds[spec.name]
        (check or _check_array)(where, spec, value)
        if len(value.shape) != len(spec.shape):
            problem, fix = f"input {spec.name!r} has the wrong rank", "add or remove axes; the first is the batch"
            raise InputError(where, problem, got=tuple(value.shape), expected=_show(spec), fix=fix)
        for axis, (dimension, size) in enumerate(zip(spec.shape, value.shape, strict=True)):
            if dimension in ("", "?"):  # independent of all others
                continue
            if isinstance(dimension, int):
                agreed, source = dimension, "the network fixes it"
            else:
                agreed, source = sizes.setdefault(dimension, (size, f"axis {axis} of input {spec.name!r}"))
                source = f"{dimension!r} is already {agreed} on {source}"
            if size != agreed:
                problem = f"input {spec.name!r} has the wrong size on axis {axis}"
                fix = "feed arrays of that size, or export with that dimension dynamic"
                raise InputError(where, problem, got=tuple(value.shape), expected=f"{_show(spec)}: {source}", fix=fix)


def _check_array(where: str, spec: TensorSpec, value: npt.NDArray[Any]) -> None:
    import numpy as np

    got: object
    if not isinstance(value, np.ndarray):
        problem, fix = "is not a NumPy array", "pass numpy.asarray(value)"
        got, expected = type(value).__name__, f"an array {_show(spec)} of {spec.dtype}"
    elif value.dtype.name != spec.dtype or not value.dtype.isnative:
        problem, fix = "has the wrong dtype", f"convert it with .astype({spec.dtype!r})"
        got = value.dtype.name if value.dtype.isnative else f"{value.dtype.name} in foreign byte order"
        expected = spec.dtype
    else:
        return
    raise InputError(where, f"input {spec.name!r} {problem}", got=got, expected=expected, fix=fix)


def _show(spec: TensorSpec) -> str:
    """The shape as people write it: (N, 3, H, W)."""
    return f"({', '.join(map(str, spec.shape))})"
