"""Reading a torch.export archive (.pt2) without running code that it names.

torch.export.load runs code in an archive by its pickles and by the text of its program (see _program.py). So nothing
of the archive reaches torch as it is: each part is checked, and a new archive is written from the parts that passed.
"""

from __future__ import annotations

import io
import json
import re
import textwrap
import warnings
import zipfile
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch._export.serde.serialize import _SERIALIZE_TO_TORCH_DTYPE
from torch.export import ExportedProgram
from torch.export.pt2_archive import PT2ArchiveWriter

import deploynorm.layers.functional  # noqa: F401  registers the operator that archives of our networks name
from deploynorm.checkpoint._kernels import guard_kernels
from deploynorm.checkpoint._limits import check_archive, time_limit
from deploynorm.checkpoint._pickle import TRUST, unpickle
from deploynorm.checkpoint._program import RefusedError, check_extent, clean
from deploynorm.errors import ModelError
from deploynorm.quiet import quiet

_MODEL = "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_PICKLES = ("data/sample_inputs/model.pt", "data/weights/model.pt", "data/constants/model.pt")
_RAW = re.compile(r"data/(weights/weight|constants/tensor)_[0-9]+")
_WRITTEN_ANEW = re.compile(r"archive_format|archive_version|byteorder|version|\.data/\w+|extra/.*")
_CODE = {
    "data/aotinductor/": "machine code compiled by AOTInductor",
    "data/executorch/": "an ExecuTorch program",
    "data/constants/custom_obj_": "a pickled TorchScript object",
    "data/constants/opaque_obj_": "a pickled Python object",
}


def load_program(data: bytes, where: str, *, trust: bool) -> ExportedProgram:
    """The program in an archive of torch.export.save, moved to the CPU; the reader of `_detect.FORMATS`.

    Unless trusted, which loads it as torch does, the program's origin (stack traces, module names) is dropped, and a
    ModelError refuses code and anything that this reader does not know to be none.
    """
    from torch.export.pt2_archive._package import load_pt2

    with nullcontext() if trust else time_limit(len(data), where):
        archive = io.BytesIO(data) if trust else _rewritten(data, where)
        try:
            with quiet("torch.export", "torch._export", "torch.fx"), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # what matters of them comes back as an exception
                programs: dict[str, ExportedProgram] = load_pt2(archive).exported_programs
                if not trust:
                    for program in programs.values():
                        guard_kernels(program.graph_module, where)
        except ModelError:
            raise
        except Exception as error:  # a damaged program makes torch raise nearly anything
            cause = f"{type(error).__name__}: {textwrap.shorten(str(error), 300)}"
            fix = f"export the network again with torch {torch.__version__}"
            raise ModelError(where, f"torch.export cannot load the archive: {cause}", fix=fix) from error
    if "model" not in programs:
        raise ModelError(where, "no program in the archive", expected=_MODEL)
    return programs["model"]


def _rewritten(data: bytes, where: str) -> io.BytesIO:
    try:
        return _rewrite(data, where)
    except RefusedError as refusal:
        expected = "a graph of ATen and deploynorm operators, tensors and plain values"
        fix = f"export the network again with torch.export.save, {TRUST}"
        if refusal.fix is not None:
            raise ModelError(where, refusal.problem, fix=refusal.fix) from None
        raise ModelError(where, refusal.problem, got=refusal.got, expected=expected, fix=fix) from None
    except ModelError:
        raise
    except Exception as error:  # damaged zip, JSON or text: many types
        problem = f"the archive is damaged: {type(error).__name__}: {error}"
        raise ModelError(where, problem, fix="export the network again") from error


def _rewrite(data: bytes, where: str) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, PT2ArchiveWriter(buffer) as writer:
        check_archive(archive, len(data), where)
        members = archive.namelist()
        roots = {member.partition("/")[0] for member in members}
        if len(roots) != 1 or len(set(members)) != len(members):
            problem = "an archive that two readers would read differently"
            raise RefusedError(problem, "members beside or upon one another")
        for member in members:
            name = member.partition("/")[2]
            if _WRITTEN_ANEW.fullmatch(name):
                continue
            content = archive.read(member)
            if _RAW.fullmatch(name):
                # A raw tensor is bytes whatever they are, unless a config calls it a pickle, which clean refuses.
                writer.write_bytes(name, content)
            elif name in _PICKLES:
                writer.write_bytes(name, _repickled(content, f"{where}: {name}") if content else b"")
            elif name == _MODEL or name in _CONFIGS:
                cleaned = clean(json.loads(content))
                if name == _MODEL:
                    check_extent(cleaned)
                else:
                    _check_payloads(cleaned, {info.filename: info.file_size for info in archive.infolist()}, member)
                writer.write_string(name, json.dumps(cleaned))
            else:
                kind = next((kind for prefix, kind in _CODE.items() if name.startswith(prefix)), "an unknown member")
                raise RefusedError(f"the archive holds {kind}", name)
    buffer.seek(0)
    return buffer


def _check_payloads(config: Any, lengths: Mapping[str, int], member: str) -> None:
    """RefusedError unless each raw tensor has the bytes that its sizes ask for.

    torch makes up the values of a tensor without bytes, and some of its versions take what the memory happens to hold.
    """
    folder = member.rpartition("/")[0]
    for name, entry in config["config"].items():
        meta, path = entry["tensor_meta"], f"{folder}/{entry['path_name']}"
        sizes, strides = ([size["as_int"] for size in meta[key]] for key in ("sizes", "strides"))
        offset = meta["storage_offset"]["as_int"]
        if len(sizes) != len(strides) or min((*sizes, *strides, offset), default=0) < 0:
            raise RefusedError(f"the shape of {name} is none", f"sizes {sizes}, strides {strides}, offset {offset}")
        count = 0 if 0 in sizes else offset + 1 + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        wanted = count * _SERIALIZE_TO_TORCH_DTYPE[meta["dtype"]].itemsize
        got = lengths.get(path)
        if got is None or got < wanted:
            raise RefusedError(
                f"the values of {name} are missing", f"{got or 0:,} bytes where its shape takes {wanted:,}"
            )


def _repickled(content: bytes, where: str) -> bytes:
    """The pickled object in a pickle that we wrote: torch.export.load also reads pickles that weights_only refuses."""
    buffer = io.BytesIO()
    torch.save(unpickle(content, where, trust=False, modules=False), buffer)
    return buffer.getvalue()
