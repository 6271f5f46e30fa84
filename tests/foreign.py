"""The CPU kernels of a library for another processor, under an emulator: tests/plugins/foreign_kernels.cpp, started.

kernel = ForeignKernel("qemu-aarch64 -L /usr/aarch64-linux-gnu build/foreign_kernels")

It is called as kernels.Kernel is. Around a tensor its guard bytes travel too, there and back.
"""

from __future__ import annotations

import ctypes
import shlex
import struct
import subprocess
from collections.abc import Iterator

from kernels import GUARD, Kernel, ParallelFor

from deploynorm.libraries.kernels import TYPES, Backward, Forward

_FORWARD, _BACKWARD, _WORKSPACE = range(3)
_ITEM_SIZES = {TYPES["float32"]: 4, TYPES["float64"]: 8, TYPES["float16"]: 2, TYPES["bfloat16"]: 2}
_LARGE = ("x", "y", "residual", "dy", "dx")


class ForeignKernel(Kernel):
    """Kernels that another processor runs."""

    def __init__(self, command: str) -> None:
        self._process = subprocess.Popen(shlex.split(command), stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._in, self._out = self._process.stdin, self._process.stdout
        self.variants = self._out.readline().decode().split()
        assert self.variants, f"{command} does not run here"

    def close(self) -> None:
        self._in.close()
        assert self._process.wait(60) == 0
        self._out.close()

    def call(
        self,
        call: Forward | Backward,
        workspace: int | None = None,
        *,
        variant: str | None = None,
        parallel_for: ParallelFor | None = None,
    ) -> int:
        assert parallel_for is None, "there are no threads"
        fields = dict(_fields(call))
        if workspace is not None:
            fields["workspace"] = (workspace, self.workspace_bytes(call) if isinstance(call, Backward) else 0)
        buffers = dict(sorted((pointer, size) for pointer, size in fields.values() if pointer))
        places = {pointer: index for index, pointer in enumerate(buffers)}
        pointers = [fields[name][0] if name in fields else None for name in (*_pointers(call), "workspace")]
        self._request(
            call,
            _FORWARD if isinstance(call, Forward) else _BACKWARD,
            [(places[pointer], GUARD) if pointer else (-1, 0) for pointer in pointers],
            buffers,
            variant,
        )
        (code,) = struct.unpack("<i", self._read(4))
        for pointer, size in buffers.items():
            ctypes.memmove(pointer - GUARD, self._read(size + 2 * GUARD), size + 2 * GUARD)
        return int(code)

    def workspace_bytes(self, call: Backward) -> int:
        self._request(call, _WORKSPACE, [(-1, 0)] * (len(_pointers(call)) + 1), {}, None)
        return int(struct.unpack("<q", self._read(8))[0])

    def _request(
        self,
        call: Forward | Backward,
        what: int,
        fields: list[tuple[int, int]],
        buffers: dict[int, int],
        variant: str | None,
    ) -> None:
        sizes = (call.samples, call.channels, call.spatial, call.channel_block)
        parts = [struct.pack("<4q4i16s", *sizes, what, call.type, len(fields), len(buffers), (variant or "").encode())]
        parts += [struct.pack("<2q", *field) for field in fields]
        for pointer, size in buffers.items():
            parts.append(struct.pack("<2q", size + 2 * GUARD, (pointer - GUARD) % 64))
            parts.append(ctypes.string_at(pointer - GUARD, size + 2 * GUARD))
        self._in.write(b"".join(parts))
        self._in.flush()

    def _read(self, count: int) -> bytes:
        got = self._out.read(count)
        assert len(got) == count, f"the program ended with exit code {self._process.wait()}"
        return got


def _pointers(call: Forward | Backward) -> list[str]:
    return [name for name, kind, *_ in call._fields_ if kind is ctypes.c_void_p]


def _fields(call: Forward | Backward) -> Iterator[tuple[str, tuple[int, int]]]:
    """Address and bytes of each tensor."""
    wide = 8 if call.type == TYPES["float64"] else 4
    for name in _pointers(call):
        if (pointer := getattr(call, name)) is not None:
            if name in _LARGE:
                size = call.samples * call.channels * call.spatial * _ITEM_SIZES[call.type]
            else:
                size = (call.samples if name == "rstd" else 1) * call.channels * wide
            yield name, (pointer, size)
