"""models/web in headless Chromium classifies as `deploynorm run` does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import deploynorm
from deploynorm.inference import run_on_files

pytestmark = [pytest.mark.slow, pytest.mark.runtimes]

ROOT = Path(__file__).parents[2]
ORT = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


@pytest.fixture(scope="module")
def pick(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """pick(site, *images): what the page shows, in the browser of the matrix."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        from environments import install

        folder = os.environ.get("DEPLOYNORM_RUNTIMES") or tmp_path_factory.mktemp("runtimes")
        installed = install("browser", Path(folder))

    def pick(site: Path, *images: Path) -> dict[str, Any]:
        for name in ORT:
            shutil.copyfile(installed.modules / "onnxruntime-web" / "dist" / name, site / name)
        words = [str(installed.node), str(Path(__file__).with_name("pick.mjs")), str(site), *map(str, images)]
        done = subprocess.run(words, env=installed.variables(), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    return pick


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page with the shipped network, as its README says."""
    filled = tmp_path_factory.mktemp("filled") / "site"
    shutil.copytree(ROOT / "models" / "web", filled)
    deploynorm.convert(ROOT / "models" / "frn_resnet20_fashion.pt", dynamic="batch").save(filled / "model.onnx")
    return filled


@pytest.fixture
def site(filled: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(filled, tmp_path / "site"))


def test_the_page_shows_what_run_prints(
    pick: Callable[..., dict[str, Any]], site: Path, tmp_path: Path, require: Callable[[str], None]
) -> None:
    require("ort")
    from PIL import Image

    boot = Image.open(ROOT / "models" / "samples" / "ankle_boot.png").convert("RGB")
    noise = np.random.default_rng(0).integers(-30, 30, (257, 301, 3))
    large = Image.fromarray((np.asarray(boot.resize((301, 257))) + noise).clip(0, 255).astype(np.uint8))
    large.save(tmp_path / "large.png")
    large.save(tmp_path / "large.jpg", quality=90)
    boot.resize((20, 17)).save(tmp_path / "small.png")
    drawn = [tmp_path / name for name in ("large.png", "large.jpg", "small.png")]
    images = [*sorted((ROOT / "models" / "samples").glob("*.png")), *drawn]
    (tmp_path / "none.png").write_bytes(b"no image")
    shown = pick(site, *images, tmp_path / "none.png")
    assert (shown["ready"], shown["problems"]) == ("ready", [])
    results = run_on_files(site / "model.onnx", [str(path) for path in images]).results
    for path, result in zip(images, results, strict=True):
        page, ((wanted,),) = shown["images"][str(path)], result.classes.values()
        assert page["error"] == ""
        assert page["state"].endswith(" ms")
        assert [label for label, _, _ in page["classes"]] == [entry["label"] for entry in wanted]
        for (_, probability, text), entry in zip(page["classes"], wanted, strict=True):
            assert float(probability) == pytest.approx(entry["probability"], abs=1e-7)
            assert text == f"{100 * float(probability):.1f} %"
    assert "not an image that this browser can read" in shown["images"][str(tmp_path / "none.png")]["error"]
    blobs = [asked for asked in shown["asked"] if asked.startswith("blob:")]
    assert set(shown["asked"]) - set(blobs) == {
        "index.html", "classify.mjs", "model.deploynorm.json", "model.onnx", *ORT
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": None}, "the manifest has no image and labels"),
        ({"onnx": {"inputs": [{"dtype": "float16"}]}}, "--keep-io-types"),
        ({"onnx": {"inputs": [{"dtype": "float32"}], "sha256": "0"}}, "not the file that model.deploynorm.json was"),
    ],
)
def test_the_page_says_what_is_wrong_with_its_files(
    pick: Callable[..., dict[str, Any]], site: Path, change: dict[str, Any], message: str
) -> None:
    manifest = json.loads((site / "model.deploynorm.json").read_text())
    (site / "model.deploynorm.json").write_text(json.dumps(manifest | change))
    assert message in pick(site)["ready"]
