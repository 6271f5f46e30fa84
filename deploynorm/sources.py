"""Other projects' FRN and MABN layers as their checkpoints hold them: names, shapes, and what becomes an epsilon.

A row of SOURCES is all that there is of a project. Shapes of the parameters of C channels are written "C" for (C,),
"1C11" for (1, C), (1, C, 1), (1, C, 1, 1) or (1, C, 1, 1, 1), and "111C" for (1, 1, 1, C), channels last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

OURS: Final = "deploynorm"
OF_THE_AUTHORS: Final = ("iters", "buffer_x2", "buffer_gz", "sta_matrix", "pre_x2", "pre_gz")
"""Buffers of megvii-model/MABN@995e8f5 beside running_var: histories, in forms that depend on the batch size."""


@dataclass(frozen=True)
class Epsilon:
    """The epsilon that a project adds to the mean square: floor + |what the file stores|.

    Attributes:
        absent: Takes the place of what a file stores that stores none; None where every file stores one.
        name: Its key; "" where no file stores any.
        floor: Added to it.
        per_channel: Whether it is stored in the shape of the other parameters, else as a single number.
    """

    absent: float | None
    name: str = ""
    floor: float = 0.0
    per_channel: bool = False


@dataclass(frozen=True)
class Source:
    """How one project stores its layers.

    Attributes:
        project: Whose layers they are.
        names: Their parameters by our names: weight, bias, perhaps tau, of MABN running_var.
        shape: Of these parameters: "C", "1C11" or "111C".
        eps: Their epsilon.
        optional: Of our names, those whose parameters a layer may lack.
        tlu: Whether the threshold is a layer of its own, with one parameter, tau.
        training: Buffers that only training needs.
        telling: Keys without which the layer is too much like others' to be taken for this one, unless it is named.
        channels_last: Whether kernels of convolutions are (H, W, in, out), under names with slashes.
        rank: Of the layer's input, where the shapes do not tell it: 4 is (N, C, H, W).
        note: What to know of them besides.
    """

    project: str
    names: Mapping[str, str]
    shape: str
    eps: Epsilon
    optional: tuple[str, ...] = ()
    tlu: bool = False
    training: tuple[str, ...] = ()
    telling: tuple[str, ...] = ()
    channels_last: bool = False
    rank: int = 4
    note: str = ""

    @property
    def is_mabn(self) -> bool:
        return "running_var" in self.names


_GREEK: Final = {"weight": "gamma", "bias": "beta"}
_PLAIN: Final = {"weight": "weight", "bias": "bias"}
_GREEK_TAU: Final = {**_GREEK, "tau": "tau"}
_PLAIN_TAU: Final = {**_PLAIN, "tau": "tau"}
_MABN: Final = {**_PLAIN, "running_var": "running_var"}

SOURCES: Final[Mapping[str, Source]] = {
    "mabn": Source(
        "megvii-model/MABN, cls and det",
        _MABN,
        "C",
        Epsilon(1e-5),
        training=OF_THE_AUTHORS,
        note="its convolutions are centred: CenConv2d; its momentum, 0.98, is 0.02 of ours, the default",
    ),
    "unified-normalization": Source(
        "hikvision-research/Unified-Normalization",
        _MABN,
        "C",
        Epsilon(1e-5),
        training=(*OF_THE_AUTHORS, "ema_gz", "skip_counter"),
        telling=("ema_gz",),
        rank=3,
        note="its inputs are (N, L, C), those of MABN1d (N, C, L); its momentum, 0.9, is 0.1 of ours",
    ),
    "gupta-abhay": Source("gupta-abhay/pytorch-frn", _GREEK_TAU, "1C11", Epsilon(None, "eps", per_channel=True)),
    "tattaka": Source(
        "tattaka/Filter-Response-Normalization-PyTorch",
        _GREEK_TAU,
        "1C11",
        Epsilon(1e-6, "eps", floor=1e-6, per_channel=True),
        optional=("tau",),
        telling=("eps",),
    ),
    "knjcode": Source("knjcode/filter-response-normalization-layer-pytorch", _GREEK_TAU, "1C11", Epsilon(None, "eps")),
    "mindspore": Source("mindspore-ai/models, resnetv2_50_frn", _GREEK_TAU, "1C11", Epsilon(None, "eps")),
    "torch-uncertainty": Source("ENSTA-U2IS-AI/torch-uncertainty", _GREEK_TAU, "1C11", Epsilon(1e-6)),
    "yukkyo": Source("yukkyo/PyTorch-FilterResponseNormalizationLayer", _PLAIN, "1C11", Epsilon(1e-6, "eps"), tlu=True),
    "kornia": Source("kornia, HyNet", _PLAIN, "1C11", Epsilon(None, "eps"), tlu=True),
    "mx-font": Source("clovaai/mxfont", _PLAIN, "1C11", Epsilon(None, "eps"), tlu=True),
    "fast-reid": Source("JDAI-CV/fast-reid", _PLAIN, "C", Epsilon(None, "eps"), tlu=True),
    "timm": Source("timm", _PLAIN_TAU, "C", Epsilon(1e-5), optional=("tau",), telling=("tau",)),
    OURS: Source(
        "deploynorm itself",
        _PLAIN_TAU,
        "C",
        Epsilon(1e-6, "eps", per_channel=True),
        optional=("tau",),
        telling=("tau",),
    ),
    "tensorflow-addons": Source(
        "tensorflow/addons", _GREEK, "111C", Epsilon(0.0, "learned_epsilon", floor=1e-6), tlu=True, channels_last=True
    ),
    "tensorflow-listing": Source(
        "the listing of arXiv:1911.09737", _GREEK_TAU, "111C", Epsilon(1e-6, "eps"), channels_last=True
    ),
    "deepfacelab": Source("iperov/DeepFaceLab, leras", _PLAIN, "C", Epsilon(None, "eps"), tlu=True, channels_last=True),
}
"""By the name that --from takes."""
