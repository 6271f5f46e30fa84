"""The training recipe: what it computes, what it writes, and that stopping it costs nothing."""

from __future__ import annotations

import csv
import importlib
import io
import math
import re
import subprocess
import sys

import pytest
import torch
from tolerances import EXACT, FLOAT64
from torch import nn

from deploynorm.models import data, frn_resnet, mabn_resnet, train

NORMS = ["frn", "mabn", "bn", "gn"]
FILES = ["curve.png", "last.pt", "log.csv", "model.pt"]


def run(norm, output, *arguments):
    return train.main(
        ["--norm", norm, "--data", "digits", "--threads", "1", "--batch-size", "32", "-o", str(output), *arguments]
    )


def load(path):
    return torch.load(path, weights_only=True)


def read_log(folder):
    with (folder / "log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Runs the recipe once for each norm that is asked for, and gives the folder that it filled."""
    folders = {}

    def folder(norm):
        if norm not in folders:
            folders[norm] = tmp_path_factory.mktemp(norm)
            assert run(norm, folders[norm], "--epochs", "8", "--lr", "0.2", "--shift", "0") == 0
        return folders[norm]

    return folder


@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_learns_the_digits(trained, norm):
    checkpoint = load(trained(norm) / "model.pt")
    assert checkpoint["training"]["accuracy"] >= 0.95


@pytest.mark.parametrize("norm", NORMS)
def test_the_checkpoint_alone_gives_the_accuracy_that_it_claims(trained, norm):
    checkpoint = load(trained(norm) / "model.pt")
    module, function = checkpoint["factory"].split(":")
    model = getattr(importlib.import_module(module), function)(**checkpoint["kwargs"])
    model.load_state_dict(checkpoint["state_dict"])
    images = data.load("digits")
    mean, std = (torch.tensor(checkpoint["input"][key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        predicted = model.eval()((images.test_images / 255 - mean) / std).argmax(1)
    accuracy = (predicted == images.test_classes).float().mean().item()
    # Another batch size rounds otherwise: one image on the border may change sides.
    assert accuracy == pytest.approx(checkpoint["training"]["accuracy"], abs=1.5 / len(predicted))


def test_the_checkpoint_says_how_it_was_made_and_what_it_takes(trained):
    path = trained("mabn") / "model.pt"
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
    assert (training["dataset"], training["epochs"], training["seed"]) == ("digits", 8, 0)
    assert type(training["torch"]) is str
    assert {t.device.type for t in checkpoint["state_dict"].values()} == {"cpu"}
    assert path.stat().st_size < 2_000_000


def test_the_log_has_a_row_for_each_epoch_and_the_curve_is_a_png(trained):
    folder = trained("frn")
    rows = read_log(folder)
    assert [int(row["epoch"]) for row in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    accuracy = load(folder / "model.pt")["training"]["accuracy"]
    assert float(rows[-1]["test_accuracy"]) == pytest.approx(accuracy, abs=1e-6)
    assert (folder / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in folder.iterdir()) == FILES


def stop_in_epoch(monkeypatch, number):
    """Makes Ctrl-C arrive at the end of the training steps of that epoch, counted from 1."""
    evaluate, calls = train.Training.evaluate, []

    def interrupted(self):
        calls.append(None)
        if len(calls) == number:
            raise KeyboardInterrupt
        return evaluate(self)

    monkeypatch.setattr(train.Training, "evaluate", interrupted)


@pytest.mark.parametrize("norm", ["frn", "mabn"])
def test_a_stopped_and_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, monkeypatch, norm):
    assert run(norm, tmp_path / "whole", "--epochs", "2") == 0
    with monkeypatch.context() as patch:
        stop_in_epoch(patch, 2)
        assert run(norm, tmp_path / "stopped", "--epochs", "2") == 130
    assert not (tmp_path / "stopped" / "model.pt").exists()
    assert [row["epoch"] for row in load(tmp_path / "stopped" / "last.pt")["history"]] == [1]
    assert run(norm, tmp_path / "stopped", "--epochs", "2", "--resume") == 0

    whole, resumed = load(tmp_path / "whole" / "model.pt"), load(tmp_path / "stopped" / "model.pt")
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], **EXACT.kwargs())
    assert resumed["training"]["accuracy"] == whole["training"]["accuracy"]
    # The command is that of the run, which --resume does not change.
    assert "--resume" not in resumed["training"]["command"]


@pytest.mark.parametrize("norm", ["mabn", "bn"])
def test_evaluation_leaves_the_statistics_alone(norm):
    options = train.build_parser().parse_args(["--norm", norm, "--data", "digits"])
    options.processes = 1
    training = train.Training(options, "")
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}
    training.evaluate()
    torch.testing.assert_close(training.model.state_dict(), before, **EXACT.kwargs())


def test_another_seed_gives_other_weights(tmp_path):
    for seed in ("1", "2"):
        assert run("bn", tmp_path / seed, "--epochs", "1", "--seed", seed) == 0
    first, second = (load(tmp_path / seed / "model.pt")["state_dict"]["fc.weight"] for seed in ("1", "2"))
    assert not torch.equal(first, second)


def test_ctrl_c_in_the_first_epoch_leaves_no_checkpoint(tmp_path, monkeypatch, capsys):
    stop_in_epoch(monkeypatch, 1)
    assert run("bn", tmp_path / "run", "--epochs", "1") == 130
    assert not (tmp_path / "run").exists()
    assert "interrupted" in capsys.readouterr().err


def test_resuming_a_finished_run_writes_its_results_again(trained):
    path = trained("bn") / "model.pt"
    before = path.read_bytes()
    path.unlink()
    assert run("bn", trained("bn"), "--epochs", "8", "--lr", "0.2", "--shift", "0", "--resume") == 0
    torch.testing.assert_close(load(path)["state_dict"], load(io.BytesIO(before))["state_dict"], **EXACT.kwargs())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--resume"], 2, "no .*last.pt.*-o/--output"),
        (["--data", "cifar"], 2, "no such data set"),
        (["--batch-size", "100000"], 2, "--batch-size.*at most 1433"),
        (["--lr", "1e30", "--epochs", "1"], 2, "loss of epoch 1 is not finite.*lower --lr"),
    ],
    ids=["nothing to resume", "unknown data", "batch past the data", "diverged"],
)
def test_a_foreseen_fault_is_one_line_and_an_exit_code(tmp_path, capsys, arguments, code, message):
    assert run("frn", tmp_path / "run", *arguments) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_resume_refuses_another_recipe(trained, capsys):
    assert run("frn", trained("frn"), "--resume", "--epochs", "9", "--lr", "0.2", "--shift", "0") == 2
    assert "had another epochs. Got 9; expected 8" in capsys.readouterr().err


def test_without_matplotlib_no_training_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run("bn", tmp_path / "run") == 3
    assert "pip install 'deploynorm[train]'" in capsys.readouterr().err


@pytest.mark.parametrize("argument", ["--epochs=0", "--batch-size=0", "--threads=0", "--shift=-1", "--norm=ln"])
def test_an_argument_out_of_range_is_a_usage_error(argument, capsys):
    with pytest.raises(SystemExit, match="2"):
        train.main(["--norm", "frn", argument])
    assert argument.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    "model",
    [
        frn_resnet.resnet20(learned_eps="layer"),
        frn_resnet.resnet20(learned_eps="channel"),
        mabn_resnet.resnet20(norm="mabn"),
        mabn_resnet.resnet20(norm="bn"),
        mabn_resnet.resnet20(norm="gn"),
    ],
    ids=["frn, eps per layer", "frn, eps per channel", "mabn", "bn", "gn"],
)
def test_weights_of_convolutions_and_the_classifier_decay_and_nothing_else_does(model):
    decaying, others = train.parameter_groups(model, 0.01)
    assert (decaying["weight_decay"], others["weight_decay"]) == (0.01, 0.0)
    want = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert {id(p) for p in decaying["params"]} == want
    assert {id(p) for p in others["params"]} == {id(p) for p in model.parameters()} - want


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


def test_two_processes_take_the_step_that_one_does(tmp_path):
    # MABN: its statistics have to be those of both processes, and its gradients the mean of theirs. One step, and of
    # float64, because at this learning rate a few steps make anything of a difference in the last bit.
    arguments = ["--data", "digits", "--norm", "mabn", "--epochs", "1", "--batch-size", "1024", "--shift", "0"]
    arguments += ["--threads", "1"]
    torch.set_default_dtype(torch.float64)
    try:
        assert train.main([*arguments, "-o", str(tmp_path / "one")]) == 0
    finally:
        torch.set_default_dtype(torch.float32)

    script = tmp_path / "float64.py"
    script.write_text(
        "import runpy, torch\n"
        "torch.set_default_dtype(torch.float64)\n"
        "runpy.run_module('deploynorm.models.train', run_name='__main__')\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, str(script), *arguments, "-o", str(tmp_path / "two")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/1") == done.stdout.count("model.pt") == 1
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == FILES

    one, two = load(tmp_path / "one" / "model.pt"), load(tmp_path / "two" / "model.pt")
    assert two["training"]["command"].startswith("torchrun --nproc-per-node 2 -m deploynorm.models.train ")
    assert read_log(tmp_path / "two")[0]["train_loss"] == read_log(tmp_path / "one")[0]["train_loss"]
    for name, tensor in one["state_dict"].items():
        # The gradients behind recent_gz are those of each process's own mean loss: larger by the processes.
        got = two["state_dict"][name] / 2 if name.endswith(".recent_gz") else two["state_dict"][name]
        torch.testing.assert_close(got, tensor, **FLOAT64.kwargs(), msg=lambda text, name=name: f"{name}: {text}")
