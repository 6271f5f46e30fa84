"""The batch-size study: what its training computes, what it finds on real digits, and its command."""

from __future__ import annotations

import os
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tolerances import EXACT, FLOAT64
from torch import nn

from deploynorm.layers import MABN2d
from deploynorm.models import batch_size_study as study
from deploynorm.models import batch_size_training as training
from deploynorm.models import data, frn_resnet, mabn_resnet
from deploynorm.models.batch_size_results import Results, Run, Settings, draw, read_rows, row_of, table
from deploynorm.models.training.optimization import lr_factor, parameter_groups

ROOT = Path(__file__).parents[2]
NORMS = ["bn", "gn", "frn", "mabn"]
SHALLOW = training.Recipe(epochs=2, lr=0.1, depths=(1, 1), width=8)


@pytest.fixture
def numbers(monkeypatch):
    """Images of noise in float64, 70 in classes of odd and even size, and networks in float64."""
    monkeypatch.setattr(mabn_resnet, "MABN2d", partial(MABN2d, warmup=1, renorm_start=3))
    torch.set_default_dtype(torch.float64)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(70, 1, 6, 6, generator=generator)
    classes = torch.tensor([0] * 23 + [1] * 17 + [2] * 30)[torch.randperm(70, generator=generator)]
    yield training.Pixels(images, classes, images[:10], classes[:10], num_classes=3)
    torch.set_default_dtype(torch.float32)


def true_micro_batches(norm, norm_batch, groups, seed, recipe, pixels):
    """Trains as it stands in the books: a forward and a backward pass for each micro-batch, and no layer of ours."""
    torch.manual_seed(seed)
    package = frn_resnet if norm == "frn" else mabn_resnet
    options = () if norm == "frn" else (norm,)
    model = package.ResNet(package.BasicBlock, recipe.depths, recipe.width, "small", 3, 1, *options)
    optimizer = torch.optim.SGD(parameter_groups(model, recipe.weight_decay), lr=0.0, momentum=0.9, nesterov=True)
    for step in range(2 * recipe.epochs):
        order = training.image_order(pixels.train_classes, groups, np.random.default_rng((seed, step // 2)))
        of_step = order[step % 2 * 32 : step % 2 * 32 + 32]
        for group in optimizer.param_groups:
            group["lr"] = recipe.lr * lr_factor(step, 2, 2 * recipe.epochs)
        for first in range(0, 32, norm_batch):
            chosen = of_step[first : first + norm_batch]
            loss = F.cross_entropy(model(pixels.train_images[chosen]), pixels.train_classes[chosen])
            (loss * norm_batch / 32).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("groups", training.GROUPS)
@pytest.mark.parametrize("norm_batch", [2, 8, 32])
@pytest.mark.parametrize("norm", NORMS)
def test_every_normalization_gets_what_micro_batches_with_accumulated_gradients_give(numbers, norm, norm_batch, groups):
    """In one pass too: BN split into groups, and GN and FRN, which take each image by itself."""
    model, _ = training.train(norm, norm_batch, groups, 3, SHALLOW, numbers)
    want = true_micro_batches(norm, norm_batch, groups, 3, SHALLOW, numbers)
    torch.testing.assert_close(model.state_dict(), want.state_dict(), **FLOAT64.kwargs())
    assert training.accuracy(model, numbers) == training.accuracy(want, numbers)


@pytest.mark.parametrize("norm", NORMS)
def test_the_normalization_batch_matters_to_bn_and_mabn_alone(numbers, norm):
    weights = [training.train(norm, size, "random", 0, SHALLOW, numbers)[0].state_dict() for size in (2, 32)]
    equal = all(torch.equal(two, all_32) for two, all_32 in zip(*(state.values() for state in weights), strict=True))
    assert equal == (norm in training.BATCH_FREE)


def test_a_step_takes_the_same_images_whatever_the_normalization(numbers):
    seen = {}

    def note(module, inputs):
        if isinstance(module, mabn_resnet.ResNet | frn_resnet.ResNet):
            seen.setdefault(run, []).append(inputs[0])

    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        for run in [("bn", 2), ("bn", 32), ("gn", 2), ("frn", 4), ("mabn", 2), ("mabn", 16)]:
            training.train(*run, "correlated", 0, SHALLOW, numbers)
    finally:
        handle.remove()
    assert [len(batch) for batch in seen["mabn", 2]] == [2] * 64
    for batches in seen.values():
        torch.testing.assert_close(torch.cat(batches), torch.cat(seen["bn", 32]), **EXACT.kwargs())


def test_correlated_images_come_in_pairs_of_one_class_each_once(numbers):
    classes = numbers.train_classes
    left_out = set()
    for epoch in range(8):
        order = training.image_order(classes, "correlated", np.random.default_rng((0, epoch)))
        assert len(order) == len(set(order.tolist())) == 68
        assert torch.equal(classes[order[0::2]], classes[order[1::2]])
        # The pairs themselves come in any order: all of one class in a row would be another experiment.
        assert len(set(classes[order[:32]].tolist())) == 3
        left_out |= set(range(70)) - set(order.tolist())
    assert len(left_out) > 8


def test_random_images_come_each_once_and_in_another_order_in_each_epoch(numbers):
    first, second = (
        training.image_order(numbers.train_classes, "random", np.random.default_rng((0, epoch))) for epoch in (0, 1)
    )
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(70))
    assert not torch.equal(first, second)
    assert training.epoch_steps(numbers.train_classes) == 2


def test_population_statistics_are_those_of_the_training_images(numbers):
    model, _ = training.train("bn", 2, "correlated", 0, SHALLOW, numbers)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    other = training.with_population_statistics(model, numbers)
    stem = model.stem[0](numbers.train_images)
    torch.testing.assert_close(other.stem[1].running_mean, stem.mean((0, 2, 3)), **FLOAT64.kwargs())
    torch.testing.assert_close(other.stem[1].running_var, stem.var((0, 2, 3)), **FLOAT64.kwargs())
    torch.testing.assert_close(model.state_dict(), before, **EXACT.kwargs())


def on_digits(norm):
    """Test accuracy after three epochs with a normalization batch of 2, in pairs of one class; seed 0."""
    digits = training.pixels(data.load("digits"), 1433, 1, torch.device("cpu"))
    recipe = training.Recipe(epochs=3, lr=0.1, depths=(1, 1, 1), width=16)
    model, _ = training.train(norm, 2, "correlated", 0, recipe, digits)
    return training.accuracy(model, digits)
