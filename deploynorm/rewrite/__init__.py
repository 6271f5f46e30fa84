"""ONNX -> ONNX: passes over an exported graph, one a file, listed in `PASSES`.

rewritten = rewrite("model.onnx", ["optimize_for_cpu"])
print(rewritten)
rewritten.save("model.cpu.onnx")
"""

from deploynorm.rewrite.passes import PASSES, Pass, RewritePass, sequence
from deploynorm.rewrite.rewriting import Rewritten, rewrite

__all__ = ["PASSES", "Pass", "RewritePass", "Rewritten", "rewrite", "sequence"]
