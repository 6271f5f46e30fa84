"""What kind of file a checkpoint is, by its first bytes and its zip members; nothing is unpickled."""

from __future__ import annotations

import io
import zipfile
from typing import Literal

from deploynorm.errors import ModelError

__all__ = ["ACCEPTED", "Container", "detect"]

Container = Literal["zip", "legacy", "pt2"]
"""torch.save since 1.6, torch.save before it (or without its zip format), torch.export.save."""

ACCEPTED = "a file written by torch.save, by torch.export.save or by deploynorm"

_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""The number that a file of the old torch.save begins with, as bytes of its pickle."""

_FOREIGN = (
    (b"\x89PNG", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"\x89HDF", "an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"\x1f\x8b", "a gzip file"),
    (b"\x7fELF", "a compiled program or library"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file it points to"),
)


def detect(data: bytes, where: str) -> Container:
    """The container of a checkpoint.

    Args:
        data: The whole file.
        where: Its path, for messages.

    Raises:
        ModelError: Empty, damaged, TorchScript, or nothing that torch writes.
    """
    if not data:
        raise ModelError(where, "the file is empty", expected=ACCEPTED)
    # torch too recognises a zip archive by these bytes alone; both must decide alike.
    if data[:4] == b"PK\x03\x04":
        return _detect_zip(data, where)
    if data[:1] == b"\x80":
        if _LEGACY_MAGIC in data[:64]:
            return "legacy"
        raise ModelError(
            where,
            "a pickle that torch.save did not write",
            expected=ACCEPTED,
            fix="load it where it was made and write it with torch.save(model.state_dict(), path)",
        )
    raise ModelError(where, "not a checkpoint", got=_describe(data, where), expected=ACCEPTED)


def _detect_zip(data: bytes, where: str) -> Container:
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = archive.namelist()
    except Exception as error:  # zipfile lets struct, unicode and overflow errors through on damaged files
        raise ModelError(
            where, "a damaged or cut-short zip archive", fix="copy, download or write the file again"
        ) from error
    inner = {member.partition("/")[2] for member in members}
    if "constants.pkl" in inner:
        raise ModelError(
            where,
            "a TorchScript archive",
            expected=ACCEPTED,
            fix="load it with torch.jit.load in Python, write its state_dict() with torch.save, and pass --factory",
        )
    if "archive_format" in inner:
        return "pt2"
    if "data.pkl" in inner:
        return "zip"
    if "serialized_exported_program.json" in members:
        raise ModelError(
            where,
            "a torch.export archive of PyTorch 2.7 or older",
            fix="load it with that version, or trace the network again with this one, and torch.export.save it",
        )
    got = "a NumPy .npz" if members and all(member.endswith(".npy") for member in members) else "another zip archive"
    raise ModelError(where, "not a checkpoint", got=got, expected=ACCEPTED)


def _describe(data: bytes, where: str) -> str:
    for magic, name in _FOREIGN:
        if data.startswith(magic):
            return name
    if data[8:10] == b'{"' and int.from_bytes(data[:8], "little") < len(data):
        return "a safetensors file; torch.save(safetensors.torch.load_file(path), ...) makes a checkpoint of it"
    if where.endswith(".onnx"):
        return "an ONNX model"
    start = data[:512].lstrip()
    if start[:1] == b"<":
        return "an HTML or XML page"
    return "text" if all(byte in b"\t\n\r\f" or byte >= 32 for byte in start) else "unknown bytes"
