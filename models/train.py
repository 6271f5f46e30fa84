"""Trains a reference network and writes a checkpoint that `deploynorm export` takes.

    python -m deploynorm.models.train --norm frn --data digits
    torchrun --nproc-per-node 2 -m deploynorm.models.train --norm mabn --data fashion-mnist --amp bf16 --compile
    python -m deploynorm.models.train --help

SGD with Nesterov momentum, a cosine learning rate with warm-up (FRN requires it: arXiv:1911.09737, section 4.1), weight
decay on the weights of convolutions and of the classifier only. The output
folder receives last.pt and log.csv after each epoch, events for TensorBoard, and at the end curve.png and model.pt.

The learning rate is a function of the step, and every random number one of seed, epoch, step and process. A step thus
depends only on the weights, averages and optimiser state: Ctrl-C saves them after the current step, and the same
command with --resume continues. On a CPU the result is bit-exact with an uninterrupted run, with up to two processes:
with more, DistributedDataParallel adds gradients in another order in the first step.

To train something else, start with a copy of this file: `Training.step` and `Training.train_epoch` are the loop.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from deploynorm import checkpoint
from deploynorm.errors import BackendError, DeployNormError, InputError, ModelError
from deploynorm.image import ImageSpec
from deploynorm.layers import parameter_groups, track_loss_scale

from . import data, frn_resnet, mabn_resnet
from .batches import Batches, random_seed
from .training.compilation import compiled
from .training.last import load_last, save_last
from .training.logs import Log, draw_curve
from .training.optimization import averaged, lr_factor
from .training.options import RECIPE, build_parser
from .training.precision import autocast, check_amp
from .training.processes import StopSignal, join, over_processes

__all__ = ["lr_factor", "main"]

LOG_STEPS = 50
"""Steps between two readings of the loss. A reading makes the host wait for the device."""


@dataclass
class EpochSoFar:
    """Progress within the current epoch; equal in all processes."""

    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0


class Training:
    """One run: the network, its optimiser, the data, and the progress."""

    def __init__(self, options: argparse.Namespace, command: str, device: torch.device) -> None:
        self.options, self.command, self.device = options, command, device
        self.rank, self.processes = int(os.environ.get("RANK", "0")), int(options.processes)
        check_amp(device, options.amp)

        images = data.load(options.data)
        if options.shift is None:
            options.shift = images.train_images.shape[2] // 8
        self.batches = Batches(images, options, self.rank, self.processes, device)
        torch.manual_seed(options.seed)
        self.factory, self.kwargs, self.model = build_network(options.norm, images)
        self.model.to(device)
        if options.channels_last:
            self.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        groups = parameter_groups(self.model, options.weight_decay)
        self.optimizer = torch.optim.SGD(groups, lr=options.lr, momentum=0.9, nesterov=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "fp16")
        if options.norm == "mabn":
            track_loss_scale(self.model, self.scaler)
        self.averaged = averaged(self.model, options.ema) if options.ema else None
        self.history: list[dict[str, float]] = []
        self.epoch = EpochSoFar()
        if options.resume:
            self.resume()

        self.distributed = DistributedDataParallel(self.model) if self.processes > 1 else None
        self.step_model: Callable[[Tensor], Tensor] = self.distributed or self.model
        if options.compile:
            self.step_model = compiled(self.distributed or self.model)

    def run(self, stop: StopSignal, log: Log) -> None:
        """Trains the remaining epochs, or until a signal; the first process writes the results."""
        options = self.options
        for epoch in range(len(self.history), options.epochs):
            self.train_epoch(epoch, stop, log)
            if stop.agreed:
                break
            start = time.perf_counter()
            accuracy = self.evaluate()
            row = {
                "epoch": epoch + 1,
                "step": (epoch + 1) * self.batches.steps,
                "lr": self.optimizer.param_groups[0]["lr"],
                "train_loss": self.epoch.loss_sum / (self.processes * self.batches.steps),
                "test_accuracy": accuracy,
                "images_per_second": self.batches.steps * options.batch_size / self.epoch.seconds,
                "loss_scale": self.scaler.get_scale(),
                "seconds": self.epoch.seconds + time.perf_counter() - start,
            }
            self.history.append(row)
            self.epoch = EpochSoFar()
            log.epoch(self.history, options.epochs)
            self.save()
        if stop.agreed:
            self.save()
        elif self.rank == 0:
            self.write_results()

    def train_epoch(self, epoch: int, stop: StopSignal, log: Log) -> None:
        """The remaining steps of an epoch: every image once, without a last incomplete batch."""
        options, steps = self.options, self.batches.steps
        first, warmup, total = epoch * steps, round(options.warmup_epochs * steps), options.epochs * steps
        order = self.batches.order(epoch)
        losses: list[Tensor] = []
        self.last_reading = time.perf_counter()
        self.model.train()
        for step in stop.until(log.track(range(self.epoch.step, steps), f"epoch {epoch + 1}/{options.epochs}")):
            for group in self.optimizer.param_groups:
                group["lr"] = options.lr * lr_factor(first + step, warmup, total)
            torch.manual_seed(random_seed(options.seed, epoch, step, self.rank))
            images, classes = self.batches.training(order, step)
            losses.append(self.step(images, classes))
            self.epoch.step = step + 1
            if self.epoch.step % LOG_STEPS == 0:
                self.read_losses(losses, first + self.epoch.step, log)
        self.read_losses(losses, first + self.epoch.step, log)

    def step(self, images: Tensor, classes: Tensor) -> Tensor:
        """One step of the optimiser on this process's images; returns their mean loss.

        With --accumulate the images pass through the network in parts, whose gradients are added. For FRN and GN the
        result is the step of the whole batch; BN and MABN compute statistics of each part alone.
        """
        parts = self.options.accumulate
        loss_sum = torch.zeros((), device=self.device)
        self.optimizer.zero_grad()
        for part, (some, their_classes) in enumerate(zip(images.chunk(parts), classes.chunk(parts), strict=True)):
            # Processes average their gradients once per step, in the backward pass of its last part.
            alone = self.distributed.no_sync() if self.distributed and part + 1 < parts else nullcontext()
            with alone:
                with autocast(self.device, self.options.amp):
                    logits = self.step_model(self.batches.to_input(some))
                    smoothing = self.options.label_smoothing
                    loss = F.cross_entropy(logits, their_classes.to(self.device), label_smoothing=smoothing) / parts
                self.scaler.scale(loss).backward()
            loss_sum += loss.detach()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        return loss_sum

    def read_losses(self, losses: list[Tensor], step: int, log: Log) -> None:
        """Copies the losses since the last call to the host, logs them, and empties the list."""
        if not losses:
            return
        steps, loss = len(losses), over_processes(torch.stack(losses).double().sum())
        losses.clear()
        if not math.isfinite(loss):
            raise ModelError("train", f"the loss is not finite by step {step}", fix="lower --lr")
        now = time.perf_counter()
        seconds, self.last_reading = now - self.last_reading, now
        self.epoch.loss_sum += loss
        self.epoch.seconds += seconds
        values = {
            "train/loss": loss / (self.processes * steps),
            "train/lr": self.optimizer.param_groups[0]["lr"],
            "train/images_per_second": steps * self.options.batch_size / seconds,
            "train/loss_scale": self.scaler.get_scale(),
        }
        log.scalars(step, values)

    @property
    def result(self) -> nn.Module:
        """The network that is evaluated and written: the average of --ema, or the trained one."""
        return self.model if self.averaged is None else self.averaged.module

    @torch.no_grad()
    def evaluate(self) -> float:
        """Test accuracy of `result` in evaluation mode and float32, from 0 to 1."""
        if self.processes > 1:
            # DDP's forward pass broadcasts them too, but before each process updates BN's with its own batch.
            for buffer in self.result.buffers():
                dist.broadcast(buffer, 0)
        self.result.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for images, classes in self.batches.test():
            predicted = self.result(self.batches.to_input(images)).argmax(1)
            correct += (predicted == classes.to(self.device)).sum()
        return over_processes(correct) / len(self.batches.images.test_images)

    def recipe(self) -> dict[str, Any]:
        return {name: getattr(self.options, name) for name in RECIPE}

    def save(self) -> None:
        """Writes last.pt."""
        if self.rank == 0:
            save_last(
                self.options.output / "last.pt",
                {
                    "recipe": self.recipe(),
                    "command": self.command,
                    "history": self.history,
                    "epoch": asdict(self.epoch),
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "scaler": self.scaler.state_dict(),
                    "averaged": None if self.averaged is None else self.averaged.state_dict(),
                },
            )

    def resume(self) -> None:
        """Continues the run that wrote last.pt."""
        path = self.options.output / "last.pt"
        last = load_last(path, self.recipe(), self.device)
        try:
            self.command, self.history, self.epoch = last["command"], last["history"], EpochSoFar(**last["epoch"])
            self.model.load_state_dict(last["model"])
            self.optimizer.load_state_dict(last["optimizer"])
            self.scaler.load_state_dict(last["scaler"])
            if self.averaged is not None:
                self.averaged.load_state_dict(last["averaged"])
        except Exception as error:  # torch and the layers have no error of their own for what does not fit
            problem = f"{path} does not fit the run ({type(error).__name__})"
            raise InputError("--resume", problem, fix="leave out --resume") from error

    def write_results(self) -> None:
        """Writes curve.png and model.pt."""
        output, images = self.options.output, self.batches.images
        title = f"ResNet-20 with {self.options.norm.upper()} on {images.name}"
        draw_curve(self.history, title, output / "curve.png")
        channels, height, width = images.train_images.shape[1:]
        checkpoint.save(
            output / "model.pt",
            factory=self.factory,
            kwargs=self.kwargs,
            model=self.result,
            image=ImageSpec((channels, height, width), tuple(images.mean()), tuple(images.std())),
            labels=images.labels,
            training={
                "command": self.command,
                "dataset": images.name,
                "accuracy": self.history[-1]["test_accuracy"],
                "epochs": self.options.epochs,
                "seed": self.options.seed,
                "torch": str(torch.__version__),
            },
        )
        print(output / "model.pt")


def build_network(norm: str, images: data.ImageData) -> tuple[str, dict[str, Any], nn.Module]:
    """The factory and its arguments, as a checkpoint records them, and the network."""
    kwargs: dict[str, Any] = {"num_classes": len(images.labels), "in_channels": images.train_images.shape[1]}
    if norm == "frn":
        return f"{frn_resnet.__name__}:resnet20", kwargs, frn_resnet.resnet20(**kwargs)
    kwargs["norm"] = norm
    return f"{mabn_resnet.__name__}:resnet20", kwargs, mabn_resnet.resnet20(**kwargs)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    0 done, 2 bad argument, 3 missing package, 128 plus the signal's number if stopped: 130 by Ctrl-C, 143 by SIGTERM.
    """
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
        device = join(options.processes)
        with StopSignal() as stop:
            training = Training(options, command, device)
            step = len(training.history) * training.batches.steps + training.epoch.step
            active = training.rank == 0
            with Log(options.output, active=active, tensorboard=options.tensorboard, step=step) as log:
                training.run(stop, log)
    except DeployNormError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted: --resume continues from what was saved last", file=sys.stderr)
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if not stop.agreed:
        return 0
    if active:
        epoch, done = len(training.history) + 1, training.epoch.step
        print(
            f"stopped after step {done} of {training.batches.steps} of epoch {epoch}: "
            "the same command with --resume continues",
            file=sys.stderr,
        )
    return 128 + stop.agreed


if __name__ == "__main__":
    sys.exit(main())
