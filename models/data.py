"""The two data sets of the training recipe, as whole tensors in memory: Fashion-MNIST and scikit-learn's digits."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deploynorm.errors import BackendError, InputError

__all__ = ["ImageData", "augment", "load", "load_digits", "load_fashion_mnist", "read_idx"]

FASHION_MNIST_VARIABLE = "DEPLOYNORM_FASHION_MNIST"
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_LABELS = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


class ImageData(NamedTuple):
    """A classification data set. Images are uint8 (N, C, H, W), classes int64 (N,)."""

    name: str
    train_images: Tensor
    train_classes: Tensor
    test_images: Tensor
    test_classes: Tensor
    labels: tuple[str, ...]
    """Name of each class."""
    mirror: bool
    """Whether a horizontally flipped image is still of its class."""

    def mean(self) -> list[float]:
        """Mean of each channel over the training images, pixels scaled to 0..1."""
        return self._pixels().mean((0, 2, 3)).tolist()

    def std(self) -> list[float]:
        """Standard deviation of each channel over the training images, pixels scaled to 0..1."""
        return self._pixels().std((0, 2, 3), correction=0).tolist()

    def _pixels(self) -> Tensor:
        return self.train_images.double() / 255


def load(source: str) -> ImageData:
    """Loads "fashion-mnist", "digits", or Fashion-MNIST from the folder `source`.

    Raises:
        InputError: source is neither, or a file in it is damaged.
        BackendError: The data, or the package that brings it, is not installed.
    """
    if source == "fashion-mnist":
        return load_fashion_mnist()
    if source == "digits":
        return load_digits()
    folder = Path(source)
    if not folder.is_dir():
        raise InputError("data", "no such data set", got=source, expected="fashion-mnist, digits or a folder")
    return load_fashion_mnist(folder)


def load_fashion_mnist(folder: Path | None = None) -> ImageData:
    """Fashion-MNIST: 60,000 training and 10,000 test images of clothing, 28x28, grey, 10 classes.

    Args:
        folder: Holds the four IDX files, plain or gzipped. None: $DEPLOYNORM_FASHION_MNIST, or where Debian's
            package dataset-fashion-mnist puts them.

    Raises:
        BackendError: A file is missing.
        InputError: A file is damaged, or images and labels do not match.

    Source: Xiao, Rasul & Vollgraf, arXiv:1708.07747.
    """
    if folder is None:
        folder = Path(os.environ.get(FASHION_MNIST_VARIABLE) or FASHION_MNIST_FOLDER)
    train_images, train_classes = _read_pair(folder, "train")
    test_images, test_classes = _read_pair(folder, "t10k")
    return ImageData(
        "fashion-mnist", train_images, train_classes, test_images, test_classes, FASHION_MNIST_LABELS, mirror=True
    )


def load_digits() -> ImageData:
    """scikit-learn's digits: 1,797 handwritten digits, 8x8, grey; a fifth of each class is for testing.

    Raises:
        BackendError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise BackendError(
            "data", "the digits come with scikit-learn, which is missing", fix="pip install 'deploynorm[train]'"
        ) from error
    bunch = datasets.load_digits()
    # 16 grey levels stored as 0..16: scaled so that 1.0 means white here as in every other image.
    images = torch.from_numpy(np.rint(bunch.images * (255 / 16)).astype(np.uint8))[:, None]
    classes = torch.from_numpy(bunch.target.astype(np.int64))
    is_test = torch.zeros(len(classes), dtype=torch.bool)
    for digit in range(10):
        is_test[torch.nonzero(classes == digit).flatten()[::5]] = True
    labels = tuple(str(digit) for digit in range(10))
    return ImageData(
        "digits", images[~is_test], classes[~is_test], images[is_test], classes[is_test], labels, mirror=False
    )


def augment(images: Tensor, shift: int, mirror: bool, generator: torch.Generator) -> Tensor:
    """Shifts each image by up to `shift` pixels in each direction over black; with `mirror` flips half of them.

    Shape: (N, C, H, W) -> the same.
    """
    N, _, H, W = images.shape
    if mirror:
        chosen = torch.rand(N, 1, 1, 1, generator=generator) < 0.5
        images = torch.where(chosen, images.flip(3), images)
    top, left = torch.randint(0, 2 * shift + 1, (2, N, 1, 1), generator=generator)
    rows = top + torch.arange(H)[:, None]
    columns = left + torch.arange(W)
    padded = F.pad(images, (shift,) * 4).permute(0, 2, 3, 1)
    return padded[torch.arange(N)[:, None, None], rows, columns].permute(0, 3, 1, 2)


def read_idx(path: Path, axes: int) -> Tensor:
    """Reads an IDX file of unsigned bytes, plain or gzipped.

    Args:
        path: The file; gzip is recognised by its first bytes, not by its name.
        axes: Axes that it must have: 1 for labels, 3 for images.

    Returns:
        uint8 tensor with the sizes that the header gives.

    Raises:
        InputError: The magic number, the sizes and the length of the file do not agree.
    """
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (EOFError, OSError, zlib.error) as error:
            raise InputError(str(path), "damaged gzip file", got=error, fix="download it again") from error
    # Two zero bytes, 8 for unsigned byte, the number of axes; then each size as a big-endian int32.
    magic = bytes((0, 0, 8, axes))
    if raw[:4] != magic:
        raise InputError(
            str(path),
            f"not an IDX file of bytes with {axes} {'axis' if axes == 1 else 'axes'}",
            got=f"magic number {raw[:4].hex() or 'of an empty file'}",
            expected=magic.hex(),
        )
    start = 4 + 4 * axes
    if len(raw) < start:
        raise InputError(str(path), "the header is cut off", got=f"{len(raw)} bytes", expected=f"{start} or more")
    sizes = [int.from_bytes(raw[4 + 4 * axis : 8 + 4 * axis], "big") for axis in range(axes)]
    if len(raw) != start + math.prod(sizes):
        raise InputError(
            str(path),
            "the file is not as long as its header says",
            got=f"{len(raw)} bytes",
            expected=f"{start + math.prod(sizes)} for sizes {sizes}",
            fix="download it again",
        )
    return torch.from_numpy(np.frombuffer(raw, np.uint8, offset=start).reshape(sizes).copy())


def _read_pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    images = read_idx(_find(folder, f"{part}-images-idx3-ubyte"), axes=3)[:, None]
    classes = read_idx(_find(folder, f"{part}-labels-idx1-ubyte"), axes=1).long()
    if images.numel() == 0:
        raise InputError(str(folder), f"the {part} images are empty", got=f"sizes {list(images.shape)}")
    if len(images) != len(classes):
        raise InputError(
            str(folder), f"{part} images and labels do not match", got=f"{len(images)} images, {len(classes)} labels"
        )
    if int(classes.max()) >= len(FASHION_MNIST_LABELS):
        raise InputError(str(folder), f"{part} has a label out of range", got=int(classes.max()), expected="0 to 9")
    return images, classes


def _find(folder: Path, name: str) -> Path:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    raise BackendError(
        "data",
        f"no Fashion-MNIST in {folder}",
        got="no such file",
        expected=f"{name} or {name}.gz",
        fix=f"apt install dataset-fashion-mnist, or set {FASHION_MNIST_VARIABLE} or --data to a folder that has it",
    )
