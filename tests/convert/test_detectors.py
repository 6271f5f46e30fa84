"""Networks that take lists of images and find as many things in each as there are: what detectors are made of."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deploynorm
from deploynorm.layers import FRN2d
from deploynorm.layers.cenconv import CenConv2d
from deploynorm.layers.mabn import MABN2d
from deploynorm.onnx_file import OnnxFile

IMAGES = [torch.randn(3, 24, 20, generator=torch.Generator().manual_seed(n)) for n in range(2)]


@pytest.fixture(autouse=True)
def _needs_onnxruntime(require: Callable[[str], None]) -> None:
    require("ort")


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """By the definition, one box after the other; as torchvision's it asks for the number of boxes first."""
    if boxes.numel() == 0:
        return torch.empty(0, dtype=torch.int64)
    low, high = torch.maximum(boxes[:, None, :2], boxes[:, :2]), torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    areas, shared = (boxes[:, 2:] - boxes[:, :2]).prod(1), (high - low).clamp(min=0).prod(2)
    excludes = (shared / (areas[:, None] + areas - shared) > iou_threshold) & (idxs[:, None] == idxs)
    kept: list[int] = []
    for i in scores.sort(descending=True, stable=True).indices.tolist():
        if not excludes[i, kept].any():
            kept.append(i)
    return torch.tensor(kept)


@pytest.fixture
def box_ops(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stands in for torchvision.ops.boxes, which detectors call by that name."""
    module = SimpleNamespace(batched_nms=batched_nms)
    monkeypatch.setitem(sys.modules, "torchvision.ops.boxes", module)
    return module


class Detector(nn.Module):
    """As RetinaNet is built: boxes around the points of a map, those above a threshold, and of these the best."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            if norm == "frn":
                self.body = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), FRN2d(8))
            else:
                self.body = nn.Sequential(CenConv2d(3, 8, 3, stride=2), MABN2d(8), nn.ReLU())
                self.body[1].running_var.uniform_(0.5, 1.5)
            self.scores, self.sizes = nn.Conv2d(8, 3, 1), nn.Conv2d(8, 4, 1)
        self.eval()

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        maps = self.body(torch.stack(images))
        return [self.find(*each) for each in zip(self.scores(maps).sigmoid(), self.sizes(maps).sigmoid(), strict=True)]

    def find(self, scores: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        width = scores.shape[2]
        scores, sizes = scores.flatten(1).T, sizes.flatten(1).T
        places = torch.arange(len(scores))
        points = torch.stack([places % width, places // width], 1).to(sizes) * 2
        point, label = torch.where(scores > 0.6)
        best = scores[point, label]
        boxes = torch.cat([points - sizes[:, :2] * 4, points + sizes[:, 2:] * 4], 1)[point]
        kept = sys.modules["torchvision.ops.boxes"].batched_nms(boxes, best, label, 0.4)[:30]
        return {"boxes": boxes[kept], "scores": best[kept], "labels": label[kept]}


@pytest.mark.parametrize("norm", ["mabn", "frn"])
def test_a_detector_converts_with_every_norm_folded_or_one_node(box_ops: SimpleNamespace, norm: str) -> None:
    network = Detector(norm)
    result = deploynorm.convert(network, (IMAGES,), dynamic="none")
    assert result, result
    names = [f"{name}_{i}" for i in range(2) for name in ("boxes", "scores", "labels")]
    assert [spec.name for spec in result.exported.inputs] == ["images_0", "images_1"]
    assert list(result.exported.output_names) == names
    assert result.exported.row_groups == (tuple(names[:3]), tuple(names[3:]))
    counts = result.exported.node_counts()
    assert counts["NonMaxSuppression"] == 2
    assert counts["deploynorm::FilterResponseNormalization"] == (norm == "frn")
    assert not counts["BatchNormalization"]
    found = [each for report in result.parity.reports for each in report.comparisons if each.output == "labels_0"]
    assert all(each.shape[0] > 3 for each in found)
    assert box_ops.batched_nms is batched_nms


@pytest.fixture(scope="module")
def suppression() -> Callable[..., np.ndarray]:
    """Boxes, scores and classes -> what the exported operator keeps of them, in ONNX Runtime."""

    class Kept(nn.Module):
        def forward(self, boxes: Tensor, scores: Tensor, idxs: Tensor) -> Tensor:
            return sys.modules["torchvision.ops.boxes"].batched_nms(boxes, scores, idxs, 0.4)

    example = torch.rand(5, 4), torch.rand(5), torch.zeros(5, dtype=torch.int64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchvision.ops.boxes", SimpleNamespace(batched_nms=batched_nms))
        exported = deploynorm.export(Kept(), example, dynamic={"boxes": {0: "N"}, "scores": {0: "M"}, "idxs": {0: "K"}})
    runner = deploynorm.open_runner(OnnxFile.read(exported.to_proto()))

    def kept(boxes: Tensor, scores: Tensor, idxs: Tensor) -> np.ndarray:
        feeds = {"boxes": boxes.numpy(), "scores": scores.numpy(), "idxs": idxs.numpy()}
        return runner.infer(feeds)["output"]

    return kept


@pytest.mark.parametrize(
    ("count", "classes", "scores"),
    [(0, 1, "random"), (1, 3, "random"), (60, 1, "random"), (60, 7, "random"), (60, 7, "equal"), (60, 90, "negative")],
)
def test_what_is_kept_is_what_the_definition_keeps(
    suppression: Callable[..., np.ndarray], count: int, classes: int, scores: str
) -> None:
    generator = torch.Generator().manual_seed(count + classes)
    corners = torch.rand(count, 2, generator=generator) * 30
    boxes = torch.cat([corners, corners + 5 + torch.rand(count, 2, generator=generator) * 20], 1)
    given = {"random": torch.rand, "equal": torch.ones, "negative": lambda n, **_: -torch.arange(float(n))}[scores]
    values = given(count, generator=generator) if scores == "random" else given(count)
    idxs = torch.randint(0, classes, (count,), generator=generator)
    want = batched_nms(boxes, values, idxs, 0.4)
    assert suppression(boxes, values, idxs).tolist() == want.tolist()


def test_boxes_of_many_classes_keep_their_coordinates(suppression: Callable[..., np.ndarray]) -> None:
    """Moved apart by class, as torchvision moves them, these would overlap by more than 0.4."""
    size, far = 10.0, 1000.0
    shared = size * 2 * 0.39995 / 1.39995
    boxes = torch.tensor(
        [[0, 0, size, size], [size - shared, 0, 2 * size - shared, size], [far, far, far + 1, far + 1]]
    )
    idxs = torch.tensor([90, 90, 0])
    assert suppression(boxes, torch.tensor([0.9, 0.8, 0.7]), idxs).tolist() == [0, 1, 2]


class Grouped(nn.Module):
    """Takes images in a dict of lists, and returns dicts in dicts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, views: dict[str, list[Tensor]], *, shift: Tensor) -> dict[str, object]:
        left, right = (self.conv(view) for view in views["pair"])
        return {"sum": left + right + shift, "each": {"left": left, "rest": [right, shift * 2]}}


def test_inputs_in_dicts_and_lists_are_inputs_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> None:
    views = {"pair": [torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8)]}
    result = deploynorm.convert(Grouped().eval(), {"shift": torch.randn(1), "views": views})
    assert result, result
    assert [spec.name for spec in result.exported.inputs] == ["views_pair_0", "views_pair_1", "shift"]
    assert result.exported.output_names == ("sum", "each_left", "each_rest_0", "each_rest_1")
    assert result.exported.inputs[0].shape == ("N", 3, "H", "W")
    named = deploynorm.export(Grouped().eval(), {"shift": torch.randn(1), "views": views}, input_names=["s", "a", "b"])
    assert [spec.name for spec in named.inputs] == ["a", "b", "s"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (([1.0],), "example input 0 is not a tensor. Got list"),
        (([],), "example input 0 is not a tensor. Got list"),
        ({"x": {"0": torch.ones(2), 0: torch.ones(2)}}, "two example inputs would be called 'x_0'"),
        (([torch.ones(2, device="meta")],), "example input 0 is on the meta device"),
    ],
    ids=str,
)
def test_what_holds_no_tensors_is_refused(given: object, message: str) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    with pytest.raises(deploynorm.InputError) as raised:
        deploynorm.export(Net(), given)  # type: ignore[arg-type]
    assert message in str(raised.value)


class Rescaled(nn.Module):
    """Compares its sizes, as GeneralizedRCNNTransform does, so that a trace holds for some of them only."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(CenConv2d(3, 4, 3), MABN2d(4))

    def forward(self, images: list[Tensor]) -> Tensor:
        (image,) = images
        return self.body(image[None]) * (1.0 if image.shape[2] <= 20 else 2.0)


def test_what_one_size_alone_lets_fold_does_where_the_file_has_one_size() -> None:
    result = deploynorm.convert(Rescaled().eval(), (IMAGES[:1],))
    assert result, result
    assert result.fold is not None
    assert {change.outcome for change in result.fold.changes} == {"folded"}
    assert result.exported.inputs[0].shape == (3, 24, 20)
    assert any("it holds for some sizes only" in note for note in result.notes), result.notes


def test_a_trace_that_values_stop_prints_nothing_of_torch(capfd: pytest.CaptureFixture[str]) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            found = x[x > 0]
            return found[:1] if found.numel() > 5 else found

    with pytest.raises(deploynorm.ModelError, match="data-dependent expression"):
        deploynorm.export(Branches(), torch.randn(4, 4), dynamic="none")
    assert capfd.readouterr().err == ""
