"""MNN as a backend."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from deploynorm.errors import BackendError, InputError, ModelError
from deploynorm.files import scratch_folder
from deploynorm.onnx_file import OnnxFile, OnnxSource, save
from deploynorm.run.base import Runner, check_feeds, closed_error
from deploynorm.run.converted import convert, standard_model

_CONVERT: Final = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); import _tools; _tools.mnnconvert(sys.argv[2:])"
)
"""The function behind MNN's program mnnconvert. The program reports to its makers, and installs packages to do so."""

_HIGH: Final = {"backend": "CPU", "precision": "high"}
"""Otherwise MNN takes a coarser type where the processor has one."""

_SMALL_TILES: Final = (3, 0)
"""MNN's hint WINOGRAD_MEMORY_LEVEL, and the smallest. By default, tiles of Winograd's algorithm are so large that MNN
3.6 is off by 8e-4 of the largest value after one 3x3 convolution; with this, by 8e-7."""


class MnnRunner(Runner):
    """Runs an ONNX model in MNN on the CPU, in float32: as MNN converts it, our nodes written in primitives first.

    Convolutions are computed in small tiles, slower and nearer than by default: see _SMALL_TILES.

    Args:
        model: A file, with its external data beside it, or a model in memory; see OnnxFile.read.
        threads: Threads of an inference; None is MNN's own default, 1.
    """

    name = "mnn (cpu)"

    def __init__(self, model: OnnxSource, *, threads: int | None = None) -> None:
        self._mnn = _import()
        file = OnnxFile.read(model)
        self._where, self.inputs, self.output_names = file.where, file.inputs, file.output_names
        standard = standard_model(file, "MNN")
        self._ranks = [None if value.shape is None else len(value.shape) for value in standard.graph.outputs]
        with scratch_folder() as folder:
            source, made = folder / "m.onnx", folder / "m.mnn"
            save(standard, source)
            program = [sys.executable, "-c", _CONVERT, json.dumps(sys.path), "mnnconvert"]
            words = ["-f", "ONNX", "--modelFile", str(source), "--MNNModel", str(made), "--bizCode", "none"]
            convert(self._where, "mnnconvert", [*program, *words], made)
            try:
                with _silent():
                    runtime = self._mnn.nn.create_runtime_manager((_HIGH | {"numThread": threads or 1},))
                    runtime.set_hint(*_SMALL_TILES)
                    self._net: Any = self._mnn.nn.load_module_from_file(
                        str(made),
                        [spec.name for spec in self.inputs],
                        list(self.output_names),
                        runtime_manager=runtime,
                    )
            except Exception as error:  # its binding has errors of several kinds
                raise ModelError(self._where, f"MNN does not load what it makes of the model: {error}") from error

    @classmethod
    def check_available(cls) -> None:
        _import()

    def infer(self, feeds: Mapping[str, npt.NDArray[Any]]) -> dict[str, npt.NDArray[Any]]:
        if self._net is None:
            raise closed_error("MnnRunner.infer")
        check_feeds("MnnRunner.infer", self.inputs, feeds)
        got = {name: array.shape for name, array in feeds.items()}
        if not all(array.size for array in feeds.values()):
            raise InputError("MnnRunner.infer", "MNN takes no empty inputs", got=got)
        expr = self._mnn.expr
        given = [
            expr.const(np.ascontiguousarray(feeds[spec.name]), list(got[spec.name]), expr.data_format.NCHW)
            for spec in self.inputs
        ]
        try:
            with _silent():
                # Copies: the memory of an output is that of the next call.
                outputs = [np.array(output.read()) for output in self._net.onForward(given)]
        except Exception as error:
            raise ModelError(self._where, f"MNN failed: {error}", got=got) from error
        named = dict(zip(self.output_names, outputs, strict=True))
        for (name, array), rank in zip(named.items(), self._ranks, strict=True):
            if rank not in (None, array.ndim):
                problem = f"MNN computes output {name!r} in another rank"
                raise ModelError(self._where, problem, got=array.shape, expected=rank)
        return named

    def close(self) -> None:
        self._net = None


def _import() -> Any:
    """The module MNN; BackendError where it cannot be imported."""
    try:
        with _silent():  # it says what the processor has
            import MNN
    except ImportError as error:
        fix = "pip install 'deploynorm[mnn]'"
        raise BackendError("MNN", f"the package cannot be imported: {error}", fix=fix) from error
    return MNN


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps what C++ prints out of the output, which others may parse."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
