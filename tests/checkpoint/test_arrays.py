"""State dicts in files of arrays: .npz, .npy, and bare pickles of dicts, which run no code."""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import EXACT
from torch import nn

from deploynorm.checkpoint import import_checkpoint, load
from deploynorm.errors import ModelError

ARRAYS = {
    "norm/weight:0": np.arange(3, dtype=np.float32),
    "norm/bias:0": np.ones(3, ">f4"),
    "norm/eps:0": np.float64([1e-5]),
    "conv/weight:0": np.asfortranarray(np.random.default_rng(0).normal(size=(3, 2, 1, 4))),
    "a/flag:0": np.array([[True, False]]),
    "a/half:0": np.ones(0, np.float16),
    "a/count:0": np.array(7),
}


def npz(arrays: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **options)
    return buffer.getvalue()


def npy(content: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, content)
    return buffer.getvalue()


def of_old_numpy(arrays: Any) -> bytes:
    """As NumPy before 2.0 names its functions, in a protocol that has these as lines."""
    return pickle.dumps(arrays, 2).replace(b"numpy._core", b"numpy.core")


FILES: dict[str, Callable[[Any], bytes]] = {
    "npz": npz,
    "npy": npy,
    "old": of_old_numpy,
    "ordered": lambda arrays: pickle.dumps(OrderedDict(arrays)),
    **{f"protocol {n}": lambda arrays, n=n: pickle.dumps(arrays, n) for n in range(2, 6)},
}


@pytest.mark.parametrize("trust", [False, True], ids=["", "trusted"])
@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_arrays_come_by_their_names(write: Callable[[Any], bytes], trust: bool, tmp_path: Path) -> None:
    path = tmp_path / "XSeg_256.npy"
    path.write_bytes(write(ARRAYS))
    state = import_checkpoint(path, "deepfacelab", trust_pickle=trust).translation.state_dict
    assert state["norm.weight"].tolist() == [0, 1, 2]
    assert state["norm.bias"].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(state["conv.weight"].numpy(), ARRAYS["conv/weight:0"].transpose(3, 2, 0, 1))
    assert state["a.flag"].tolist() == [[True, False]]
    assert (state["a.half"].shape, state["a.half"].dtype, int(state["a.count"])) == ((0,), torch.float16, 7)


def test_load_takes_arrays_as_a_state_dict(tmp_path: Path) -> None:
    layer = nn.Conv2d(1, 2, 3)
    path = tmp_path / "weights.npz"
    path.write_bytes(npz({name: tensor.numpy() for name, tensor in layer.state_dict().items()}))
    got = load(path, factory="torch.nn:Conv2d", kwargs={"in_channels": 1, "out_channels": 2, "kernel_size": 3})
    torch.testing.assert_close(got.model.state_dict(), layer.state_dict(), **EXACT.kwargs())


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, ("harm",)


class Renamed:
    """What is called in place of a function of NumPy must not be changed by the file for the next one."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("f4", False, True), {"code": "O8"}


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def doubled(content: bytes) -> bytes:
    """An .npz with its last member once more, of other values."""
    archive = io.BytesIO(content)
    with zipfile.ZipFile(archive, "a") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile tells of it
        file.writestr(file.namelist()[-1], npy(np.ones(3)))
    return archive.getvalue()


REFUSED: dict[str, tuple[bytes, str]] = {
    "an array twice": (doubled(npz({"b": np.ones(2), "a": np.ones(2)})), "arrays of one name. Got a. "),
    "code": (pickle.dumps({"a": Harmful()}), r"would run code that it names. Got \w+\.mkdir"),
    "code in an npy": (npy({"a": Harmful()}), r"would run code that it names. Got \w+\.mkdir"),
    "code in an npz": (npz({"a": np.array([Harmful()], object)}), "cannot be read: ValueError: Object arrays"),
    "a class of its own": (pickle.dumps({"a": Renamed}), "would run code"),
    "attributes of a function": (pickle.dumps({"a": Renamed()}), "cannot be read"),
    "cut short": (cut(pickle.dumps(ARRAYS)), "the file cannot be read"),
    "cut npy": (npy(ARRAYS)[:150], "the file cannot be read"),
    "cut npz": (cut(npz(ARRAYS)), "a damaged or cut-short zip archive"),
    "no header": (b"\x93NUMPY\x01\x00", "the file cannot be read"),
    "one array": (npy(np.ones(3)), r"one NumPy array without a name.* Got float64 \(3,\)"),
    "a list": (pickle.dumps([1]), "no dict of arrays. Got list"),
    "numbers": (pickle.dumps({"a": 1}), "no dict of arrays. Got a dict of 1"),
    "nothing": (pickle.dumps({}), "no dict of arrays. Got a dict of 0"),
    "text": (npz({"a": np.array(["b"])}), "'a' is no array of numbers. Got <U1"),
    "objects": (pickle.dumps({"a": np.array([None, 1], object)}), "the file cannot be read"),
    "dates": (pickle.dumps({"a": np.array([1], "M8[s]")}), "the file cannot be read"),
    "too few values": (
        pickle.dumps({"a": np.ones(3, np.int8)}, 2).replace(b"K\x03\x85", b"K\x07\x85"), "3 values for the shape",
    ),
    "a huge memo": (b"\x80\x02r\xff\xff\xff\x7f.", "the file cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_and_nothing_is_run(content: bytes, message: str, here: Path) -> None:
    Path("w.npy").write_bytes(content)
    with pytest.raises(ModelError, match=message):
        import_checkpoint("w.npy", "deepfacelab")
    assert not Path("harm").exists()


@pytest.mark.parametrize("name", ["w.h5", "model.keras", "frn.ckpt", "variables.index"])
def test_files_of_other_frameworks_are_to_be_written_as_npz(name: str, here: Path) -> None:
    Path(name).write_bytes(b"\x89HDF\r\n\x1a\n" if name == "w.h5" else b"\x0a\x1d\x0a\x08conv1")
    with pytest.raises(ModelError, match=r"write its arrays into an .npz where it was made, .*: docs/import.md"):
        import_checkpoint(name)
