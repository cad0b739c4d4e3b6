"""The noise of a weight as a matrix, and its product as a layer takes it. Tests hold the op to this."""

from __future__ import annotations

import torch
from torch import Tensor

from rankshift.core.form import Form
from rankshift.ops.noise.op import draw


def noise(v: Tensor, width: int, word: Tensor) -> Tensor:
    """ε (out, width), ε_ij = v_i z_ij with z standard normal, the draws of the key ``word``."""
    return torch.cat([epsilon for _, epsilon in draw(v, width, word)])


def noise_product(x: Tensor, v: Tensor, word: Tensor, form: Form, width: int) -> Tensor:
    """What the layer makes of ``x`` with ε in place of its weight, no bias; differentiable in x."""
    return form.apply(x, noise(v, width, word).to(x.dtype))
