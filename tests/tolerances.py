"""Every tolerance of the tests, each with its reason. No other file defines one."""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """|got - want| <= atol + rtol * |want|."""

    rtol: float
    atol: float
    reason: str

    def kwargs(self) -> dict[str, float]:
        """As the keyword arguments of torch.testing.assert_close and numpy.testing.assert_allclose."""
        return {"rtol": self.rtol, "atol": self.atol}


EXACT = Tolerance(0.0, 0.0, "the same operations on the same numbers")
FLOAT64 = Tolerance(1e-12, 1e-12, "float64 against float64, sums in another order")
OP_FLOAT32 = Tolerance(1e-4, 1e-5, "one operator in float32 against float64: ONNX Runtime's own bound")
OP_FLOAT16 = Tolerance(1e-3, 2.5e-3, "one operator, output rounded to float16, against float64")
OP_BFLOAT16 = Tolerance(1e-2, 2e-2, "one operator, output rounded to bfloat16, against float64")
ROUNDED_FLOAT16 = Tolerance(5e-4, 1e-5, "computed in float32, then one rounding to float16 (2^-11)")
ROUNDED_BFLOAT16 = Tolerance(4e-3, 1e-5, "computed in float32, then one rounding to bfloat16 (2^-8)")
PLANE_FLOAT32 = Tolerance(1e-6, 0.0, "y = x / sqrt(mean(x^2)): roundings of x, of the mean and its root, and of y")
PLANE_OF_ONE_VALUE_FLOAT32 = Tolerance(
    1e-5, 0.0, "as PLANE_FLOAT32; up to 512 equal squares in a partial sum round one way"
)
FUSED = Tolerance(
    2e-6, 0.0, "FRN in one node against loose operators, relative to the largest value: float32's rounding"
)
IMPORTED = Tolerance(
    1e-6, 0.0, "float64 layers against a formula, relative to the largest value: an epsilon rounded to float32"
)
FOLD_FLOAT32 = Tolerance(1e-5, 1e-5, "folded in float64 and cast back: only float32's own rounding differs")
LAYOUT_FLOAT32 = Tolerance(1e-5, 1e-5, "one float32 network in two memory layouts: its sums run in another order")
MABN_LOOP = Tolerance(1e-6, 1e-6, "a float64 layer against a literal float64 loop, over hundreds of dependent steps")

RSTD = {
    "float32": Tolerance(1e-6, 0.0, "some 10 roundings by 2^-24, and those of a sum of many squares"),
    "float64": Tolerance(4e-15, 0.0, "as float32, with roundings by 2^-53"),
}
"""Of a kernel's 1 / sqrt(mean(x^2) + eps), by the type of the parameters."""

GRADIENT_SUMMED = {
    "float32": Tolerance(
        1e-6, 1e-37, "relative to the terms' sizes: some 10 roundings by 2^-24, and those of a long sum"
    ),
    "float64": Tolerance(4e-15, 0.0, "as float32, with roundings by 2^-53"),
}
"""Of a kernel's gradients, by the type of the parameters."""

GRADIENT_OF_PLAIN_TORCH = {
    "float32": Tolerance(5e-5, 1e-30, "sums in float32, where the kernels use wider types"),
    "float64": Tolerance(2e-13, 1e-30, "as float32, with roundings by 2^-53"),
}
"""Of these gradients in plain PyTorch."""

GRADIENT_ROUNDED = {
    "float32": Tolerance(0.0, 0.0, "computed in this type"),
    "float64": Tolerance(0.0, 0.0, "computed in this type"),
    "float16": Tolerance(2.0**-11, 2.0**-25, "one rounding to float16, whose smallest number is 2^-24"),
    "bfloat16": Tolerance(2.0**-8, 2.0**-134, "one rounding to bfloat16"),
}
"""In addition, of dx, by its type."""
