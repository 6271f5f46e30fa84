"""ONNX -> ONNX: passes over an exported graph, one a file.

optimize_for_cpu: FRN and what surrounds it on the channel-blocked layout of ONNX Runtime's convolutions
"""

from __future__ import annotations

from deploynorm.rewrite.optimize_for_cpu import optimize_for_cpu
from deploynorm.rewrite.result import Change, RewriteResult

__all__ = ["Change", "RewriteResult", "optimize_for_cpu"]
