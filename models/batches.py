"""The images of each process and step, and their layout."""

from __future__ import annotations

import argparse

import numpy as np
import torch
from torch import Tensor

from deploynorm.errors import InputError

from . import data

__all__ = ["Batches", "random_seed"]


def random_seed(*path: int) -> int:
    """A seed derived from several numbers, such as (seed, epoch, step, process)."""
    return int(np.random.SeedSequence(path).generate_state(1)[0])


class Batches:
    """The data as one process sees it.

    Attributes:
        images: The data set.
        steps: Steps of an epoch; a last incomplete batch is dropped.

    Raises:
        InputError: The batch size does not divide, or is larger than the data.
    """

    def __init__(
        self, images: data.ImageData, options: argparse.Namespace, rank: int, processes: int, device: torch.device
    ) -> None:
        self.images, self.device = images, device
        self._size, self._seed = options.batch_size, options.seed
        self._shift: int = options.shift
        self._mine = slice(rank, None, processes)
        self._memory_format = torch.channels_last if options.channels_last else torch.contiguous_format
        self._mean, self._std = (
            torch.tensor(values, device=device).view(1, -1, 1, 1) for values in (images.mean(), images.std())
        )
        count = len(images.train_images)
        self.steps: int = count // self._size
        if self.steps == 0 or self._size % (processes * options.accumulate):
            raise InputError(
                "--batch-size",
                "it must divide among the processes and the parts of --accumulate, and not exceed the data",
                got=self._size,
                expected=f"a multiple of {processes} * {options.accumulate}, at most {count}",
            )

    def order(self, epoch: int) -> Tensor:
        """Every index of the training images once."""
        generator = torch.Generator().manual_seed(random_seed(self._seed, epoch))
        return torch.randperm(len(self.images.train_images), generator=generator)

    def training(self, order: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """uint8 images, augmented with torch's default generator, and classes of one step of an epoch."""
        batch = order[step * self._size :][: self._size][self._mine]
        images = self.images.train_images[batch]
        images = data.augment(images, self._shift, self.images.mirror, torch.default_generator)
        return images, self.images.train_classes[batch]

    def test(self) -> list[tuple[Tensor, Tensor]]:
        """This process's part of the test images, in batches, and their classes."""
        images, classes = self.images.test_images[self._mine], self.images.test_classes[self._mine]
        return list(zip(torch.split(images, 256), torch.split(classes, 256), strict=True))

    def to_input(self, images: Tensor) -> Tensor:
        """uint8 images, normalized, on the device of the network."""
        normalized = (images.to(self.device) / 255 - self._mean) / self._std
        return normalized.contiguous(memory_format=self._memory_format)
