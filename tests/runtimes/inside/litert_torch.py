"""LiteRT, converted by litert-torch: it takes the network, not a file."""

import litert_torch
import torch
from exported import network


def run(job, samples, how):
    tensors = [torch.from_numpy(x) for x in samples]
    converted = litert_torch.convert(network(job["net"]), (tensors[0],))
    return [converted(x) for x in tensors]
