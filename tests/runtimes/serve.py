"""Runs in a runtime's own Python, which has the runtime and NumPy: `serve.py ADAPTER HOW JOBS RESULTS`.

An adapter is a file of inside/. Its `run(job, samples, how)` opens job["model"], runs the samples in one session, and
returns an output for each, with or without a note; or text, where it can only build. RESULTS gets a line of JSON as a
job begins and one as it ends, so that the other side knows which one ended the process.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import traceback
from pathlib import Path
from types import ModuleType

import numpy as np


def load(path: Path) -> ModuleType:
    """Under another name than its own, which may be that of the runtime."""
    spec = importlib.util.spec_from_file_location(f"adapter_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main(adapter: str, how: str, jobs: str, results: str) -> None:
    path = Path(results)
    with path.open("a", encoding="utf-8") as lines:

        def say(**line: object) -> None:
            print(json.dumps(line), file=lines, flush=True)

        run = load(Path(adapter)).run
        for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
            say(begins=job["name"])
            samples = [np.fromfile(x["path"], np.float32).reshape(x["shape"]) for x in job["samples"]]
            try:
                got = run(job, samples, how)
            except Exception as error:
                text = f"{type(error).__name__}: {error}"
                say(name=job["name"], refused=text, traceback=traceback.format_exc())
                continue
            if isinstance(got, str):
                say(name=job["name"], text=got)
                continue
            got, note = got if isinstance(got, tuple) else (got, None)
            outputs = []
            for index, y in enumerate(got):
                file = path.with_name(f"{job['name']}.y{index}.bin")
                y = np.ascontiguousarray(y, np.float32)
                file.write_bytes(y.tobytes())
                outputs.append({"path": str(file), "shape": list(y.shape)})
            say(name=job["name"], outputs=outputs, **({"note": note} if note else {}))


if __name__ == "__main__":
    main(*sys.argv[1:])
