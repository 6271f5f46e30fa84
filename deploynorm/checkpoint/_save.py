"""Writing a network as a checkpoint that `load` reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deploynorm.checkpoint._factory import check_is_text, check_own, is_own, split_name
from deploynorm.checkpoint._format import Content
from deploynorm.errors import ModelError
from deploynorm.files import staging
from deploynorm.image import ImageSpec

__all__ = ["save"]


def save(
    path: Path | str,
    *,
    factory: str,
    kwargs: Mapping[str, Any] | None = None,
    model: nn.Module,
    image: ImageSpec | None = None,
    labels: Sequence[str] | None = None,
    training: Mapping[str, Any] | None = None,
) -> None:
    """Writes a checkpoint that `load` and every command read: weights, and how the network is made.

        # nets.py has def unet(width: int) -> nn.Module
        deploynorm.save("own.pt", factory="nets:unet", kwargs={"width": 16}, model=network)

        deploynorm export own.pt --factory nets:unet                # in the folder of nets.py, or where it is installed
        deploynorm.load("own.pt", factory="nets:unet")

    A network of your own requires the factory to be typed again, as here, because a file must not choose what code
    runs; its arguments come from the file. One of deploynorm.models does not.

    The file is written beside the old one first, so that a failure leaves that one whole.

    Args:
        path: The file.
        factory: "pkg.mod:function", which makes the network when it is called with kwargs.
        kwargs: Its keyword arguments, plain data; none by default.
        model: The network whose parameters and buffers are written.
        image: How an image becomes its input. Commands take the input's shape from it, and read images.
        labels: Name of each class, which `deploynorm run` prints.
        training: What is to be known of the training, plain data.

    Raises:
        InputError: kwargs or training is not plain data, labels are not text, or the folder cannot be written to.
        ModelError: factory is not such a name, deploynorm.models has no such factory, or the file cannot be written.
    """
    path = Path(path)
    where = f"save {path}"
    check_is_text(factory, where)
    if is_own(factory):
        check_own(factory, where)
    else:
        split_name(factory, where)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    content = Content(factory, kwargs or {}, state, image, None if labels is None else tuple(labels), training).pack(
        where
    )
    with staging(path) as folder:
        try:
            with (folder / path.name).open("wb") as file:
                torch.save(content, file)
        except OSError as error:
            raise ModelError(where, f"the file cannot be written: {error}") from error
