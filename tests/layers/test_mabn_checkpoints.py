"""State dicts and pickles of MABN: of an earlier version, with another window, of other projects."""

from __future__ import annotations

import copy
import pickle
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from mabn_steps import SHORT, C, Loop, assert_step_agrees, batches, new_layer, run_step
from tolerances import FLOAT64
from torch import Tensor, nn

from deploynorm.layers import MABN1d, MABN2d, MABN3d
from deploynorm.layers.mabn import _MABN

SHIPPED = Path(__file__).parents[2] / "models/mabn_resnet20_fashion.pt"


def trained(steps: int = 14, **settings: Any) -> MABN2d:
    layer = new_layer(**settings)
    for x, dy in batches(steps, (3, 3), range(1, 5)):
        run_step(layer, x, dy)
    return layer


def steps_after(layer: nn.Module, count: int = 10) -> list[Tensor]:
    return [t for x, dy in list(batches(24, (3, 3), range(1, 5)))[-count:] for t in run_step(layer, x, dy)]


def assert_goes_on_as(layer: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(steps_after(layer), steps_after(other), **FLOAT64.kwargs())


def as_version_1(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Histories of means (K, C) and samples (K,), oldest first."""
    old = {name: value.clone() for name, value in state.items()}
    for name in ("recent_x2", "recent_gz"):
        sums, samples = old[name][:, :-1].flip(0), old[name][:, -1].flip(0)
        old[name] = sums / samples.clamp(min=1)[:, None]
        old[f"{name}_samples"] = samples
    return old


@pytest.mark.parametrize("steps", [0, 3, 14])
def test_training_goes_on_from_a_checkpoint_of_version_1(steps: int) -> None:
    layer, resumed = trained(steps), MABN2d(C, **SHORT)
    state = as_version_1(layer.state_dict())
    names = set(state)
    resumed.load_state_dict(state)
    assert set(state) == names, "the caller's own dict stays as it was"
    assert_goes_on_as(resumed, layer)


def test_training_goes_on_from_a_pickle_of_version_1() -> None:
    layer = trained()
    old = copy.deepcopy(layer)
    for name in ("process_group", "frozen", "_fixed_parameters", "_loss_scale"):
        del old.__dict__[name]
    del old.recent_passes, old.passes
    for name, value in as_version_1(dict(layer.state_dict())).items():
        if "weight" not in name and "bias" not in name:
            old._buffers[name] = value
    old.register_buffer("recent_steps", torch.full((8, 4, C), torch.inf), persistent=False)
    resumed = MABN2d.__new__(MABN2d)
    resumed.__setstate__(pickle.loads(pickle.dumps(old.__dict__)))
    assert resumed.state_dict().keys() == layer.state_dict().keys()
    assert dict(resumed.named_buffers()).keys() == dict(layer.named_buffers()).keys()
    assert_goes_on_as(resumed, layer)


def test_the_shipped_checkpoint_of_version_1_loads_strictly_with_its_histories() -> None:
    state = torch.load(SHIPPED, weights_only=True)["state_dict"]
    prefix = next(name for name in state if name.endswith("recent_x2_samples")).removesuffix("recent_x2_samples")
    part = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    window, channels = part["recent_x2"].shape
    layer = MABN2d(channels, moving_batch_size=window)
    layer.load_state_dict(part)
    samples = part["recent_x2_samples"]
    assert samples.any()
    torch.testing.assert_close(layer.recent_x2[:, -1], samples.flip(0))
    torch.testing.assert_close(layer.recent_x2[0, :-1], part["recent_x2"][-1] * samples[-1])


@pytest.mark.parametrize("window", [1, 3, 5, 8, 16, 40])
def test_with_another_window_the_newest_iterations_are_kept(window: int) -> None:
    layer = trained(3)
    resumed = new_layer(moving_batch_size=window)
    resumed.load_state_dict(layer.state_dict())
    # The loop forgets nothing; so it is right where the window holds no more than the old one had kept.
    loop = Loop(resumed)
    affine = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    for step, (x, dy) in enumerate(batches(24, (3, 3), range(1, 5))):
        if step < 3:
            loop.step(x.flatten(2).numpy(), *affine, dy.flatten(2).numpy())
        else:
            assert_step_agrees(resumed, loop, x, dy)


RUNNING_VAR = torch.tensor([0.5, 1.0, 2.0])
OF_THE_AUTHORS = {
    "formal": {
        "running_var": RUNNING_VAR.reshape(1, C, 1, 1),
        "iters": torch.tensor([4000]),
        **{name: torch.rand(16, C) for name in ("buffer_x2", "buffer_gz")},
    },
    "simulation": {
        "running_var": RUNNING_VAR,
        "iters": torch.tensor([4000.0]),
        "sta_matrix": torch.rand(16, 32),
        **{name: torch.rand(16, C) for name in ("pre_x2", "pre_gz")},
    },
    "running_var_only": {"running_var": RUNNING_VAR},
}


@pytest.mark.parametrize("source", OF_THE_AUTHORS)
@pytest.mark.parametrize("kind", [MABN1d, MABN2d, MABN3d])
def test_other_projects_running_var_is_enough_and_a_warning_says_what_is_missing(
    kind: type[_MABN], source: str
) -> None:
    state = {"weight": torch.rand(C), "bias": torch.rand(C), **OF_THE_AUTHORS[source]}
    layer = kind(C)
    with pytest.warns(
        UserWarning,
        match=rf"^{kind.__name__}: the checkpoint has running_var and no num_batches_tracked or recent_x2 or recent_gz"
        ": nothing is missing for evaluation, and training starts with the history empty",
    ):
        layer.load_state_dict(state)
    assert torch.equal(layer.running_var, RUNNING_VAR)
    x = torch.randn(2, C, *(4,) * (layer._ranks[0] - 2))
    layer(x)
    moment = x.square().mean([0, *range(2, x.dim())])
    torch.testing.assert_close(layer.running_var, RUNNING_VAR.lerp(moment, layer.momentum))
    assert layer.num_batches_tracked == 2


def test_a_checkpoint_of_another_layer_is_refused_as_ever() -> None:
    layer = MABN2d(C)
    for state in (nn.Conv2d(C, C, 1).state_dict(), MABN2d(C + 1).state_dict(), {}):
        with pytest.raises(RuntimeError, match=r"Missing key|size mismatch"):
            layer.load_state_dict(state)
    layer.load_state_dict({}, strict=False)


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "running_var_only"])
def test_a_network_on_meta_takes_a_checkpoint_over_and_trains(whole: bool) -> None:
    state = trained(dtype=torch.float32).state_dict()
    if not whole:
        state = {name: state[name] for name in ("weight", "bias", "running_var")}
    with torch.device("meta"):
        layer = MABN2d(C, **{**SHORT, "dtype": torch.float32})
    with nullcontext() if whole else pytest.warns(UserWarning, match="the history empty"):
        layer.load_state_dict(state, assign=True)
    assert {t.device.type for t in (*layer.parameters(), *layer.buffers())} == {"cpu"}
    run_step(layer, torch.randn(2, C, 3, 3), torch.randn(2, C, 3, 3))
    layer.eval()
