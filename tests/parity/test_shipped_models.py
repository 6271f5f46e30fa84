"""The shipped checkpoints on the real test set: stock ONNX Runtime against PyTorch, image by image."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from deploynorm import checkpoint
from deploynorm.cli import main
from deploynorm.models import mabn_resnet
from deploynorm.models.data import ImageData

MODELS = Path(__file__).parents[2] / "models"
SHIPPED = sorted(MODELS.glob("*.pt"))

# An inference server has only onnxruntime and NumPy.
STOCK = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1  # threads that wait for each other would take half as much time again
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
images = np.load(sys.argv[2])
scores = [session.run(None, {"x": images[i : i + 50]})[0] for i in range(0, len(images), 50)]
np.save(sys.argv[3], np.concatenate(scores))
assert not any(name.partition(".")[0] == "deploynorm" for name in sys.modules)
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, require: Callable[[str], None]) -> Callable[[Path], Path]:
    """The file that `deploynorm export` writes for a checkpoint, written once."""
    require("ort")
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def exported(path: Path) -> Path:
        target = folder / f"{path.stem}.onnx"
        assert main(["export", str(path), "-o", str(target), "-q"]) == 0
        return target

    return exported


@pytest.mark.slow
@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_stock_onnxruntime_classifies_the_test_set_as_training_found_and_as_pytorch_does(
    path: Path, exported: Callable[[Path], Path], fashion_mnist: ImageData, tmp_path: Path
) -> None:
    loaded = checkpoint.load(path)
    assert loaded.image is not None
    assert loaded.training is not None
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (loaded.image.mean, loaded.image.std))
    images = (fashion_mnist.test_images / 255 - mean) / std
    np.save(tmp_path / "images.npy", images.numpy())
    arguments = [str(exported(path)), str(tmp_path / "images.npy"), str(tmp_path / "scores.npy")]
    done = subprocess.run([sys.executable, "-c", STOCK, *arguments], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    with torch.inference_mode():
        eager = torch.cat([loaded.model(batch) for batch in images[:2000].split(500)]).argmax(1)
    stock = torch.from_numpy(np.load(tmp_path / "scores.npy")).argmax(1)
    assert (eager != stock[:2000]).sum() == 0
    accuracy = (stock == fashion_mnist.test_classes).double().mean().item()
    assert accuracy == pytest.approx(loaded.training["accuracy"], abs=0.5 / len(images))
    assert accuracy > 0.92


@pytest.mark.slow
def test_shipped_mabn_network_has_the_nodes_of_a_folded_batch_norm_network(
    exported: Callable[[Path], Path], tmp_path: Path
) -> None:
    """Compared with the architecture with BatchNorm, exported by the same command."""
    torch.manual_seed(0)
    kwargs = {"num_classes": 10, "in_channels": 1, "norm": "bn"}
    twin = tmp_path / "bn.pt"
    checkpoint.save(
        twin,
        factory="deploynorm.models.mabn_resnet:resnet20",
        kwargs=kwargs,
        model=mabn_resnet.resnet20(**kwargs),
        image=checkpoint.load(SHIPPED[1]).image,
    )
    sequences = [[node.op_type for node in onnx.load(exported(path)).graph.node] for path in (SHIPPED[1], twin)]
    assert sequences[0] == sequences[1]
    assert not {"Div", "Mul", "Sub", "BatchNormalization"} & Counter(sequences[0]).keys()
