"""What kind of file a checkpoint is, by its first bytes and its zip members; nothing is unpickled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from deploynorm.checkpoint._numpy import is_npy, is_npz, is_pickle, read_npy, read_npz, read_pickle
from deploynorm.checkpoint._pickle import unpickle
from deploynorm.checkpoint._pt2 import load_program
from deploynorm.checkpoint._safetensors import is_safetensors, load_tensors
from deploynorm.checkpoint._zip import whole_members
from deploynorm.errors import ModelError

ACCEPTED = "a file written by torch.save, by torch.export.save, by safetensors, by numpy.savez or by deploynorm"


class Format(NamedTuple):
    """One kind of file."""

    recognises: Callable[[bytes, set[str]], bool]
    """Whether a file is one, by its bytes and, if it is a zip archive, its members without their folder."""
    read: Callable[..., object]
    """read(data, where, trust=) -> a network, a program of torch.export, our own checkpoint or a state dict."""


_LEGACY_MAGIC = (0x1950A86A20F9469CFC6C).to_bytes(10, "little")
"""The number that a file of the old torch.save begins with, as bytes of its pickle."""

FORMATS: Final = {
    "torch.export.save": Format(lambda data, members: "archive_format" in members, load_program),
    "torch.save": Format(lambda data, members: "data.pkl" in members, unpickle),
    "safetensors": Format(lambda data, _: is_safetensors(data), load_tensors),
    "torch.save before 1.6": Format(lambda data, _: data[:1] == b"\x80" and _LEGACY_MAGIC in data[:64], unpickle),
    ".npz": Format(lambda data, _: is_npz(data), read_npz),
    ".npy": Format(lambda data, _: is_npy(data), read_npy),
    "pickle of arrays": Format(lambda data, _: is_pickle(data), read_pickle),
}
"""The formats that `load` reads; the first that recognises a file has it."""

_FOREIGN = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x89HDF": "an HDF5 file, as Keras writes",
    b"\x1f\x8b": "a gzip file",
    b"\x7fELF": "a compiled program or library",
    b"version https://git-lfs": "a Git LFS pointer, not the file it points to",
}

_OF_OTHERS = (".ckpt", ".keras", ".h5", ".hdf5", ".index", ".data-00000-of-00001", ".msgpack", ".pdparams")
"""Endings of what TensorFlow, Keras, MindSpore, Flax and Paddle write."""


def detect(data: bytes, where: str) -> Format:
    """The format of a checkpoint; ModelError if it is empty, damaged, TorchScript, or nothing that torch writes."""
    if not data:
        raise ModelError(where, "the file is empty", expected=ACCEPTED)
    members = whole_members(data, where)
    inner = {member.partition("/")[2] for member in members}
    if "constants.pkl" in inner:
        fix = "load it with torch.jit.load in Python, write its state_dict() with torch.save, and pass --factory"
        raise ModelError(where, "a TorchScript archive", expected=ACCEPTED, fix=fix)
    for known in FORMATS.values():
        if known.recognises(data, inner):
            return known
    if "serialized_exported_program.json" in members:
        fix = "load it with that version, or trace the network again with this one, and torch.export.save it"
        raise ModelError(where, "a torch.export archive of PyTorch 2.7 or older", fix=fix)
    of_another = data.startswith(b"\x89HDF") or where.endswith(_OF_OTHERS)
    convert = "write its arrays into an .npz where it was made, in two lines of Python: docs/import.md"
    got = _describe(data, where)
    raise ModelError(where, "not a checkpoint", got=got, expected=ACCEPTED, fix=convert if of_another else None)


def _describe(data: bytes, where: str) -> str:
    for magic, name in _FOREIGN.items():
        if data.startswith(magic):
            return name
    if data[:2] == b"PK":
        return "another zip archive"
    if where.endswith(".onnx"):
        return "an ONNX model"
    start = data[:512].lstrip()
    if start[:1] == b"<":
        return "an HTML or XML page"
    return "text" if all(byte in b"\t\n\r\f" or byte >= 32 for byte in start) else "unknown bytes"
