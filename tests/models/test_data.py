"""Reading the data sets: IDX files whole and damaged, Fashion-MNIST from a folder, the digits."""

from __future__ import annotations

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deploynorm.errors import BackendError, InputError
from deploynorm.models import data

PIXELS = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


def idx(array: np.ndarray, magic: int | None = None, sizes: tuple[int, ...] | None = None) -> bytes:
    sizes = sizes or array.shape
    magic = magic or 0x800 + array.ndim
    return struct.pack(f">{1 + len(sizes)}I", magic, *sizes) + array.tobytes()


@pytest.fixture
def folder(tmp_path):
    """A Fashion-MNIST folder of 6 training and 3 test images, the images gzipped, the labels plain."""
    for part, count in (("train", 6), ("t10k", 3)):
        images = np.arange(count * 28 * 28, dtype=np.uint32).astype(np.uint8).reshape(count, 28, 28)
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8)))
    return tmp_path


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("array", [PIXELS, PIXELS.reshape(-1), PIXELS[:0]], ids=["images", "labels", "no image"])
def test_an_idx_file_reads_back(tmp_path, pack, array):
    path = tmp_path / "file"
    path.write_bytes(pack(idx(array)))
    got = data.read_idx(path, axes=array.ndim)
    assert got.dtype == torch.uint8
    np.testing.assert_array_equal(got.numpy(), array)


DAMAGED = {
    "empty": (b"", "not an IDX file of bytes with 3 axes.*empty file"),
    "three bytes": (b"\0\0\x08", "not an IDX file.*magic number 000008"),
    "labels for images": (idx(PIXELS, magic=0x801), "not an IDX file.*00000801.*00000803"),
    "floats": (idx(PIXELS, magic=0xD03), "not an IDX file.*00000d03"),
    "another format": (b"\x89PNG\r\n\x1a\n" + bytes(30), "not an IDX file.*89504e47"),
    "header cut": (idx(PIXELS)[:9], "header is cut off.*9 bytes.*16 or more"),
    "pixels cut": (idx(PIXELS)[:-1], "not as long as its header says.*39 bytes.*40 for sizes"),
    "trailing bytes": (idx(PIXELS) + b"\0", "not as long as its header says.*41 bytes"),
    "sizes past the file": (idx(PIXELS, sizes=(2**32 - 1,) * 3), "not as long as its header says"),
    "gzip cut": (gzip.compress(idx(PIXELS))[:-9], "damaged gzip"),
    "gzip garbage": (gzip.compress(idx(PIXELS))[:10] + b"\xff" * 20, "damaged gzip.*invalid block"),
    "gzip checksum": (gzip.compress(idx(PIXELS))[:-8] + bytes(8), "damaged gzip.*CRC"),
    "cut before gzip": (gzip.compress(idx(PIXELS)[:-1]), "not as long as its header says"),
}


@pytest.mark.parametrize(("content", "message"), DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_idx_file_is_refused(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"(?s)images: .*{message}"):
        data.read_idx(path, axes=3)


def test_a_folder_holds_fashion_mnist(folder):
    images = data.load(str(folder))
    assert images.train_images.shape == (6, 1, 28, 28)
    assert images.test_images.shape == (3, 1, 28, 28)
    assert images.train_classes.tolist() == [0, 1, 2, 3, 4, 5]
    assert images.train_classes.dtype == torch.int64
    assert images.labels[9] == "Ankle boot"


def test_the_environment_names_the_folder(folder, monkeypatch):
    monkeypatch.setenv("DEPLOYNORM_FASHION_MNIST", str(folder))
    assert len(data.load("fashion-mnist").train_images) == 6


def test_mean_and_std_are_those_of_the_training_images_on_a_scale_of_one(folder):
    images = data.load(str(folder))
    pixels = images.train_images.numpy() / 255
    assert images.mean() == pytest.approx([pixels.mean()])
    assert images.std() == pytest.approx([pixels.std()])


def test_a_missing_file_names_the_package_and_the_variable(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(BackendError, match=r"t10k-labels.*dataset-fashion-mnist.*DEPLOYNORM_FASHION_MNIST"):
        data.load(str(folder))


@pytest.mark.parametrize(
    ("count", "labels", "message"),
    [
        (6, np.zeros(5, np.uint8), "do not match.*6 images, 5 labels"),
        (6, np.full(6, 10, np.uint8), "label out of range.*10.*0 to 9"),
        (0, np.zeros(0, np.uint8), "the train images are empty"),
    ],
    ids=["too few", "out of range", "empty"],
)
def test_labels_that_cannot_be_those_of_the_images_are_refused(folder, count, labels, message):
    (folder / "train-images-idx3-ubyte.gz").write_bytes(idx(np.zeros((count, 28, 28), np.uint8)))
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(labels))
    with pytest.raises(InputError, match=message):
        data.load(str(folder))


def test_an_unknown_data_set_is_refused():
    with pytest.raises(InputError, match=r"no such data set.*cifar.*fashion-mnist, digits or a folder"):
        data.load("cifar")


def test_the_digits_are_split_the_same_way_each_time_with_a_fifth_of_each_class_for_testing():
    first, second = data.load("digits"), data.load("digits")
    assert torch.equal(first.test_images, second.test_images)
    assert len(first.train_images) + len(first.test_images) == 1797
    for digit in range(10):
        train, test = int((first.train_classes == digit).sum()), int((first.test_classes == digit).sum())
        assert test == -(-(train + test) // 5)
    assert first.labels == tuple("0123456789")
    assert first.train_images.shape[1:] == (1, 8, 8)
    assert int(first.train_images.max()) == 255


def test_digits_without_scikit_learn_name_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(BackendError, match=r"scikit-learn.*pip install"):
        data.load("digits")


def test_augmentation_gives_windows_of_the_padded_image_and_mirrors_half_of_them():
    images = torch.randint(1, 256, (64, 2, 6, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    got = data.augment(images, 2, True, torch.Generator().manual_seed(1))
    assert got.dtype == torch.uint8
    assert got.shape == images.shape

    seen = set()
    for before, after in zip(images, got, strict=True):
        windows = {
            (top, left, mirrored): F.pad(source, (2, 2, 2, 2))[:, top : top + 6, left : left + 5]
            for mirrored, source in ((False, before), (True, before.flip(2)))
            for top in range(5)
            for left in range(5)
        }
        matches = [key for key, window in windows.items() if torch.equal(window, after)]
        assert len(matches) == 1
        seen.update(matches)
    assert {top for top, _, _ in seen} == {left for _, left, _ in seen} == {0, 1, 2, 3, 4}
    assert {mirrored for _, _, mirrored in seen} == {False, True}


def test_without_shift_and_mirror_an_image_stays_as_it_is():
    images = torch.randint(0, 256, (8, 1, 5, 5), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert torch.equal(data.augment(images, 0, False, torch.Generator().manual_seed(1)), images)


def test_fashion_mnist_is_whole_and_balanced(fashion_mnist):
    assert fashion_mnist.train_images.shape == (60_000, 1, 28, 28)
    assert fashion_mnist.test_images.shape == (10_000, 1, 28, 28)
    assert torch.bincount(fashion_mnist.train_classes).tolist() == [6_000] * 10
    assert torch.bincount(fashion_mnist.test_classes).tolist() == [1_000] * 10
    # The figures that other projects use, to the digits they give.
    assert fashion_mnist.mean() == pytest.approx([0.2860], abs=5e-5)
    assert fashion_mnist.std() == pytest.approx([0.3530], abs=5e-5)
