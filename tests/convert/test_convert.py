"""deploynorm.convert: what the command line does, as one function."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import deploynorm
from deploynorm import ImageSpec, InputError, ParityError
from deploynorm.cli import main
from deploynorm.layers import CenConv2d, FRN2d, MABN2d
from deploynorm.onnx_file import OnnxFile


class UNet(nn.Module):
    """An image and a depth map in, two maps out; H and W are multiples of 4."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()

        def block(inputs: int, outputs: int) -> nn.Module:
            return nn.Sequential(CenConv2d(inputs, outputs, 3, padding=1, bias=False), MABN2d(outputs), nn.ReLU())

        self.high, self.low = block(4, channels), block(channels, channels)
        self.frn = nn.Sequential(nn.Conv2d(2 * channels, channels, 3, padding=1), FRN2d(channels))
        self.mask, self.edge = nn.Conv2d(channels, 1, 1), nn.Conv2d(channels, 2, 1)

    def forward(self, image: Tensor, depth: Tensor) -> dict[str, Tensor]:
        high = self.high(torch.cat([image, depth], 1))
        low = self.low(nn.functional.max_pool2d(high, 4))
        both = self.frn(torch.cat([high, nn.functional.interpolate(low, scale_factor=4)], 1))
        return {"mask": self.mask(both), "edge": self.edge(both)}


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet()


def classifier() -> nn.Module:
    """Three classes of images."""
    return nn.Sequential(nn.Conv2d(3, 3, 3), FRN2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


EXAMPLES = (torch.randn(2, 3, 16, 16), torch.randn(2, 1, 16, 16))


@pytest.fixture(scope="module", autouse=True)
def _needs_onnxruntime(require: Callable[[str], None]) -> None:
    require("ort")


@pytest.fixture(scope="module")
def converted() -> deploynorm.Conversion:
    return deploynorm.convert(unet(), EXAMPLES)


def test_a_network_is_folded_exported_and_checked(converted: deploynorm.Conversion, tmp_path: Path) -> None:
    assert converted
    assert "H and W: multiples of 4" in converted.notes
    assert converted.fold is not None
    assert len(converted.fold.with_outcome("folded")) == 4
    candidates = [report.candidate for report in converted.parity.reports]
    assert candidates[:2] == ["folded, eager", "onnxruntime (cpu)"]
    model, manifest = converted.save(tmp_path / "unet.onnx")
    onnx.checker.check_model(str(model), full_check=True)
    record = json.loads(manifest.read_text())
    assert record["onnx"]["sizes"]["notes"] == ["H and W: multiples of 4"]
    assert record["ok"]
    assert record["source"] == {"class": f"{UNet.__module__}.UNet"}
    assert record["onnx"]["sha256"]
    shown = str(converted)
    for part in ("Layers", "Nodes", "Parity with the network in float64", "note: H and W: multiples of 4"):
        assert part in shown


def test_what_was_found_of_the_sizes_is_in_the_file(converted: deploynorm.Conversion, tmp_path: Path) -> None:
    converted.save(tmp_path / "unet.onnx")
    specs = OnnxFile.read(tmp_path / "unet.onnx").inputs
    assert [spec.base for spec in specs] == [(2, 3, 16, 16), (2, 1, 16, 16)]
    for label, feeds in deploynorm.sample_inputs(specs, seed=3):
        assert all(size % 4 == 0 for array in feeds.values() for size in array.shape[2:]), label
        assert feeds["image"].shape[2:] == feeds["depth"].shape[2:]
    truth = deploynorm.EagerRunner(unet(), converted.exported.inputs, dtype=torch.float64)
    with deploynorm.open_runner(tmp_path / "unet.onnx") as runner:
        assert [label for label, _ in deploynorm.sample_inputs(runner.inputs, seed=3)]
        assert deploynorm.check(runner, truth, deploynorm.sample_inputs(converted.exported.inputs))


def test_the_command_line_gives_the_same_rows(
    converted: deploynorm.Conversion,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("nets_of_the_user.py").write_text(f"import sys\nunet = sys.modules[{__name__!r}].unet\n")
    torch.save(unet().state_dict(), "unet.pt")
    shapes = ("--input-shape", "image:2x3x16x16", "--input-shape", "depth:2x1x16x16")
    assert main(["export", "unet.pt", "--factory", "nets_of_the_user:unet", *shapes]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    for line in str(converted).splitlines():
        assert line.split() in shown, line


def test_a_check_that_does_not_hold_writes_nothing(tmp_path: Path) -> None:
    result = deploynorm.convert(nn.Sequential(nn.Conv2d(3, 4, 3), FRN2d(4)), EXAMPLES[0], rtol=1e-12, atol=0)
    assert not result
    assert "BROKEN" in str(result)
    assert "For comparison, with nothing exported" in str(result)
    with pytest.raises(ParityError, match="off by"):
        result.save(tmp_path / "net.onnx")
    assert not list(tmp_path.iterdir())


class Resized(nn.Module):
    """In each way torch.onnx translates it for the sizes of the example alone."""

    def __init__(self, resize: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.resize = nn.Conv2d(3, 4, 3, padding=1), resize

    def forward(self, x: Tensor) -> Tensor:
        return self.resize(self.conv(x))


@pytest.mark.parametrize(
    ("resize", "reason"),
    [
        (lambda x: F.interpolate(x, size=(5, 7), mode="area"), "since at others the file is wrong"),
        pytest.param(
            lambda x: F.adaptive_avg_pool2d(x, 3), "since at others .*cannot run the model", marks=pytest.mark.slow
        ),
    ],
    ids=["wrong", "fails"],
)
def test_axes_are_fixed_where_the_file_fails_at_other_sizes(resize: Callable[[Tensor], Tensor], reason: str) -> None:
    result = deploynorm.convert(Resized(resize), torch.randn(2, 3, 16, 16))
    assert result, str(result)
    assert result.exported.inputs[0].shape == ("N", 3, 16, 16)
    assert any(re.match(f"only the batch was varied, {reason}", note) for note in result.notes)


def test_images_and_classes_go_into_the_file(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("cat\ndog\nowl\n")
    given = {"mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2), "labels": tmp_path / "labels.txt"}
    deploynorm.convert(classifier(), torch.randn(1, 3, 9, 9), **given).save(tmp_path / "net.onnx")
    image, labels = OnnxFile.read(tmp_path / "net.onnx").image_and_labels
    assert image == ImageSpec((3, 9, 9), (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))
    assert labels == ("cat", "dog", "owl")


def test_dynamic_axes_go_by_the_names_of_arguments_and_of_inputs() -> None:
    for names in (("image", "depth"), ("pixels", "hint")):
        dynamic = {name: {0: "batch"} for name in names}
        result = deploynorm.convert(unet(), EXAMPLES, input_names=["pixels", "hint"], dynamic=dynamic)
        assert [spec.shape[0] for spec in result.exported.inputs] == ["batch", "batch"]
        assert [spec.shape[2:] for spec in result.exported.inputs] == [(16, 16), (16, 16)]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"dtype": "half"}, "dtype: not a type for a network. Got 'half'; expected float32, float16"),
    "another opset": ({"opset": "20"}, "unsupported opset. Got 20; expected 18 to 23"),
    "another lowering": ({"lowering": "custum"}, "lowering: unknown. Got 'custum'; expected custom"),
    "another backend": ({"backend": "tensorrt"}, "unknown backend. Got 'tensorrt'; expected onnxruntime, half"),
    "another word": ({"dynamic": "Spatial"}, "dynamic: unknown word. Got 'Spatial'; expected none, batch"),
    "labels of other classes": ({"labels": ["cat"]}, "another number of labels than classes. Got 1; expected 3"),
    "no labels": ({"labels": ()}, "labels are not the names of classes"),
    "one text as labels": ({"labels": "cat"}, "not the names of classes"),
    "mean without std": ({"mean": (0.5, 0.5, 0.5)}, "mean and std belong together"),
    "one mean for all channels": (
        {"mean": 0.5, "std": 0.5},
        "input.mean: does not fit the channels. Got 0.5; expected 3",
    ),
    "a dict as image": (
        {"image": {"shape": [3, 8, 8]}},
        "image is no ImageSpec. Got {'shape': [3, 8, 8]}. Fix: pass a",
    ),
    "a number as labels": ({"labels": 5}, "labels are not the names of classes. Got 5; expected a list of text"),
    "a number as names": ({"input_names": 5}, "input_names is no list of names. Got 5; expected text, or a list"),
    "a number as output names": ({"output_names": 5}, "output_names is no list of names. Got 5; expected text"),
    "a number as layers": ({"keep_float32": 5}, "keep_float32: not names of layers. Got 5; expected a list of text"),
    "a list as lowering": ({"lowering": ["custom"]}, "lowering: unknown. Got ['custom']; expected custom"),
    "text as seed": ({"seed": "a"}, "not a seed. Got 'a'; expected a whole number from 0"),
    "a negative seed": ({"seed": -1}, "not a seed. Got -1; expected a whole number from 0"),
    "half a seed": ({"seed": 1.5}, "not a seed. Got 1.5; expected a whole number from 0"),
    "text as tolerance": ({"rtol": "a"}, "rtol must be finite and not negative. Got 'a'; expected a number"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as raised:
        deploynorm.convert(classifier(), torch.randn(2, 3, 8, 8), **options)
    assert message in str(raised.value)


def test_a_class_a_factory_and_a_forgotten_input_are_named() -> None:
    with pytest.raises(InputError, match=r"a class, and not a network. Got UNet. Fix: pass UNet\(\.\.\.\)"):
        deploynorm.convert(UNet, EXAMPLES)
    with pytest.raises(InputError, match="no example of input depth"):
        deploynorm.convert(unet(), EXAMPLES[0])
    with pytest.raises(deploynorm.ModelError, match=r"factory is no text.*expected its name, as in '[\w.]*:unet'"):
        deploynorm.save("never.pt", factory=unet, model=unet())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"input_shapes": 5}, r"input_shapes is no dict by names of inputs. Got 5; expected {'x': \("),
        ({"input_shapes": {"input": 5}}, r"shape of input input: is none. Got 5; expected sizes, such as \(2, 3"),
        ({"input_shapes": {"": "1x3x8x8"}}, "shape of input input: is none. Got '1x3x8x8'"),
        ({"input_shapes": {"": (1, 3, 8.5, 8)}}, r"shape of input input: is none. Got \(1, 3, 8.5, 8\)"),
        ({"input_shapes": {"": (-1, 3, 8, 8)}}, r"shape of input input: is none. Got \(-1, 3, 8, 8\)"),
        ({"input_shapes": {"": (10**9, 3, 10**5, 10**5)}}, "takes .* GiB.*; expected at most .* of this machine"),
        ({"input_shapes": {"": (1, 3, 8, 8)}, "input_dtypes": 5}, "input_dtypes is no dict by names of inputs. Got 5"),
        ({"input_shapes": {"": (1, 3, 8, 8)}, "input_dtypes": {"": 5}}, "no such input or type. Got :5; expected a"),
        ({"example_inputs": torch.zeros(1, 3, 8, 8, device="meta")}, "example input 0 is on the meta device"),
    ],
)
def test_inputs_that_cannot_be_made_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        deploynorm.convert(classifier(), **options)


@pytest.mark.parametrize("model", [5, None, [nn.ReLU()]])
def test_what_is_no_network_is_refused(model: Any) -> None:
    with pytest.raises(InputError, match=f"neither a network nor the path of a file. Got {type(model).__name__}"):
        deploynorm.convert(model, EXAMPLES)


def test_every_input_without_a_shape_gets_its_option() -> None:
    fix = "--input-shape image:1x3x224x224 --input-shape depth:1x3x224x224 with your sizes"
    with pytest.raises(InputError, match=f"the shape of input image, depth is not known. Fix: pass {fix}"):
        deploynorm.convert(unet())


def test_blank_lines_at_the_end_of_a_file_of_labels_are_no_classes(tmp_path: Path) -> None:
    path = tmp_path / "labels.txt"
    path.write_text("cat\ndog\nfish\n\n \n")
    metadata = deploynorm.convert(classifier(), EXAMPLES[0], labels=path).exported.model.metadata_props
    assert json.loads(metadata["deploynorm.labels"]) == ["cat", "dog", "fish"]
    path.write_text("\n")
    with pytest.raises(InputError, match="the file names no class"):
        deploynorm.convert(classifier(), EXAMPLES[0], labels=path)


def test_integers_are_drawn_within_the_range_of_the_example() -> None:
    network = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 2))
    assert deploynorm.convert(network, torch.tensor([[0, 3, 1]]))
    assert deploynorm.convert(network, torch.tensor([[2, 2]]))


def test_a_generator_of_names_is_read_once() -> None:
    names = (name for name in ["0"])
    result = deploynorm.convert(classifier(), EXAMPLES[0], dtype="float16", keep_float32=names)
    assert result.exported.kept_float32 == ("0",)


def test_manifests_of_names_with_dots_are_apart(converted: deploynorm.Conversion, tmp_path: Path) -> None:
    for name in ("m.v1.2", "m.v1.3.onnx"):
        converted.save(tmp_path / name)
    assert {p.name for p in tmp_path.glob("*.json")} == {"m.v1.2.deploynorm.json", "m.v1.3.deploynorm.json"}


def test_options_of_a_file_are_refused_with_a_network() -> None:
    with pytest.raises(InputError, match="are for a file"):
        deploynorm.convert(unet(), EXAMPLES, factory="a:b")
    with pytest.raises(InputError, match="example inputs, and shapes or types of inputs too"):
        deploynorm.convert(unet(), EXAMPLES, input_shapes={"image": (2, 3, 16, 16)})
    with pytest.raises(InputError, match="the shape of input image, depth is not known"):
        deploynorm.convert(unet())


def test_a_batch_of_one_is_enough_and_the_network_is_left_as_it_is() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), FRN2d(4)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    result = deploynorm.convert(network, torch.randn(1, 3, 8, 8))
    assert result
    assert result.exported.inputs[0].shape == ("N", 3, "H", "W")
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())


def test_a_size_that_the_file_does_not_take_is_explained(converted: deploynorm.Conversion, tmp_path: Path) -> None:
    converted.save(tmp_path / "unet.onnx")
    with (
        deploynorm.open_runner(tmp_path / "unet.onnx") as runner,
        pytest.raises(deploynorm.DeployNormError, match="H and W: multiples of 4"),
    ):
        runner.infer({"image": np.zeros((1, 3, 15, 15), np.float32), "depth": np.zeros((1, 1, 15, 15), np.float32)})
