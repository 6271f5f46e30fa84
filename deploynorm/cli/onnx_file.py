"""Reading what an ONNX file says of itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import google.protobuf.message
import onnx

from deploynorm.contract import METADATA_IMAGE, METADATA_LABELS
from deploynorm.errors import InputError, ModelError
from deploynorm.image import ImageSpec

__all__ = ["image_and_labels", "read_graph"]


def read_graph(path: Path) -> onnx.ModelProto:
    """The model without the external part of its weights.

    Raises:
        ModelError: No such file, or not ONNX.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except OSError as error:
        raise ModelError(str(path), f"cannot be read: {error.strerror}") from error
    except google.protobuf.message.DecodeError as error:
        raise ModelError(str(path), "not an ONNX file, or a damaged one", fix="export it again") from error
    if not model.graph.node:
        raise ModelError(str(path), "an ONNX file without a graph", fix="export it again")
    return model


def image_and_labels(path: Path) -> tuple[ImageSpec | None, tuple[str, ...] | None]:
    """How an image becomes the file's input, and its class names, where the file tells.

    Raises:
        ModelError: The file cannot be read, or its entries are not what `deploynorm export` writes.
    """
    entries: Mapping[str, str] = {entry.key: entry.value for entry in read_graph(path).metadata_props}
    image, labels = entries.get(METADATA_IMAGE), entries.get(METADATA_LABELS)
    try:
        names = None if labels is None else tuple(map(str, json.loads(labels)))
        return None if image is None else ImageSpec.from_dict(json.loads(image)), names
    except (InputError, ValueError) as error:
        raise ModelError(str(path), f"its deploynorm metadata is damaged: {error}", fix="export it again") from error
