"""The cross entropy of a linear layer's outputs, never all there at once: op.py runs, reference.py is the meaning."""

from rankshift.ops.linear_cross_entropy.op import linear_cross_entropy

__all__ = ["linear_cross_entropy"]
