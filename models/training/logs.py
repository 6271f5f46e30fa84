"""What a run reports: lines and a progress bar, log.csv, TensorBoard's events, and a picture of its curve."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploynorm.errors import InputError
from deploynorm.files import staging, write_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

__all__ = ["Log", "draw_curve"]


class Log:
    """Writes the reports of one process; with active=False, none.

    Args:
        output: Folder of log.csv, and of the folder tensorboard.
        active: False in every process but the first.
        tensorboard: Whether to write events, if the package is installed.
        step: Steps taken before. TensorBoard hides events of an earlier run beyond it.

    Raises:
        InputError: The folder cannot be made.
    """

    def __init__(self, output: Path, *, active: bool, tensorboard: bool, step: int) -> None:
        self._output, self._active = output, active
        if active:
            try:
                output.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"output {output}", f"no folder can be made there: {error.strerror}") from error
        self._events = open_events(output / "tensorboard", step) if active and tensorboard else None
        console = Console(stderr=True)
        self._progress = Progress(
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
            console=console,
            disable=not active or not console.is_terminal,
            redirect_stdout=sys.stdout.isatty(),
        )

    def __enter__(self) -> Log:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._events is not None:
            self._events.close()

    def track(self, steps: range, description: str) -> Iterator[int]:
        """The steps, with a progress bar; those before the first count as done."""
        task = self._progress.add_task(description, total=steps.stop, completed=steps.start)
        for step in steps:
            yield step
            self._progress.advance(task)
        self._progress.remove_task(task)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Adds one value to each of TensorBoard's curves."""
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)

    def epoch(self, history: Sequence[dict[str, float]], epochs: int) -> None:
        """Writes log.csv, and prints the last epoch."""
        if not self._active:
            return
        row, text = history[-1], io.StringIO()
        writer = csv.DictWriter(text, list(row), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in history)
        write_text(self._output / "log.csv", text.getvalue())
        self.scalars(int(row["step"]), {"test/accuracy": row["test_accuracy"]})
        if self._events is not None:
            self._events.flush()
        print(
            f"epoch {row['epoch']}/{epochs}  train loss {row['train_loss']:.4f}  "
            f"test accuracy {row['test_accuracy']:.2%}  {row['images_per_second']:.0f} images/s  "
            f"{row['seconds']:.0f} s",
            flush=True,
        )


def open_events(folder: Path, step: int) -> SummaryWriter | None:
    """TensorBoard's writer, or None and a line that says why."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("tensorboard is not installed: log.csv and curve.png alone are written", flush=True)
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def draw_curve(history: Sequence[dict[str, float]], title: str, path: Path) -> None:
    """Draws training loss and test accuracy by epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.2, 3.0), layout="constrained")
    accuracies = [100 * row["test_accuracy"] for row in history]
    figure.suptitle(f"{title}: {accuracies[-1]:.2f} % of the test images in the end", fontsize=11)
    epochs = [row["epoch"] for row in history]
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["train_loss"] for row in history], "o-", color="C0", markersize=3)
    left.set(ylabel="training loss", ylim=(0, None))
    right.plot(epochs, accuracies, "o-", color="C1", markersize=3)
    right.set(ylabel="test accuracy, %")
    for axes in (left, right):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    with staging(path) as folder:
        figure.savefig(folder / path.name, dpi=150)
