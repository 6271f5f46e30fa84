"""What the options of the training recipe do: precision, layout, compilation, accumulation, averaging, logs."""

from __future__ import annotations

import os
import re
import signal
import sys
from functools import partial

import pytest
import torch
from tolerances import EXACT, FLOAT64
from torch import nn
from torch._inductor import config as inductor
from train_runs import FILES, during_step, in_float64, load, read_log, run, short_runs

from deploynorm import checkpoint
from deploynorm.models import mabn_resnet, train
from deploynorm.models.training import precision


@pytest.fixture(autouse=True)
def _short_runs(monkeypatch):
    short_runs(monkeypatch)


@pytest.fixture
def convolutions():
    """(input, output) of each convolution that runs while its network trains."""
    seen = []

    def note(module, inputs, output):
        if isinstance(module, nn.Conv2d) and module.training:
            seen.append((inputs[0], output))

    handle = nn.modules.module.register_module_forward_hook(note)
    yield seen
    handle.remove()


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.parametrize("norm", ["frn", "mabn"])
def test_amp_computes_convolutions_in_its_type_and_keeps_float32(tmp_path, convolutions, norm, amp):
    assert run(norm, tmp_path / "float32", "--epochs", "1") == 0
    assert {output.dtype for _, output in convolutions} == {torch.float32}
    convolutions.clear()
    assert run(norm, tmp_path / "amp", "--epochs", "1", "--amp", amp) == 0
    assert {output.dtype for _, output in convolutions} == {precision.AMP[amp]}
    state = load(tmp_path / "amp" / "model.pt")["state_dict"]
    assert {tensor.dtype for tensor in state.values()} <= {torch.float32, torch.int64}
    got, want = (read_log(tmp_path / name)[0] for name in ("amp", "float32"))
    assert float(got["train_loss"]) == pytest.approx(float(want["train_loss"]), rel=0.05)
    assert (float(got["loss_scale"]) > 1) == (amp == "fp16")
    assert want["loss_scale"] == "1"


def test_a_step_whose_scaled_gradients_overflow_is_left_out_and_the_scale_falls(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.amp, "GradScaler", partial(torch.amp.GradScaler, init_scale=2.0**40))
    assert run("bn", tmp_path, "--amp", "fp16", "--epochs", "1") == 0
    assert read_log(tmp_path)[0]["loss_scale"] == f"{2.0**37:.6g}"
    assert load(tmp_path / "last.pt")["optimizer"]["state"] == {}


def test_what_mabn_remembers_of_gradients_is_in_units_of_the_loss(tmp_path, monkeypatch):
    states, scales = [], []
    for interval in (1000, 1):
        scaler = partial(torch.amp.GradScaler, init_scale=2.0**10, growth_interval=interval)
        with monkeypatch.context() as patch:
            patch.setattr(torch.amp, "GradScaler", scaler)
            # The learning rate is so small that the networks stay the same, whatever float16 makes of small gradients.
            assert run("mabn", tmp_path / str(interval), "--amp", "fp16", "--epochs", "2", "--lr", "1e-6") == 0
        states.append(load(tmp_path / str(interval) / "model.pt")["state_dict"])
        scales.append(float(read_log(tmp_path / str(interval))[-1]["loss_scale"]))
    assert scales == [2**10, 2**16]
    fixed, grown = ({name: t for name, t in state.items() if name.endswith("recent_gz")} for state in states)
    largest = max(float(tensor[:, :-1].abs().max()) for tensor in fixed.values())
    assert largest > 1e-4
    torch.testing.assert_close(grown, fixed, rtol=0.02, atol=0.01 * largest)


def test_amp_that_torch_cannot_compute_in_is_refused_before_training(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("not implemented for 'Half'")

    monkeypatch.setattr(precision.F, "conv2d", refuse)
    assert run("bn", tmp_path / "run", "--amp", "fp16") == 3
    assert capsys.readouterr().err.startswith("error: --amp fp16: torch cannot compute in it on cpu. Got not impl")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("norm", ["frn", "mabn"])
def test_channels_last_reaches_every_convolution_and_the_checkpoint_can_be_read(tmp_path, convolutions, norm):
    assert run(norm, tmp_path, "--epochs", "1", "--channels-last") == 0
    assert convolutions
    for tensors in convolutions:
        for tensor in tensors:
            assert tensor.is_contiguous(memory_format=torch.channels_last), tensor.shape
    read = checkpoint.load(tmp_path / "model.pt").model
    assert read(torch.zeros(1, 1, 8, 8)).shape == (1, 10)


@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not be instantiated")  # by dynamo
@pytest.mark.parametrize("norm", ["frn", pytest.param("mabn", marks=pytest.mark.slow)])
def test_compile_compiles_the_training_network_whole_and_changes_nothing_else(tmp_path, monkeypatch, norm):
    assert run(norm, tmp_path / "eager", "--epochs", "1") == 0
    # That the layers pass through the compiler itself is tested with them.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager", fullgraph=True))
    assert run(norm, tmp_path / "compiled", "--epochs", "1", "--compile") == 0
    eager, compiled = (read_log(tmp_path / name)[0] for name in ("eager", "compiled"))
    assert float(compiled["train_loss"]) == pytest.approx(float(eager["train_loss"]), rel=1e-3)
    names = [set(load(tmp_path / name / "model.pt")["state_dict"]) for name in ("eager", "compiled")]
    assert names[0] == names[1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # by inductor
def test_compile_without_a_compiler_is_one_line(tmp_path, monkeypatch, capsys):
    class Tiny(nn.Sequential):  # of which inductor has to compile the ReLU
        def __init__(self, *_: object) -> None:
            super().__init__(nn.Flatten(), nn.Linear(64, 10), nn.ReLU())

    monkeypatch.setattr(mabn_resnet, "ResNet", Tiny)
    monkeypatch.setattr(inductor.cpp, "cxx", (None, "/no/compiler"))
    monkeypatch.setattr(inductor, "fx_graph_cache", False)
    assert run("gn", tmp_path / "run", "--compile") == 3
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: --compile: torch\.compile failed\. Got .*/no/compiler.*Fix: leave it out\.\n", error)


@pytest.mark.parametrize("norm", ["frn", "gn"])
def test_accumulation_takes_the_step_of_the_whole_batch(tmp_path, norm):
    with in_float64():
        for parts in ("1", "4"):
            arguments = ["--epochs", "1", "--batch-size", "64", "--accumulate", parts]
            assert run(norm, tmp_path / parts, *arguments) == 0
    whole, in_parts = (load(tmp_path / parts / "model.pt")["state_dict"] for parts in ("1", "4"))
    torch.testing.assert_close(in_parts, whole, **FLOAT64.kwargs())
    assert read_log(tmp_path / "1")[0]["train_loss"] == read_log(tmp_path / "4")[0]["train_loss"]


def test_each_part_of_an_accumulated_batch_is_an_iteration_of_mabn(tmp_path):
    assert run("mabn", tmp_path, "--epochs", "1", "--accumulate", "4") == 0
    state = load(tmp_path / "model.pt")["state_dict"]
    assert {int(tensor) for name, tensor in state.items() if name.endswith("num_batches_tracked")} == {3 * 4}


@pytest.mark.parametrize("norm", ["frn", "bn", "mabn"])
def test_ema_evaluates_and_writes_the_average_of_weights_and_statistics(tmp_path, monkeypatch, norm):
    averages, evaluated = {}, []
    step, evaluate = train.Training.step, train.Training.evaluate

    def noted_step(self, *batch):
        loss = step(self, *batch)
        for name, tensor in self.model.state_dict().items():
            if name in averages and tensor.is_floating_point():
                averages[name] = torch.lerp(averages[name], tensor, 1 - 0.75)
            else:
                averages[name] = tensor.clone()
        return loss

    def noted_evaluate(self):
        evaluated.append({name: tensor.clone() for name, tensor in self.result.state_dict().items()})
        return evaluate(self)

    monkeypatch.setattr(train.Training, "step", noted_step)
    monkeypatch.setattr(train.Training, "evaluate", noted_evaluate)
    assert run(norm, tmp_path / "averaged", "--epochs", "2", "--ema", "0.75") == 0
    got = checkpoint.load(tmp_path / "averaged" / "model.pt").model.state_dict()
    torch.testing.assert_close(got, averages, **EXACT.kwargs())
    torch.testing.assert_close(evaluated[-1], averages, **EXACT.kwargs())

    # The network that the optimiser moves does not see the average.
    assert run(norm, tmp_path / "plain", "--epochs", "2") == 0
    plain, beside = (load(tmp_path / name / "last.pt")["model"] for name in ("plain", "averaged"))
    torch.testing.assert_close(beside, plain, **EXACT.kwargs())
    assert not torch.equal(got["fc.weight"], plain["fc.weight"])


def read_events(folder):
    """Tag -> [(step, value)], as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("resumed", [False, True])
def test_tensorboard_shows_the_numbers_of_the_log_without_those_of_runs_before(tmp_path, monkeypatch, resumed):
    monkeypatch.setattr(train, "LOG_STEPS", 2)
    arguments = ["--epochs", "2", "--amp", "fp16", "--tensorboard"]
    assert run("bn", tmp_path, *arguments, "--lr", "0.01") == 0
    if resumed:
        with monkeypatch.context() as patch:
            during_step(patch, 5, lambda: os.kill(os.getpid(), signal.SIGINT))
            assert run("bn", tmp_path, *arguments) == 130
    assert run("bn", tmp_path, *arguments, *(["--resume"] if resumed else [])) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "tensorboard"])
    rows, events = read_log(tmp_path), read_events(tmp_path)
    assert set(events) == {*("train/loss", "train/lr", "train/images_per_second", "train/loss_scale", "test/accuracy")}
    # Three steps an epoch: a look after the second, and one at the end.
    assert [step for step, _ in events["train/loss"]] == [2, 3, 5, 6]
    for epoch, row in enumerate(rows):
        early, late = (value for _, value in events["train/loss"][2 * epoch : 2 * epoch + 2])
        assert (2 * early + late) / 3 == pytest.approx(float(row["train_loss"]), rel=1e-5)
        assert events["train/lr"][2 * epoch + 1][1] == pytest.approx(float(row["lr"]), rel=1e-5)
        assert events["train/loss_scale"][2 * epoch + 1][1] == float(row["loss_scale"]) > 1
        assert events["test/accuracy"][epoch] == (3 * (epoch + 1), pytest.approx(float(row["test_accuracy"])))


def test_without_tensorboard_the_other_logs_are_written(tmp_path, monkeypatch, capsys):
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run("bn", tmp_path, "--epochs", "1", "--tensorboard") == 0
    assert "tensorboard is not installed" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES
