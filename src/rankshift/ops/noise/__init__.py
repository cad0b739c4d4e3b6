"""Gaussian noise on a weight that is never formed whole: op.py runs, reference.py says what it means."""

from rankshift.ops.noise.op import noise_product

__all__ = ["noise_product"]
