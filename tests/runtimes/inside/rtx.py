"""TensorRT-RTX: builds an engine, which without a GPU nothing runs."""

from deploynorm import build


def run(job, samples, how):
    sizes = zip(*(x.shape for x in samples), strict=True)
    smallest, largest = zip(*((min(each), max(each)) for each in sizes), strict=True)
    shapes = {"min_shapes": {"": smallest}, "opt_shapes": {"": samples[0].shape}, "max_shapes": {"": largest}}
    build(job["model"], backend="tensorrt-rtx", compute_capabilities=["8.9"], frn="native", **shapes)
    return "builds"
