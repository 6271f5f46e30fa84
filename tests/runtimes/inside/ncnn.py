"""ncnn, converted by pnnx. A blob has no batch, so the images of a batch run one after the other."""

import importlib.util
import subprocess
import tempfile
from pathlib import Path

import ncnn
import numpy as np

# Importing pnnx would import torch, of which its program has no need.
PNNX = Path(importlib.util.find_spec("pnnx").submodule_search_locations[0]) / "pnnx"


def run(job, samples, how):
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "m.onnx"  # pnnx writes its files beside the model
        model.write_bytes(Path(job["model"]).read_bytes())
        shapes = [f"[{','.join(map(str, (1, *x.shape[1:])))}]f32" for x in samples]
        words = [str(PNNX), model.name, f"inputshape={shapes[0]}", "fp16=0"]
        words += [f"inputshape2={shapes[1]}"] if len(shapes) > 1 else []
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
        if done.returncode != 0:
            lines = (done.stdout + done.stderr).strip().splitlines()
            raise RuntimeError(f"pnnx ended with {done.returncode}: {lines[-1] if lines else 'it says nothing'}")
        net = ncnn.Net()
        net.opt.use_vulkan_compute = False
        for name in ("packed", "storage", "arithmetic"):
            setattr(net.opt, f"use_fp16_{name}", False)
        net.opt.num_threads = 1
        if net.load_param(str(model.with_name("m.ncnn.param"))) != 0:
            raise RuntimeError("load_param refuses what pnnx wrote")
        if net.load_model(str(model.with_name("m.ncnn.bin"))) != 0:
            raise RuntimeError("load_model refuses what pnnx wrote")
        return [np.stack([_one(net, image) for image in x]) for x in samples]


def _one(net, image):
    with net.create_extractor() as extractor:
        extractor.input("in0", ncnn.Mat(np.ascontiguousarray(image)).clone())
        code, out = extractor.extract("out0")
        if code != 0:
            raise RuntimeError(f"extract ended with {code}")
        return np.array(out)
