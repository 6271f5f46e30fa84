"""SGD with a normalization batch smaller than its batch, as on several devices with few images each.

Every step takes 32 images, so that the optimiser sees the same whatever the normalization. The layers see them in
micro-batches of the normalization batch, and the gradients of the micro-batches are averaged. How that is computed
depends on the layer:

    bn    statistics of the micro-batch: one pass over the 32 images, each BN split into its micro-batches
    mabn  moving averages over the micro-batches before: one forward and backward pass for each, one after the other
    gn, frn  no statistics shared between images: one pass over the 32 images, whatever the normalization batch

The order of the images is one of two. "random": any order. "correlated": the images come in pairs of one class, and
the pairs in any order. A normalization batch of 2 is then of one class, one of 32 holds 16 such pairs. The 32 images
of a step are the same for every normalization and every normalization batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from deploynorm.layers import parameter_groups
from deploynorm.models import frn_resnet, mabn_resnet
from deploynorm.models.data import ImageData
from deploynorm.models.training import compilation
from deploynorm.models.training.optimization import lr_factor

__all__ = [
    "BATCH_FREE",
    "GROUPS",
    "GroupedBatchNorm2d",
    "Groups",
    "Norm",
    "Pixels",
    "Recipe",
    "SGD_BATCH",
    "accuracy",
    "build",
    "epoch_steps",
    "image_order",
    "pixels",
    "train",
    "with_population_statistics",
]

Norm = Literal["bn", "gn", "frn", "mabn"]
Groups = Literal["random", "correlated"]

SGD_BATCH = 32
"""Images of one step of the optimiser."""

GROUPS: tuple[Groups, ...] = ("random", "correlated")

BATCH_FREE = ("gn", "frn")
"""Normalizations that see each image alone."""


class GroupedBatchNorm2d(nn.BatchNorm2d):
    """BN with statistics of each `group` consecutive images, as if they came in batches of that size."""

    def __init__(self, num_features: int, group: int) -> None:
        super().__init__(num_features)
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        return torch.cat([super(GroupedBatchNorm2d, self).forward(images) for images in torch.split(x, self.group)])


class Recipe(NamedTuple):
    """The settings that all normalizations share."""

    epochs: int
    lr: float
    depths: tuple[int, ...]
    width: int
    weight_decay: float = 5e-4
    warmup_epochs: float = 1.0


class Pixels(NamedTuple):
    """A data set, ready for the networks: images float32 (N, C, H, W) of mean 0 and deviation 1, classes int64 (N,)."""

    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor
    num_classes: int


def pixels(images: ImageData, count: int, pool: int, device: torch.device) -> Pixels:
    """The first `count` training images and all test images, each averaged over pool x pool windows."""
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (images.mean(), images.std()))

    def to_input(part: Tensor) -> Tensor:
        return F.avg_pool2d((part / 255 - mean) / std, pool).to(device)

    return Pixels(
        to_input(images.train_images[:count]),
        images.train_classes[:count].to(device),
        to_input(images.test_images),
        images.test_classes.to(device),
        len(images.labels),
    )


def build(norm: Norm, norm_batch: int, recipe: Recipe, num_classes: int, in_channels: int) -> nn.Module:
    """A ResNet of basic blocks with that normalization; with MABN its convolutions are centred."""
    if norm == "frn":
        return frn_resnet.ResNet(frn_resnet.BasicBlock, recipe.depths, recipe.width, "small", num_classes, in_channels)
    model = mabn_resnet.ResNet(
        mabn_resnet.BasicBlock, recipe.depths, recipe.width, "small", num_classes, in_channels, norm
    )
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, GroupedBatchNorm2d(child.num_features, norm_batch))
    return model


def epoch_steps(classes: Tensor) -> int:
    """Steps of an epoch: the number that both orders fill."""
    return int((torch.bincount(classes) // 2 * 2).sum()) // SGD_BATCH


def image_order(classes: Tensor, groups: Groups, generator: np.random.Generator) -> Tensor:
    """Indices of the images of one epoch, none twice.

    With "correlated" the images 2k and 2k + 1 are of one class; of a class with an odd number of images a random one
    is dropped.
    """
    order = generator.permutation(len(classes))
    if groups == "correlated":
        classes_there = classes.cpu().numpy()[order]
        by_class = [order[classes_there == number] for number in np.unique(classes_there)]
        pairs = np.concatenate([images[: len(images) // 2 * 2].reshape(-1, 2) for images in by_class])
        order = generator.permutation(pairs).reshape(-1)
    return torch.from_numpy(order)


def train(
    norm: Norm,
    norm_batch: int,
    groups: Groups,
    seed: int,
    recipe: Recipe,
    data: Pixels,
    *,
    compiled: bool = False,
    advance: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[nn.Module, float]:
    """Trains a network from scratch; the seed determines its weights and the order of the images.

    Args:
        compiled: Whether the training step uses torch.compile.
        advance: Called after each step with the number of steps done and of all steps.

    Returns:
        The network, and the mean training loss of the last epoch: NaN where training diverged.
    """
    torch.manual_seed(seed)
    device = data.train_images.device
    model = build(norm, norm_batch, recipe, data.num_classes, data.train_images.shape[1]).to(device)
    step_model: Callable[[Tensor], Tensor] = compilation.compiled(model) if compiled else model
    optimizer = torch.optim.SGD(parameter_groups(model, recipe.weight_decay), lr=recipe.lr, momentum=0.9, nesterov=True)
    steps = epoch_steps(data.train_classes)
    warmup, total = round(recipe.warmup_epochs * steps), recipe.epochs * steps
    passes = SGD_BATCH // norm_batch if norm == "mabn" else 1
    loss_sum = torch.zeros((), device=device)
    model.train()
    for epoch in range(recipe.epochs):
        order = image_order(data.train_classes, groups, np.random.default_rng((seed, epoch)))
        loss_sum.zero_()
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * lr_factor(epoch * steps + step, warmup, total)
            optimizer.zero_grad()
            for chosen in order[step * SGD_BATCH :][:SGD_BATCH].chunk(passes):
                loss = F.cross_entropy(step_model(data.train_images[chosen]), data.train_classes[chosen]) / passes
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += loss.detach()
            optimizer.step()
            advance(epoch * steps + step + 1, total)
    loss_mean = float(loss_sum) / steps
    return model, loss_mean if math.isfinite(loss_mean) else math.nan


@torch.no_grad()
def accuracy(model: nn.Module, data: Pixels) -> float:
    """Test accuracy of the network in evaluation mode, from 0 to 1."""
    model.eval()
    batches = zip(torch.split(data.test_images, 500), torch.split(data.test_classes, 500), strict=True)
    correct = [(model(images).argmax(1) == classes).sum() for images, classes in batches]
    return int(torch.stack(correct).sum()) / len(data.test_classes)


def with_population_statistics(model: nn.Module, data: Pixels) -> nn.Module:
    """A copy whose BN layers have the statistics of up to 4,000 training images, averaged over batches of 500.

    They contain neither the noise of a running average nor an effect of the micro-batches.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, GroupedBatchNorm2d):
            module.group = 500
    update_bn(torch.split(data.train_images[:4000], 500), model)
    return model
