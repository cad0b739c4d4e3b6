"""A gated MLP's product of two branches, with their low-rank terms: op.py runs, reference.py says what it means."""

from rankshift.ops.swiglu.op import swiglu, swiglu_back
from rankshift.ops.swiglu.reference import Back, Low

__all__ = ["Back", "Low", "swiglu", "swiglu_back"]
