"""Trains a reference network and writes a checkpoint that `deploynorm export` takes.

    python -m deploynorm.models.train --norm frn --data digits
    torchrun --nproc-per-node 2 -m deploynorm.models.train --norm mabn --data fashion-mnist --compile

SGD with Nesterov momentum, a learning rate that climbs from 0 and falls along two cosines (FRN needs the climb:
arXiv:1911.09737, section 4.1), weight decay on the weights of convolutions and of the classifier alone. The output
folder receives last.pt (after each epoch, for --resume), log.csv, curve.png, and at the end model.pt.

The learning rate is a function of the step, and all randomness one of seed, epoch and process. So an epoch can be
repeated from the weights and the optimiser's state alone, and --resume gives, on a CPU, the weights to the bit.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deploynorm import checkpoint
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.files import staging
from deploynorm.inputs import ImageSpec

from . import data, frn_resnet, mabn_resnet

__all__ = ["lr_factor", "main", "parameter_groups"]

RECIPE = "norm data epochs batch_size lr warmup_epochs weight_decay label_smoothing shift seed processes"
"""The options that decide the weights; the others decide where they go and how fast."""


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text}, expected {minimum} or more")
        return int(text)

    return integer


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="deploynorm.models.train", description="Train a ResNet-20.")
    add = parser.add_argument
    add("--norm", choices=["frn", "mabn", "bn", "gn"], required=True)
    add("--data", default="fashion-mnist", help="fashion-mnist, digits, or a folder with Fashion-MNIST")
    add("-o", "--output", type=Path, help="folder for what is written (default: runs/NORM_resnet20_DATA)")
    add("--epochs", type=at_least(1), default=10)
    add("--batch-size", type=at_least(1), default=128, help="images of one step, all processes together")
    add("--lr", type=float, default=0.1, help="peak learning rate")
    add("--warmup-epochs", type=float, default=1.0)
    add("--weight-decay", type=float, default=5e-4)
    add("--label-smoothing", type=float, default=0.0)
    add("--shift", type=at_least(0), help="pixels of random shift (default: an eighth of the height)")
    add("--seed", type=at_least(0), default=0)
    add("--threads", type=at_least(1), help="CPU threads of each process")
    add("--compile", action="store_true", help="torch.compile the training step's network")
    add("--resume", action="store_true", help="continue from last.pt in the output folder")
    return parser


def lr_factor(step: int, warmup: int, total: int) -> float:
    """Learning rate of a step as a part of its peak: a cosine from 0 to 1 over `warmup` steps, then one to 0."""
    if step < warmup:
        return 0.5 - 0.5 * math.cos(math.pi * (step + 1) / (warmup + 1))
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters in two groups, with and without weight decay.

    Only the weights of convolutions and linear layers decay. Norm parameters, tau, eps_l and biases, all of one axis
    or none, do not: shrinking them changes what the network can express and regularises nothing.
    """
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def random_stream(seed: int, epoch: int, stream: int) -> torch.Generator:
    """One generator for each triple."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence((seed, epoch, stream)).generate_state(1)[0]))


class Training:
    """One run: the network, its optimiser, the data, and what has been reached so far."""

    def __init__(self, options: argparse.Namespace, command: str) -> None:
        self.options, self.command = options, command
        self.rank, self.processes = int(os.environ.get("RANK", "0")), int(options.processes)
        self.images = data.load(options.data)
        if options.shift is None:
            options.shift = self.images.train_images.shape[2] // 8
        self.steps: int = len(self.images.train_images) // options.batch_size
        if self.steps == 0 or options.batch_size % self.processes:
            raise InputError(
                "--batch-size",
                "it must divide among the processes and not exceed the data",
                got=options.batch_size,
                expected=f"a multiple of {self.processes}, at most {len(self.images.train_images)}",
            )
        self.device = torch.device("cpu")
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))

        self.kwargs: dict[str, Any] = {
            "num_classes": len(self.images.labels),
            "in_channels": self.images.train_images.shape[1],
        }
        torch.manual_seed(options.seed)
        if options.norm == "frn":
            self.factory = f"{frn_resnet.__name__}:resnet20"
            self.model: nn.Module = frn_resnet.resnet20(**self.kwargs)
        else:
            self.factory = f"{mabn_resnet.__name__}:resnet20"
            self.kwargs["norm"] = options.norm
            self.model = mabn_resnet.resnet20(**self.kwargs)
        self.model.to(self.device)
        groups = parameter_groups(self.model, options.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
        self.history: list[dict[str, float]] = []
        if options.resume:
            self.load_last()

        self.step_model: Callable[[Tensor], Tensor] = self.model
        if self.processes > 1:
            self.step_model = DistributedDataParallel(self.model)
        if options.compile:
            self.step_model = torch.compile(self.step_model)
        self.mean, self.std = (
            torch.tensor(values, device=self.device).view(1, -1, 1, 1)
            for values in (self.images.mean(), self.images.std())
        )

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 images as the network takes them."""
        return (images.to(self.device) / 255 - self.mean) / self.std

    def train_epoch(self, epoch: int, progress: Progress) -> float:
        """Trains on every image once, but for the rest that fills no batch; returns the mean loss."""
        options = self.options
        task = progress.add_task(f"epoch {epoch + 1}/{options.epochs}", total=self.steps)
        order = torch.randperm(len(self.images.train_images), generator=random_stream(options.seed, epoch, 0))
        stream = random_stream(options.seed, epoch, self.rank + 1)
        warmup, total = round(options.warmup_epochs * self.steps), options.epochs * self.steps
        loss_sum = torch.zeros((), device=self.device)
        self.model.train()
        for step in range(self.steps):
            batch = order[step * options.batch_size :][: options.batch_size][self.rank :: self.processes]
            for group in self.optimizer.param_groups:
                group["lr"] = options.lr * lr_factor(epoch * self.steps + step, warmup, total)
            images = data.augment(self.images.train_images[batch], options.shift, self.images.mirror, stream)
            logits = self.step_model(self.to_input(images))
            classes = self.images.train_classes[batch].to(self.device)
            loss = F.cross_entropy(logits, classes, label_smoothing=options.label_smoothing)
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            loss_sum += loss.detach()
            progress.advance(task)
        progress.remove_task(task)
        return self.over_ranks(loss_sum) / (self.processes * self.steps)

    @torch.no_grad()
    def evaluate(self) -> float:
        """The part of the test images that the plain network, in evaluation mode, puts in their class."""
        if self.processes > 1:
            # The forward pass shares them out too, but before BN's move with the batch of each process.
            for buffer in self.model.buffers():
                dist.broadcast(buffer, 0)
        self.model.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        mine = slice(self.rank, None, self.processes)
        images, classes = self.images.test_images[mine], self.images.test_classes[mine]
        for start in range(0, len(images), 256):
            predicted = self.model(self.to_input(images[start : start + 256])).argmax(1)
            correct += (predicted == classes[start : start + 256].to(self.device)).sum()
        return self.over_ranks(correct) / len(self.images.test_images)

    def over_ranks(self, value: Tensor) -> float:
        """Sum over the processes."""
        if self.processes > 1:
            dist.all_reduce(value)
        return float(value)

    def run(self) -> None:
        """Trains the epochs that are left; the first process writes the results."""
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(
            *columns,
            console=console,
            disable=self.rank > 0 or not console.is_terminal,
            redirect_stdout=sys.stdout.isatty(),
        ) as progress:
            for epoch in range(len(self.history), self.options.epochs):
                start = time.perf_counter()
                loss = self.train_epoch(epoch, progress)
                if not math.isfinite(loss):
                    raise ModelError("train", f"the loss of epoch {epoch + 1} is not finite", fix="lower --lr")
                row = {"epoch": epoch + 1, "train_loss": loss, "test_accuracy": self.evaluate()}
                self.history.append(row | {"seconds": time.perf_counter() - start})
                if self.rank == 0:
                    self.write_epoch()
        if self.rank == 0:
            self.write_results()

    def write_epoch(self) -> None:
        """Writes last.pt and log.csv, and prints a line."""
        output, row = self.options.output, self.history[-1]
        output.mkdir(parents=True, exist_ok=True)
        with staging(output / "last.pt") as folder:
            torch.save(self.last(), folder / "last.pt")
        with (output / "log.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row), lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in self.history)
        print(
            f"epoch {row['epoch']}/{self.options.epochs}  train loss {row['train_loss']:.4f}  "
            f"test accuracy {row['test_accuracy']:.2%}  {row['seconds']:.0f} s",
            flush=True,
        )

    def write_results(self) -> None:
        """Writes curve.png and model.pt."""
        output = self.options.output
        draw_curve(
            self.history, f"ResNet-20 with {self.options.norm.upper()} on {self.images.name}", output / "curve.png"
        )
        channels, height, width = self.images.train_images.shape[1:]
        checkpoint.save(
            output / "model.pt",
            factory=self.factory,
            kwargs=self.kwargs,
            model=self.model,
            image=ImageSpec((channels, height, width), tuple(self.images.mean()), tuple(self.images.std())),
            labels=self.images.labels,
            training={
                "command": self.command,
                "dataset": self.images.name,
                "accuracy": self.history[-1]["test_accuracy"],
                "epochs": self.options.epochs,
                "seed": self.options.seed,
                "torch": str(torch.__version__),
            },
        )
        print(output / "model.pt")

    def last(self) -> dict[str, Any]:
        """What --resume needs."""
        return {
            "recipe": {name: getattr(self.options, name) for name in RECIPE.split()},
            "command": self.command,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load_last(self) -> None:
        """Takes up the run that left last.pt."""
        path = self.options.output / "last.pt"
        if not path.is_file():
            raise InputError("--resume", f"no {path}", fix="give the -o/--output of the run to continue")
        last = torch.load(path, map_location=self.device, weights_only=True)
        for name, value in last["recipe"].items():
            if value != getattr(self.options, name):
                raise InputError(
                    "--resume", f"the run in {path} had another {name}", got=getattr(self.options, name), expected=value
                )
        self.model.load_state_dict(last["model"])
        self.optimizer.load_state_dict(last["optimizer"])
        self.history, self.command = last["history"], last["command"]


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
    figure.savefig(path, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 0 done, 2 bad argument, 3 missing package, 130 Ctrl-C."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = build_parser().parse_args(arguments)
    options.processes = int(os.environ.get("WORLD_SIZE", "1"))
    if options.output is None:
        options.output = Path("runs") / f"{options.norm}_resnet20_{Path(options.data).name}"
    launcher = "python" if options.processes == 1 else f"torchrun --nproc-per-node {options.processes}"
    command = f"{launcher} -m deploynorm.models.train {shlex.join(arguments)}"
    try:
        if importlib.util.find_spec("matplotlib") is None:
            raise BackendError("train", "matplotlib is missing", fix="pip install 'deploynorm[train]'")
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        if options.processes > 1:
            dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        Training(options, command).run()
    except DeployNormError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: --resume continues from the last whole epoch", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
