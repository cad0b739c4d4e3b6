"""Adam's step with a count for each vector, of many matrices at once: op.py runs, reference.py says what it means."""

from rankshift.ops.vector_adam.op import fits, step_

__all__ = ["fits", "step_"]
