"""Writes the files of this version, which every later one must read: PYTHONPATH=tests python tests/versions/write.py

Run it once for each release. The folder of a version is never written again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from version_nets import net

import deploynorm
from deploynorm.image import ImageSpec
from deploynorm.rewrite import rewrite


def main() -> None:
    folder = Path(__file__).parent / deploynorm.__version__
    folder.mkdir()
    torch.manual_seed(0)
    network = net()
    for name, tensor in network.named_parameters():
        if name.rpartition(".")[2] in ("weight", "bias", "tau") and tensor.ndim == 1:
            torch.nn.init.normal_(tensor, 0.5, 0.25)
    for _ in range(3):
        network(torch.randn(4, 3, 6, 6))  # MABN's statistics and history
    image, labels = ImageSpec((3, 8, 8), (0.5, 0.4, 0.3), (0.25, 0.2, 0.3)), ("cat", "dog", "eel")
    training = {"accuracy": 0.5, "epochs": 3, "command": "none"}
    about = {"image": image, "labels": labels, "training": training}
    checkpoint = folder / "net.pt"
    deploynorm.save(checkpoint, factory="version_nets:net", kwargs={"classes": 3}, model=network, **about)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        y = network.double().eval()(x.double())
    np.savez(folder / "expected.npz", x=x.numpy(), y=y.numpy())
    for name, options in {
        "net.onnx": {},
        "weights_beside.onnx": {},
        "half.onnx": {"dtype": torch.float16},
        "bfloat16.onnx": {"dtype": torch.bfloat16},
    }.items():
        converted = deploynorm.convert(checkpoint, factory="version_nets:net", **options)
        for node in converted.exported.model.graph.all_nodes():
            node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)  # paths of the machine that writes
        converted.save(folder / name, external_data=name.startswith("weights") or None)
    rewrite(folder / "net.onnx").save(folder / "net.cpu.onnx")


if __name__ == "__main__":
    main()
