"""Shapes as users type them, images as networks want them, and inputs for the parity check."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tolerances import OP_FLOAT32

from deploynorm.errors import BackendError, InputError
from deploynorm.image import ImageSpec
from deploynorm.inputs import (
    AxisSizes,
    TensorSpec,
    parse_input_shapes,
    parse_profile_shapes,
    read_sizes,
    sizes_to_dict,
    with_sizes,
)
from deploynorm.samples import sample_inputs

IMAGE = {"shape": [3, 4, 6], "mean": [0.5, 0.25, 0.0], "std": [0.5, 1.0, 2]}


def grey(height: int, width: int) -> ImageSpec:
    return ImageSpec((1, height, width), (0.0,), (1.0,))


@pytest.mark.parametrize(
    ("texts", "shapes"),
    [
        ([], {}),
        (["x:2x3x224x224"], {"x": (2, 3, 224, 224)}),
        (["x:[2,3,224,224]"], {"x": (2, 3, 224, 224)}),
        (["x:2,3,8"], {"x": (2, 3, 8)}),
        ([" x : [ 2, 3 ] "], {"x": (2, 3)}),
        (["2x3x224x224"], {"": (2, 3, 224, 224)}),
        (["2,3,224,224"], {"": (2, 3, 224, 224)}),
        (["[2,3]"], {"": (2, 3)}),
        (["5"], {"": (5,)}),
        (["input:0:1x3", "mask:1x1"], {"input:0": (1, 3), "mask": (1, 1)}),
        (["x2x3:4X5"], {"x2x3": (4, 5)}),
    ],
    ids=str,
)
def test_a_shape_is_read_in_every_form(texts: list[str], shapes: dict[str, tuple[int, ...]]) -> None:
    assert parse_input_shapes(texts) == shapes


NO_SHAPES = ["x", "", "x:", ":2x3", "x:2x3x", "x:2x-3", "x:0x3", "x:2.5x3", "x:[2,3", "x:Nx3x8x8", "x:२x3"]


def test_a_name_that_comes_again_begins_another_profile() -> None:
    texts = ["x:1x3", "z:1", "x:2x3", "x:4x3", "z:2"]
    assert parse_profile_shapes(texts) == [{"x": (1, 3), "z": (1,)}, {"x": (2, 3), "z": (2,)}, {"x": (4, 3)}]
    assert parse_profile_shapes(["1x3", "2x3"]) == [{"": (1, 3)}, {"": (2, 3)}]


@pytest.mark.parametrize(
    ("texts", "phrase"),
    [
        *(([text], "not a shape") for text in NO_SHAPES),
        (["x:1x2", "x:1x3"], "given twice for x"),
        (["1x2", "1x3"], "given twice for the only input"),
        (["1x2", "x:1x3"], "no name"),
    ],
    ids=str,
)
def test_what_is_no_shape_is_refused_with_a_right_one(texts: list[str], phrase: str) -> None:
    with pytest.raises(InputError, match=phrase) as raised:
        parse_input_shapes(texts)
    assert raised.value.exit_code == 2
    if "twice" not in phrase:
        assert "x:2x3x224x224" in str(raised.value)


def test_an_image_spec_survives_the_round_trip() -> None:
    spec = ImageSpec.from_dict(IMAGE)
    assert spec == ImageSpec((3, 4, 6), (0.5, 0.25, 0.0), (0.5, 1.0, 2))
    assert spec.to_dict() == IMAGE


@pytest.mark.parametrize(
    ("data", "phrase"),
    [
        ([3, 4, 6], r"^input: not a table"),
        ({"shape": [3, 4, 6], "mean": [0, 0, 0]}, r"^input\.std: missing"),
        ({**IMAGE, "layout": "NCHW"}, r"^input\.layout: unknown key"),
        ({**IMAGE, "shape": "3x4x6"}, r"^input\.shape: not a list"),
        ({**IMAGE, "shape": [4, 6]}, r"^input\.shape: not the shape of an image"),
        ({**IMAGE, "shape": [3, 0, 6]}, r"^input\.shape"),
        ({**IMAGE, "shape": [3, 4.0, 6]}, r"^input\.shape"),
        ({**IMAGE, "shape": [True, 4, 6]}, r"^input\.shape"),
        ({**IMAGE, "mean": [0.5]}, r"^input\.mean: does not fit the channels"),
        ({**IMAGE, "mean": [0.5, 0.5, math.nan]}, r"^input\.mean"),
        ({**IMAGE, "std": [1.0, 1.0, 0.0]}, r"^input\.std.*positive"),
        ({**IMAGE, "std": [1.0, 1.0, "1"]}, r"^input\.std"),
    ],
    ids=lambda value: None if isinstance(value, str) else str(value),
)
def test_a_wrong_image_spec_is_refused_by_the_name_of_its_key(data: Any, phrase: str) -> None:
    with pytest.raises(InputError, match=phrase):
        ImageSpec.from_dict(data)


def test_an_image_is_scaled_and_normalized_channel_by_channel(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    got = ImageSpec.from_dict(IMAGE).read(tmp_path / "a.png")
    assert (got.shape, got.dtype) == ((1, 3, 4, 6), np.float32)
    for channel, (mean, std) in enumerate([(0.5, 0.5), (0.25, 1.0), (0.0, 2.0)]):
        want = (pixels[:, :, channel] / 255 - mean) / std
        np.testing.assert_allclose(got[0, channel], want, **OP_FLOAT32.kwargs())


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "1", "CMYK", "LA"])
@pytest.mark.parametrize("channels", [1, 3])
def test_any_kind_of_image_becomes_grey_or_rgb(tmp_path: Path, mode: str, channels: int) -> None:
    path = tmp_path / f"a.{'tiff' if mode == 'CMYK' else 'png'}"
    Image.new(mode, (6, 4)).save(path)
    assert ImageSpec((channels, 4, 6), (0.0,) * channels, (1.0,) * channels).read(path).shape == (1, channels, 4, 6)


def test_an_image_is_resized_only_where_its_size_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left_white = np.zeros((10, 12), np.uint8)
    left_white[:, :6] = 255
    Image.fromarray(left_white).save(tmp_path / "a.png")
    got = grey(4, 6).read(tmp_path / "a.png")
    np.testing.assert_array_equal(got[0, 0, :, [0, 1, 4, 5]], [[1] * 4, [1] * 4, [0] * 4, [0] * 4])
    monkeypatch.delattr(Image.Image, "resize")
    np.testing.assert_array_equal(grey(10, 12).read(tmp_path / "a.png")[0, 0], left_white / 255)


PNG_FILE = io.BytesIO()
Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(PNG_FILE, "png")
PNG = PNG_FILE.getvalue()


@pytest.mark.parametrize(
    ("content", "phrase"),
    [
        (None, "no such file"),
        (b"", "not an image"),
        (b"text", "not an image"),
        (PNG[:8], "not an image"),
        (PNG[:2000], "not an image"),
    ],
    ids=["missing", "empty", "text", "header alone", "cut short"],
)
def test_a_file_that_is_no_image_is_refused(tmp_path: Path, content: bytes | None, phrase: str) -> None:
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(InputError, match=phrase):
        grey(4, 6).read(tmp_path / "a.png")


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int32])
def test_more_than_8_bits_are_refused_and_not_clipped(tmp_path: Path, dtype: type[np.generic]) -> None:
    Image.fromarray(np.full((4, 6), 300, dtype)).save(tmp_path / "a.tiff")
    with pytest.raises(InputError, match="not 8 bits a channel"):
        grey(4, 6).read(tmp_path / "a.tiff")


def test_a_number_of_channels_without_colours_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no colour space"):
        ImageSpec((2, 4, 6), (0.0, 0.0), (1.0, 1.0)).read(tmp_path / "a.png")


def test_a_missing_pillow_is_told_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(BackendError, match="pip install") as raised:
        grey(4, 6).read(tmp_path / "a.png")
    assert raised.value.exit_code == 3


MAPS = TensorSpec("x", (2, 3, "H", "W"), "float32")


def sampled(
    *specs: TensorSpec, seed: int = 0, **base: tuple[int, ...]
) -> tuple[list[str], list[tuple[tuple[int, ...], ...]]]:
    labels, shapes = [], []
    for label, feeds in sample_inputs(specs, seed=seed, base=base or {}):
        labels.append(label)
        shapes.append(tuple(feeds[spec.name].shape for spec in specs))
    return labels, shapes


def test_a_static_input_is_sampled_once_and_a_free_batch_at_1_and_at_another() -> None:
    assert sampled(TensorSpec("x", (2, 3, 8, 8), "float32")) == (["x 2x3x8x8"], [((2, 3, 8, 8),)])
    assert sampled(TensorSpec("x", ("N", 3), "float32"), x=(4, 3))[1] == [((4, 3),), ((1, 3),), ((5, 3),)]
    assert sampled(TensorSpec("x", ("N", 3), "float32"), x=(1, 3))[1] == [((1, 3),), ((2, 3),)]


@pytest.mark.parametrize("seed", range(8))
def test_free_maps_are_sampled_at_odd_and_at_oblong_sizes_near_the_base(seed: int) -> None:
    labels, shapes = sampled(MAPS, seed=seed, x=(2, 3, 32, 32))
    (base,), (odd,), (oblong,), (larger,) = shapes
    assert base == (2, 3, 32, 32)
    assert odd[2] % 2 == odd[3] % 2 == 1
    assert oblong[2] != oblong[3]
    assert all(32 <= size <= 32 + 31 for shape in (odd, oblong) for size in shape[2:])
    assert larger == (2, 3, 64, 64), "what a U-net of total stride 32 takes"
    assert labels[1] == f"x 2x3x{odd[2]}x{odd[3]}"
    assert shapes == sampled(MAPS, seed=seed, x=(2, 3, 32, 32))[1]


def test_sizes_that_differ_at_the_base_never_meet() -> None:
    oblong = [sampled(MAPS, seed=seed, x=(2, 3, 8, 10))[1][2][0] for seed in range(100)]
    assert all(height != width for *_, height, width in oblong)


def test_another_seed_gives_other_sizes_and_values() -> None:
    assert len({tuple(sampled(MAPS, seed=seed, x=(2, 3, 32, 32))[0]) for seed in range(8)}) > 1
    samples = [next(sample_inputs([MAPS], seed=seed, base={"": (2, 3, 9, 9)})) for seed in (0, 0, 1)]
    first, again, other = (feeds["x"] for _, feeds in samples)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_sizes_of_one_name_are_the_same_everywhere_and_others_are_not_mixed_up() -> None:
    specs = (
        TensorSpec("x", ("N", 3, "S", "S"), "float32"),
        TensorSpec("y", ("N", "C", "S"), "float32"),
        TensorSpec("z", ("?", 2, "?"), "float32"),
    )
    shapes = sampled(*specs, x=(2, 3, 16, 16), y=(2, 5, 16), z=(4, 2, 7))[1]
    assert len(set(shapes)) == len(shapes) >= 4
    for x, y, z in shapes:
        assert x[0] == y[0]
        assert x[2] == x[3] == y[2]
        assert (x[1], y[1], z[1]) == (3, 5, 2)  # axis 1 is channels: what may change there has no safe other size
    assert {z[0] for *_, z in shapes} == {4, 1, 5}


@pytest.mark.parametrize(
    ("dtype", "low", "high"), [("int64", 0, 7), ("uint8", 0, 7), ("bool", 0, 1), ("float16", -6, 6), ("float64", -6, 6)]
)
def test_values_suit_the_dtype(dtype: str, low: float, high: float) -> None:
    ((_, feeds),) = sample_inputs([TensorSpec("x", (500,), dtype)], seed=0, base={})
    assert feeds["x"].dtype == np.dtype(dtype)
    assert low <= feeds["x"].min() < feeds["x"].max() <= high
    if dtype.startswith("float"):
        assert abs(feeds["x"].astype(np.float64).mean()) < 0.2 < 0.8 < feeds["x"].astype(np.float64).std() < 1.2


@pytest.mark.parametrize(
    ("base", "phrase"),
    [
        ({}, r"input x: some of its axes are dynamic.*x:2x3x224x224"),
        ({"y": (1, 3, 8, 8)}, r"no input is called 'y'"),
        ({"x": (1, 3, 8)}, r"input x: the given shape does not fit. Got 1x3x8; expected Nx3xHxW"),
        ({"x": (1, 4, 8, 8)}, r"the given shape does not fit"),
        ({"": (1, 3, 8, 8)}, r"a shape without a name, but several inputs"),
        ({"x": (1, 3, 8, 8), "m": (2,)}, r"input m: two sizes for 'N'. Got 1 and 2"),
    ],
    ids=str,
)
def test_a_base_that_does_not_fit_is_refused(base: dict[str, tuple[int, ...]], phrase: str) -> None:
    specs = [TensorSpec("x", ("N", 3, "H", "W"), "float32"), TensorSpec("m", ("N",), "float32")]
    with pytest.raises(InputError, match=phrase):
        list(sample_inputs(specs, seed=0, base={"m": (1,), **base} if base else base))


@pytest.mark.parametrize("dtype", ["float7", "object", "str"])
def test_a_dtype_without_numbers_is_refused(dtype: str) -> None:
    with pytest.raises(InputError, match="dtype"):
        list(sample_inputs([TensorSpec("x", (2,), dtype)], seed=0, base={}))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"inputs": 3}', '{"inputs": {"x": [0, 0]}}', '{"inputs": {"x": [[1, 0, "a"], null]}}',
     '{"inputs": {"x": [[1e400, 1, "a"], null]}}', '{"inputs": {"x": [[-2, 1, "a"], null]}}',
     '{"inputs": {"x": [[2, 100000, "a"], null]}}', '{"inputs": {"x": [[true, 1, "a"], null]}}', "[" * 100_000],
)  # fmt: skip
def test_damaged_sizes_are_as_none(text: str) -> None:
    spec = TensorSpec("x", ("N", 3), "float32")
    assert with_sizes([spec], read_sizes(text))[0].sizes == ()


def test_sizes_survive_the_round_trip() -> None:
    spec = TensorSpec("x", ("N", 3), "float32", (AxisSizes(2, 1, "0"), None))
    text = json.dumps(sizes_to_dict([spec], ["a note"]))
    assert with_sizes([TensorSpec("x", ("N", 3), "float32")], read_sizes(text))[0].sizes == spec.sizes
    assert read_sizes(text)["notes"] == ["a note"]
