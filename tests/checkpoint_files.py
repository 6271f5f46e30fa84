"""Makes files for the checkpoint tests."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["FACTORY", "own", "rewritten", "saved"]

FACTORY = "deploynorm.models.frn_resnet:resnet20"


def saved(content: object, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(content, buffer, **options)
    return buffer.getvalue()


def own(**changed: Any) -> dict[str, Any]:
    """The content of a file in our own format, of one weight; `...` leaves a key out."""
    content = {"format": "deploynorm", "factory": FACTORY, "kwargs": {}, "state_dict": {"w": torch.ones(1)}, **changed}
    return {key: value for key, value in content.items() if value is not ...}


def rewritten(
    archive: bytes,
    change: Callable[[str, bytes], bytes | None] = lambda name, content: content,
    add: Mapping[str, bytes] | None = None,
) -> bytes:
    """A zip archive with each member changed (None drops it), and some added; names are those below its only folder."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(buffer, "w") as new:
        root = old.namelist()[0].partition("/")[0]
        for member in old.namelist():
            content = change(member.partition("/")[2], old.read(member))
            if content is not None:
                new.writestr(member, content)
        for name, content in (add or {}).items():
            new.writestr(f"{root}/{name}", content)
    return buffer.getvalue()
