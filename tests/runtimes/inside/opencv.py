"""OpenCV's dnn module, with the engine that it chooses."""

import cv2


def run(job, samples, how):
    net = cv2.dnn.readNetFromONNX(job["model"])
    got = []
    for x in samples:
        net.setInput(x)
        got.append(net.forward().copy())
    return got
