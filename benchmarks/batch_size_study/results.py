"""The results of the study: a row for each run, a table and a picture."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from micro_batches import BATCH_FREE, GROUPS, SGD_BATCH, Groups, Norm

from deploynorm.errors import InputError
from deploynorm.files import write_text

__all__ = ["NORMS", "Results", "Row", "Run", "Settings", "draw", "read_rows", "row_of", "table", "write_rows"]

NORMS: dict[Norm, str] = {"bn": "BN", "gn": "GN", "frn": "FRN + TLU", "mabn": "MABN + CenConv"}

Row = dict[str, str]
"""A line of results.csv: run, results, settings and machine."""


class Run(NamedTuple):
    """One training; norm_batch is "any" where the normalization does not depend on it."""

    norm: Norm
    norm_batch: str
    groups: Groups
    seed: int


class Settings(NamedTuple):
    """The settings that all runs of a study share: data set, training images, pooling, and the recipe."""

    data: str
    images: int
    pool: int
    epochs: int
    lr: float
    depth: int
    width: int


class Results(NamedTuple):
    """The results of a run."""

    test_accuracy: float
    population_accuracy: float | None
    """Test accuracy after `with_population_statistics`; BN only."""
    train_loss: float
    """Mean over the last epoch."""
    cpu_seconds: float
    """Of the training."""


COLUMNS = (*Run._fields, *Results._fields, *Settings._fields, "machine")


def row_of(run: Run, results: Results, settings: Settings, machine: str) -> Row:
    population = "" if results.population_accuracy is None else f"{results.population_accuracy:.4f}"
    numbers = (f"{results.test_accuracy:.4f}", population, f"{results.train_loss:.4f}", f"{results.cpu_seconds:.0f}")
    return dict(zip(COLUMNS, map(str, (*run, *numbers, *settings, machine)), strict=True))


def read_rows(path: Path, settings: Settings | None = None) -> list[Row]:
    """The rows of a file; none if the file does not exist.

    Raises:
        InputError: It is not a file of the study, or its study had other settings.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            header = tuple(reader.fieldnames or ())
        numbers = [float(row[name]) for row in rows for name in Results._fields if name in row and row[name] != ""]
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise InputError(str(path), "cannot be read", got=error, fix="choose another -o/--output") from error
    if header != COLUMNS or len(numbers) < 3 * len(rows):
        raise InputError(
            str(path), "not a file of this study", expected=",".join(COLUMNS), fix="choose another -o/--output"
        )
    wanted = {} if settings is None else settings._asdict()
    for row in rows:
        for name, value in wanted.items():
            if row[name] != str(value):
                raise InputError(
                    str(path),
                    f"its runs had another {name}",
                    got=value,
                    expected=row[name],
                    fix="choose another -o/--output",
                )
    return rows


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def select(rows: Sequence[Row], **wanted: str) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def spread(rows: Sequence[Row], column: str, seeds: int) -> str:
    """Mean, minimum and maximum of a column of accuracies, in percent; with the number of runs if some are missing."""
    values = [100 * float(row[column]) for row in rows]
    if not values:
        return ""
    text = f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
    return text if len(values) == seeds else f"{text}, {len(values)} of {seeds} seeds"


def mean_loss(rows: Sequence[Row]) -> str:
    return f"{statistics.fmean(float(row['train_loss']) for row in rows):.3f}" if rows else ""


def table(rows: Sequence[Row]) -> str:
    """The rows of a study as Markdown: the lines of a table alone."""
    seeds = len({row["seed"] for row in rows})
    lines = [
        "| normalization | norm batch | test accuracy, random | correlated | training loss, random | correlated |",
        "|---|---|---|---|---|---|",
    ]
    for norm, name in NORMS.items():
        batches = {row["norm_batch"] for row in select(rows, norm=norm)}
        for title, column in ((name, "test_accuracy"), (f"{name}, population statistics", "population_accuracy")):
            for batch in sorted(batches, key=lambda text: (len(text), text)):
                parts = [select(rows, norm=norm, norm_batch=batch, groups=groups) for groups in GROUPS]
                if any(row[column] for part in parts for row in part):
                    accuracies = [spread(part, column, seeds) for part in parts]
                    lines.append(f"| {' | '.join([title, batch, *accuracies, *map(mean_loss, parts)])} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draws test error against the normalization batch, random and correlated side by side, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(9.0, 3.8), layout="constrained")
    figure.suptitle(f"ResNets on {rows[0]['data']}, SGD in batches of {SGD_BATCH}", fontsize=11)
    sizes = sorted({int(row["norm_batch"]) for row in rows if row["norm_batch"] != "any"}) or [2, SGD_BATCH]
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, groups in ((left, "random"), (right, "correlated")):
        for index, (norm, name) in enumerate(NORMS.items()):
            points = []
            for size in sizes:
                batch = "any" if norm in BATCH_FREE else str(size)
                chosen = select(rows, norm=norm, norm_batch=batch, groups=groups)
                if errors := [100 - 100 * float(row["test_accuracy"]) for row in chosen]:
                    points.append((size, statistics.fmean(errors), min(errors), max(errors)))
            if points:
                x, mean, least, greatest = zip(*points, strict=True)
                style = "--" if norm in BATCH_FREE else "o-"
                axes.plot(x, mean, style, color=f"C{index}", label=name, markersize=4)
                axes.fill_between(x, least, greatest, color=f"C{index}", alpha=0.2, linewidth=0)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        for axis, ticks in ((axes.xaxis, sizes), (axes.yaxis, [1, 2, 3, 4, 5, 7, 10, 12, 15, 20, 30, 40, 50, 70, 90])):
            axis.set_major_locator(FixedLocator(ticks))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.set(title=f"{groups} images", xlabel="normalization batch")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("test error, %")
    figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.savefig(path, dpi=150)
