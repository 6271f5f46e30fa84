"""Stopping the training recipe costs nothing: a resumed run ends with the bits of one that was never stopped."""

from __future__ import annotations

import io
import os
import shutil
import signal
from functools import partial

import pytest
import torch
from tolerances import EXACT
from train_runs import assert_same_run, during_step, load, read_log, run, short_runs

from deploynorm.models import train

STEPS = 6
"""Steps of an epoch here: 96 images in batches of 16."""


@pytest.fixture(autouse=True, scope="module")
def _short_runs():
    with pytest.MonkeyPatch.context() as patch:
        short_runs(patch)
        # The loss scale then changes during the run, as it does in long ones.
        patch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=256.0, growth_interval=2))
        yield


@pytest.fixture(scope="module")
def whole_bn(_short_runs, tmp_path_factory):
    """The folder of a run with BN that was not stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert short_run("bn", folder) == 0
    return folder


def short_run(norm, output, *arguments):
    return run(norm, output, "--epochs", "2", "--batch-size", "16", *arguments)


def interrupt(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def stop_in_step(monkeypatch, number, norm, output, *arguments, by=signal.SIGINT):
    with monkeypatch.context() as patch:
        during_step(patch, number, lambda: interrupt(by))
        return short_run(norm, output, *arguments)


RUNS = [
    "frn",
    "mabn",
    "gn",
    "frn --amp bf16 --accumulate 2 --ema 0.9",
    "frn --amp fp16 --channels-last",
    "mabn --amp fp16 --accumulate 2 --ema 0.9",
    "bn --ema 0.9",
    "gn --compile",
]


@pytest.mark.parametrize("arguments", RUNS)
def test_a_run_that_is_stopped_within_an_epoch_and_resumed_ends_as_one_that_is_not(tmp_path, monkeypatch, arguments):
    norm, *options = arguments.split()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    assert short_run(norm, tmp_path / "whole", *options) == 0
    assert stop_in_step(monkeypatch, STEPS + 2, norm, tmp_path / "stopped", *options) == 130
    assert not (tmp_path / "stopped" / "model.pt").exists()
    last = load(tmp_path / "stopped" / "last.pt")
    assert ([row["epoch"] for row in last["history"]], last["epoch"]["step"]) == ([1], 2)
    if "fp16" in options:
        assert last["scaler"]["scale"] > 256
    assert short_run(norm, tmp_path / "stopped", *options, "--resume") == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    # The command is that of the run, which --resume does not change.
    assert "--resume" not in load(tmp_path / "stopped" / "model.pt")["training"]["command"]


@pytest.mark.parametrize("step", [1, STEPS, 2 * STEPS], ids=["first", "last of an epoch", "last of all"])
def test_any_step_can_be_the_last_before_a_stop(whole_bn, tmp_path, monkeypatch, step):
    assert stop_in_step(monkeypatch, step, "bn", tmp_path / "stopped") == 130
    last = load(tmp_path / "stopped" / "last.pt")
    assert len(last["history"]) * STEPS + last["epoch"]["step"] == step
    assert short_run("bn", tmp_path / "stopped", "--resume") == 0
    assert_same_run(tmp_path / "stopped", whole_bn)


def test_a_run_can_be_stopped_again_and_again(whole_bn, tmp_path, monkeypatch):
    for resume in ([], ["--resume"], ["--resume"]):
        assert stop_in_step(monkeypatch, 3, "bn", tmp_path / "stopped", *resume) == 130
    assert short_run("bn", tmp_path / "stopped", "--resume") == 0
    assert_same_run(tmp_path / "stopped", whole_bn)


def test_what_clusters_send_stops_a_run_as_ctrl_c_does_and_handlers_are_put_back(tmp_path, monkeypatch, capsys):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert stop_in_step(monkeypatch, 2, "bn", tmp_path / "run", by=signal.SIGTERM) == 143
    assert "stopped after step 2 of 6 of epoch 1: the same command with --resume" in capsys.readouterr().err
    assert load(tmp_path / "run" / "last.pt")["epoch"]["step"] == 2
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_a_second_ctrl_c_ends_at_once(tmp_path, monkeypatch, capsys):
    def twice():
        interrupt()
        interrupt()

    during_step(monkeypatch, STEPS + 2, twice)
    assert short_run("bn", tmp_path / "run") == 130
    assert "interrupted: --resume continues from what was saved last" in capsys.readouterr().err
    last = load(tmp_path / "run" / "last.pt")
    assert (len(last["history"]), last["epoch"]["step"]) == (1, 0)


def test_a_signal_during_evaluation_lets_it_finish(whole_bn, tmp_path, monkeypatch):
    evaluate = train.Training.evaluate

    def interrupted(self):
        interrupt()
        return evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(train.Training, "evaluate", interrupted)
        assert short_run("bn", tmp_path / "stopped") == 130
    last = load(tmp_path / "stopped" / "last.pt")
    assert (len(last["history"]), last["epoch"]["step"]) == (1, 1)
    assert short_run("bn", tmp_path / "stopped", "--resume") == 0
    assert_same_run(tmp_path / "stopped", whole_bn)


def test_resuming_a_finished_run_writes_its_results_again(whole_bn, tmp_path):
    before = (whole_bn / "model.pt").read_bytes()
    shutil.copy(whole_bn / "last.pt", tmp_path)
    path = tmp_path / "model.pt"
    assert short_run("bn", tmp_path, "--resume") == 0
    torch.testing.assert_close(load(path)["state_dict"], load(io.BytesIO(before))["state_dict"], **EXACT.kwargs())


@pytest.mark.parametrize("norm", ["frn", "mabn"])
def test_the_same_command_gives_the_same_bits(tmp_path, norm):
    for name in ("one", "two"):
        assert short_run(norm, tmp_path / name) == 0
    assert_same_run(tmp_path / "one", tmp_path / "two")
    assert len(read_log(tmp_path / "one")) == 2


@pytest.mark.parametrize("option", ["--epochs 3", "--accumulate 2", "--amp bf16", "--ema 0.9", "--norm gn"])
def test_resume_refuses_another_recipe(whole_bn, tmp_path, capsys, option):
    shutil.copy(whole_bn / "last.pt", tmp_path)
    before = (tmp_path / "last.pt").read_bytes()
    name, value = option.split()
    assert short_run("bn", tmp_path, "--resume", name, value) == 2
    assert f"last.pt had another {name[2:]}. Got {value}; expected " in capsys.readouterr().err
    assert (tmp_path / "last.pt").read_bytes() == before


def test_resume_refuses_a_damaged_file_and_one_of_another_version(whole_bn, tmp_path, capsys):
    path = tmp_path / "last.pt"
    whole = (whole_bn / "last.pt").read_bytes()
    last = load(whole_bn / "last.pt")
    faults = {"is damaged": [whole[: len(whole) // 2], b"", b"nothing of ours", b"\x80\x02\x8a\xff"], "version": []}
    for part in (last["model"]["fc.weight"].numpy().tobytes(), b"train_loss", b"little"):
        bits = bytearray(whole)
        bits[whole.find(part)] ^= 64
        faults["is damaged"].append(bytes(bits))
    spoiled = {**last, "model": {name: tensor[:1] for name, tensor in last["model"].items() if tensor.ndim}}
    buffer = io.BytesIO()
    torch.save(spoiled, buffer)
    faults["does not fit the run"] = [buffer.getvalue()]
    del last["recipe"]["amp"]
    for content in (last, {"model": last["model"]}, [1]):
        buffer = io.BytesIO()
        torch.save(content, buffer)
        faults["version"].append(buffer.getvalue())
    for message, contents in faults.items():
        for content in contents:
            path.write_bytes(content)
            assert short_run("bn", tmp_path, "--resume") == 2
            error = capsys.readouterr().err
            assert error.startswith("error: --resume: ")
            assert message in error
            assert error.count("\n") == 1
