"""The checkpoints and sample images that come with the project."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

import deploynorm

MODELS = Path(__file__).parents[2] / "models"
SHIPPED = ["frn_resnet20_fashion", "mabn_resnet20_fashion"]
SAMPLES = ["ankle_boot", "pullover", "trouser"]


def load(name):
    return torch.load(MODELS / f"{name}.pt", weights_only=True)


def sample(name):
    from PIL import Image

    with Image.open(MODELS / "samples" / f"{name}.png") as image:
        return torch.from_numpy(np.array(image))


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_is_small_and_says_how_it_was_made(name):
    checkpoint = load(name)
    training = checkpoint["training"]
    assert (MODELS / f"{name}.pt").stat().st_size < 2_000_000
    assert training["command"].startswith(f"python -m deploynorm.models.train --norm {name.split('_')[0]} ")
    assert training["dataset"] == "fashion-mnist"
    assert checkpoint["input"]["shape"] == [1, 28, 28]
    with (MODELS / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == training["epochs"]
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(training["accuracy"], abs=1e-6)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_checkpoint_names_the_samples(name):
    checkpoint = load(name)
    pixels = torch.stack([sample(each) for each in SAMPLES])[:, None]
    with torch.no_grad():
        outputs = deploynorm.load(MODELS / f"{name}.pt").model(
            (pixels / 255 - checkpoint["input"]["mean"][0]) / checkpoint["input"]["std"][0]
        )
    assert [checkpoint["labels"][index].lower().replace(" ", "_") for index in outputs.argmax(1)] == SAMPLES


def test_the_samples_are_test_images_of_the_class_in_their_name(fashion_mnist):
    for name in SAMPLES:
        found = (fashion_mnist.test_images[:, 0] == sample(name)).all((1, 2)).nonzero()
        label = fashion_mnist.labels[int(fashion_mnist.test_classes[int(found[0])])]
        assert label.lower().replace(" ", "_") == name
