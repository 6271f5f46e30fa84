"""Test accuracy against the normalization batch for BN, GN, FRN and MABN, as in their papers, on small data.

    python benchmarks/batch_size_study --compile -o runs/batch_size_study
    python benchmarks/batch_size_study --data digits --seeds 0 --norm-batches 2 32 -o runs/digits

Each run trains the same small ResNet from scratch, by the same recipe, on the same images in the same order: SGD with
batches of 32, no augmentation. Only the normalization differs, and how many of the 32 images it sees at a time. The
order of the images is random, or correlated: in pairs of one class; see micro_batches.py. The accuracy is that on all
test images after the last epoch, in evaluation mode, as the network would be deployed.

The output folder receives results.csv, with a row after each finished run, and at the end table.md and figure.png. The
same command continues an interrupted study; one with more seeds or batches extends a finished one.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from pathlib import Path

import torch
from micro_batches import (
    BATCH_FREE,
    GROUPS,
    SGD_BATCH,
    Pixels,
    Recipe,
    accuracy,
    pixels,
    train,
    with_population_statistics,
)
from results import NORMS, Results, Row, Run, Settings, draw, read_rows, row_of, table, write_rows
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from deploynorm.errors import BackendError, DeployNormError, InputError
from deploynorm.files import staging, write_text
from deploynorm.models import data
from deploynorm.models.training.options import at_least, number
from deploynorm.ort.machine import processor_name

__all__ = ["main"]

Advance = Callable[[int, int], None]
"""Arguments: the number of steps done, and of all steps of a run."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/batch_size_study",
        description="Measure test accuracy against the number of images that a normalization sees at a time.",
    )

    add = parser.add_argument_group("what is compared").add_argument
    add(
        "-o", "--output", type=Path, required=True, help="folder for the results; those in it are kept and not repeated"
    )
    add("--data", default="fashion-mnist", help="fashion-mnist, digits, or a folder with Fashion-MNIST")
    add("--norms", nargs="+", choices=list(NORMS), default=list(NORMS), help="normalizations (default: all four)")
    sizes = [2, 4, 8, 16, SGD_BATCH]
    help = "normalization batches, in the order in which they run (default: 2 32 8 4 16)"
    add("--norm-batches", nargs="+", type=int, choices=sizes, default=[2, 32, 8, 4, 16], help=help)
    add("--seeds", nargs="+", type=at_least(0), default=[0, 1, 2], help="of weights and order (default: 0 1 2)")

    add = parser.add_argument_group("the recipe, the same for every normalization").add_argument
    add(
        "--images",
        type=at_least(2 * SGD_BATCH),
        default=10_000,
        help="of the training set, the first ones (default: 10000)",
    )
    add("--pool", type=at_least(1), help="average PxP pixels first (default: 2 if there are more than 16 a side)")
    add("--epochs", type=at_least(1), default=5, help="times that every image is seen (default: 5)")
    add("--lr", type=number("above 0", lambda x: x > 0), default=0.1, help="peak learning rate (default: 0.1)")
    add("--depth", type=at_least(1), default=1, help="blocks of each of the three stages (default: 1)")
    add("--width", type=int, choices=[8, 16, 32, 64], default=16, help="channels of the first stage (default: 16)")

    add = parser.add_argument_group("how it is computed").add_argument
    add("--threads", type=at_least(1), default=1, help="CPU threads of each run (default: 1)")
    add("--jobs", type=at_least(1), default=1, help="runs at a time, each in a process of its own (default: 1)")
    add("--compile", action="store_true", help="torch.compile MABN's networks, whose many small batches cost the most")
    return parser


def wanted_runs(options: argparse.Namespace) -> list[Run]:
    """Every run that the options name, each once; a norm batch for all seeds before the next norm batch."""
    runs = [
        Run(norm, "any" if norm in BATCH_FREE else str(norm_batch), groups, seed)
        for norm_batch in options.norm_batches
        for seed in options.seeds
        for groups in GROUPS
        for norm in options.norms
    ]
    return list(dict.fromkeys(runs))


@cache
def load(source: str, images: int, pool: int) -> Pixels:
    """The data set, once in each process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return pixels(data.load(source), images, pool, device)


def machine() -> str:
    """Processor, version of torch and threads, for the row of a run."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    threads = torch.get_num_threads()
    return f"{device}, torch {torch.__version__}, {threads} thread{'s' if threads > 1 else ''}"


def make(run: Run, settings: Settings, source: str, compiled: bool, advance: Advance = lambda done, of: None) -> Row:
    """Trains and measures one network."""
    images = load(source, settings.images, settings.pool)
    recipe = Recipe(settings.epochs, settings.lr, (settings.depth,) * 3, settings.width)
    norm_batch = SGD_BATCH if run.norm_batch == "any" else int(run.norm_batch)
    compiled = compiled and run.norm == "mabn"
    start = time.process_time()
    model, loss = train(run.norm, norm_batch, run.groups, run.seed, recipe, images, compiled=compiled, advance=advance)
    seconds = time.process_time() - start
    population = accuracy(with_population_statistics(model, images), images) if run.norm == "bn" else None
    return row_of(run, Results(accuracy(model, images), population, loss, seconds), settings, machine())


def start_worker(threads: int) -> None:
    """Initializes a process of the pool."""
    # Ctrl-C reaches every process of the terminal; the parent terminates the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)


def make_all(runs: Sequence[Run], settings: Settings, options: argparse.Namespace, advance: Advance) -> Iterator[Row]:
    """Yields the row of each run as it ends.

    Raises:
        BackendError: A process of the pool was killed.
    """
    shared = (settings, options.data, options.compile)
    if options.jobs == 1:
        torch.set_num_threads(options.threads)
        for run in runs:
            yield make(run, *shared, advance)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, start_worker, (options.threads,)) as pool:
        try:
            for future in as_completed([pool.submit(make, run, *shared) for run in runs]):
                yield future.result()
        except BrokenProcessPool as error:
            raise BackendError(
                "--jobs", "a process of the study was killed", fix="give the same command again, with fewer --jobs"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.terminate()
            raise


def about(settings: Settings, rows: Sequence[Row]) -> str:
    """The description above the table."""
    seeds = ", ".join(sorted({row["seed"] for row in rows}, key=int))
    return (
        f"{settings.data}: the first {settings.images:,} training images, all test images, {settings.pool}x"
        f"{settings.pool} pixels averaged. ResNets of three stages with {settings.depth} basic "
        f"block{'s' if settings.depth > 1 else ''} each, {settings.width} channels in the first. {settings.epochs} "
        f"epochs of SGD in batches of {SGD_BATCH}, peak learning rate {settings.lr}. Test accuracy in percent: mean "
        f"over the seeds {seeds}, and the least and the greatest. Training loss: mean of the last epoch.\n\n"
        f"Machine: {'; '.join(sorted({row['machine'] for row in rows}))}.\n\n"
    )


def study(options: argparse.Namespace) -> None:
    """Trains the missing runs, and writes rows, table and figure of all."""
    images = data.load(options.data)
    sides = images.train_images.shape[2:]
    pool = options.pool or (2 if max(sides) > 16 else 1)
    if pool > min(sides):
        raise InputError("--pool", "it is larger than the images", got=pool, expected=f"at most {min(sides)}")
    count = min(options.images, len(images.train_images))
    settings = Settings(images.name, count, pool, options.epochs, options.lr, options.depth, options.width)
    output: Path = options.output
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output {output}", f"no folder can be made there: {error.strerror}") from error
    rows = read_rows(output / "results.csv", settings)
    there = {tuple(row[name] for name in Run._fields) for row in rows}
    missing = [run for run in wanted_runs(options) if tuple(map(str, run)) not in there]

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        runs = progress.add_task("runs", total=len(missing))
        steps = progress.add_task("steps of this run", visible=options.jobs == 1)

        def advance(done: int, of: int) -> None:
            progress.update(steps, completed=done, total=of)

        for row in make_all(missing, settings, options, advance):
            rows.append(row)
            write_rows(output / "results.csv", rows)
            progress.advance(runs)
            line = (
                f"{row['norm']:4}  norm batch {row['norm_batch']:>3}  {row['groups']:10}  seed {row['seed']}  "
                f"train loss {row['train_loss']}  test accuracy {float(row['test_accuracy']):.2%}  "
                f"{row['cpu_seconds']} s of CPU"
            )
            console.print(line, highlight=False, soft_wrap=True)
    with staging(output / "figure.png") as folder:
        draw(rows, folder / "figure.png")
    write_text(output / "table.md", about(settings, rows) + table(rows))
    print(table(rows), end="")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 done, 2 bad argument, 3 missing package, 130 Ctrl-C."""
    options = build_parser().parse_args(argv)
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise BackendError("batch_size_study", "matplotlib is missing", fix="pip install 'deploynorm[train]'")
        study(options)
    except DeployNormError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: the same command continues after the last finished run", file=sys.stderr)
        return 130
    return 0
