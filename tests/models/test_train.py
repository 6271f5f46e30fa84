"""The training recipe: what it computes and what it writes."""

from __future__ import annotations

import math
import re
import sys

import pytest
import torch
from tolerances import EXACT
from train_runs import FILES, few_digits, load, read_log, run, short_runs

import deploynorm
from deploynorm.models import data, train
from deploynorm.models.training import options as training_options


@pytest.fixture(autouse=True)
def _short_runs(request, monkeypatch):
    if "slow" not in request.keywords:
        short_runs(monkeypatch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run on a few digits, with its curve."""
    folder, draw_curve = tmp_path_factory.mktemp("trained"), train.draw_curve
    with pytest.MonkeyPatch.context() as patch:
        short_runs(patch)
        patch.setattr(train, "draw_curve", draw_curve)
        assert run("mabn", folder, "--epochs", "4", "--lr", "0.2", "--shift", "0", "--warmup-epochs", "0") == 0
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["frn", "mabn", "bn", "gn"])
def test_each_norm_learns_the_digits_and_the_checkpoint_alone_gives_that_accuracy(tmp_path, norm):
    assert run(norm, tmp_path, "--epochs", "4", "--lr", "0.2", "--shift", "0") == 0
    checkpoint = load(tmp_path / "model.pt")
    assert checkpoint["training"]["accuracy"] >= 0.95
    model = deploynorm.load(tmp_path / "model.pt").model
    images = data.load("digits")
    mean, std = (torch.tensor(checkpoint["input"][key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        predicted = model((images.test_images / 255 - mean) / std).argmax(1)
    accuracy = (predicted == images.test_classes).float().mean().item()
    # Another batch size rounds otherwise: one image on the border may change sides.
    assert accuracy == pytest.approx(checkpoint["training"]["accuracy"], abs=1.5 / len(predicted))


def test_the_checkpoint_says_how_it_was_made_and_what_it_takes(trained):
    path = trained / "model.pt"
    checkpoint = load(path)
    assert checkpoint["format"] == "deploynorm"
    assert checkpoint["factory"] == "deploynorm.models.mabn_resnet:resnet20"
    assert checkpoint["kwargs"] == {"num_classes": 10, "in_channels": 1, "norm": "mabn"}
    assert checkpoint["labels"] == list("0123456789")
    assert checkpoint["input"]["shape"] == [1, 8, 8]
    assert checkpoint["input"]["mean"] == pytest.approx([data.load("digits").mean()[0]])
    assert checkpoint["input"]["std"] == pytest.approx([data.load("digits").std()[0]])
    training = checkpoint["training"]
    assert training["command"].startswith("python -m deploynorm.models.train --norm mabn --data digits ")
    assert (training["dataset"], training["epochs"], training["seed"]) == ("digits", 4, 0)
    assert type(training["torch"]) is str
    assert {t.device.type for t in checkpoint["state_dict"].values()} == {"cpu"}
    assert path.stat().st_size < 2_000_000


def test_the_log_has_a_row_for_each_epoch_and_the_curve_is_a_png(trained):
    rows = read_log(trained)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4]
    assert [int(row["step"]) for row in rows] == [3, 6, 9, 12]
    assert [float(row["lr"]) for row in rows] == sorted((float(row["lr"]) for row in rows), reverse=True)
    assert {row["loss_scale"] for row in rows} == {"1"}
    assert all(float(row["images_per_second"]) > 0 for row in rows)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    accuracy = load(trained / "model.pt")["training"]["accuracy"]
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    assert (trained / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in trained.iterdir()) == ["curve.png", *FILES]


@pytest.mark.parametrize("norm", ["mabn", "bn"])
def test_evaluation_leaves_the_statistics_alone(norm):
    options = training_options.build_parser().parse_args(["--norm", norm, "--data", "digits", "--batch-size", "32"])
    options.processes = 1
    training = train.Training(options, "", torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.evaluate()
    torch.testing.assert_close(training.model.state_dict(), before, **EXACT.kwargs())


def test_another_seed_gives_other_weights(tmp_path):
    for seed in ("1", "2"):
        assert run("bn", tmp_path / seed, "--epochs", "1", "--seed", seed) == 0
    first, second = (load(tmp_path / seed / "model.pt")["state_dict"]["fc.weight"] for seed in ("1", "2"))
    assert not torch.equal(first, second)


FAULTS = {
    "nothing to resume": (["--resume"], "no .*last.pt.*-o/--output"),
    "unknown data": (["--data", "cifar"], "no such data set"),
    "batch past the data": (["--batch-size", "100000"], "--batch-size.*at most 96"),
    "uneven parts": (
        ["--batch-size", "30", "--accumulate", "4"],
        r"--accumulate.*Got 30; expected a multiple of 1 \* 4",
    ),
    "diverged": (["--lr", "1e30", "--epochs", "1"], "loss is not finite by step 3.*lower --lr"),
    "no folder": (["-o", "/dev/null/run"], "output /dev/null/run.*no folder can be made there"),
}


@pytest.mark.parametrize(("arguments", "message"), FAULTS.values(), ids=FAULTS)
def test_a_foreseen_fault_is_one_line_and_an_exit_code(tmp_path, capsys, arguments, message):
    assert run("frn", tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_a_loss_that_is_not_finite_ends_a_long_epoch_early(tmp_path, monkeypatch, capsys):
    few_digits(monkeypatch, train_images=320)
    monkeypatch.setattr(train, "LOG_STEPS", 2)
    assert run("bn", tmp_path / "run", "--lr", "1e30") == 2
    step = int(re.search(r"the loss is not finite by step (\d+)", capsys.readouterr().err)[1])
    assert step < 10
    assert not (tmp_path / "run" / "last.pt").exists()


def test_every_option_has_a_line_of_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        train.main(["--help"])
    text = capsys.readouterr().out
    options = [action for action in training_options.build_parser()._actions if action.dest != "help"]
    assert len(options) > 15
    for action in options:
        assert action.help, action.dest
        assert "\n" not in action.help
        assert all(name in text for name in action.option_strings)


def test_without_matplotlib_no_training_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("bn", tmp_path / "run") == 3
    assert "pip install 'deploynorm[train]'" in capsys.readouterr().err


USAGE_ERRORS = [
    "--epochs=0",
    "--batch-size=0",
    "--threads=0",
    "--shift=-1",
    "--seed=-1",
    "--accumulate=0",
    "--accumulate=two",
    "--lr=0",
    "--lr=nan",
    "--lr=inf",
    "--warmup-epochs=-1",
    "--weight-decay=-1",
    "--label-smoothing=1.1",
    "--ema=1",
    "--norm=ln",
    "--amp=f8",
]


@pytest.mark.parametrize("argument", USAGE_ERRORS)
def test_an_argument_out_of_range_is_a_usage_error(argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--norm", "frn", argument])
    assert argument.split("=")[0] in capsys.readouterr().err


def test_the_learning_rate_climbs_from_near_0_to_the_peak_and_falls_to_near_0():
    factors = [train.lr_factor(step, 10, 50) for step in range(50)]
    assert 0 < factors[0] < 0.03
    assert factors[10] == 1 == max(factors)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[-1] < 0.01
    assert train.lr_factor(0, 0, 50) == 1
    assert train.lr_factor(30, 10, 50) == pytest.approx(0.5)
    assert all(math.isfinite(train.lr_factor(step, 60, 50)) for step in range(50))
