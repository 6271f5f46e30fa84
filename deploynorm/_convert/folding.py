"""The folded network as a file of its own, checked."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from deploynorm._check.parity import Checks, Parity
from deploynorm._fold import FoldReport, fold
from deploynorm.files import as_path, staging
from deploynorm.network import Network
from deploynorm.quiet import quiet
from deploynorm.trace import Dynamic, ExampleInputs, trace

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from deploynorm.network import Reading


@dataclass(frozen=True, eq=False)
class Folding:
    """A folded network and what was found of it; true when the check holds. `print` shows its tables."""

    model: nn.Module
    report: FoldReport
    parity: Parity
    network: Network  # the one given
    dynamic: Dynamic | None  # axes that are dynamic in the file

    def __bool__(self) -> bool:
        return bool(self.parity)

    def tables(self, verbose: bool = False) -> str:
        parts = [self.report.tables(verbose), self.parity.tables(verbose)]
        return "\n\n".join([*(part for part in parts if part), *(f"note: {note}" for note in self.network.notes)])

    def __str__(self) -> str:
        return self.tables()

    def to_dict(self) -> dict[str, Any]:
        """What JSON has of it."""
        return {"fold": self.report.to_dict()} | self.parity.to_dict()

    def save(self, path: Path | str) -> Path:
        """Writes the folded network as a torch.export archive (.pt2), which `deploynorm export` takes.

        Raises:
            ParityError: The check does not hold; nothing is written.
            ModelError: torch.export cannot trace the network.
            InputError: The path is that of the network's own file, or cannot be written to.
        """
        self.parity.raise_if_broken()
        path, checkpoint = as_path("save", path), self.network.checkpoint
        archive = io.BytesIO()  # torch.export.save ends the process where a disk is full
        with quiet():
            torch.export.save(trace(self.model, self.network.examples, self.dynamic), archive)
        with staging(path, inputs=() if checkpoint is None else (checkpoint.path,)) as folder:
            (folder / path.name).write_bytes(archive.getbuffer())
        return path


def fold_checked(
    model: nn.Module | str | Path,
    example_inputs: ExampleInputs | None = None,
    *,
    dynamic: Dynamic | None = None,
    seed: int = 0,
    rtol: float | None = None,
    atol: float | None = None,
    **reading: Unpack[Reading],
) -> Folding:
    """Folds a network and checks the folded one against it; what `deploynorm fold` does.

    The arguments, `reading` among them, are those of `deploynorm.convert`.
    """
    network = Network.of(model, example_inputs, **reading)
    folded, report = fold(network.model, network.examples, dynamic=dynamic)
    checks = Checks(network, seed=seed, rtol=rtol, atol=atol)
    checks.add_folded(folded)
    return Folding(folded, report, checks.parity(), network, dynamic)
