"""How an (out, in) matrix acts on the input of a layer.

Every layer a method can adapt is linear in its weight, so one equation, ``y = W x + B (A x)``, serves them all once two
questions are answered: how does a (k, in) matrix act on the layer's input (``apply``), and how does an (out, k) matrix
act on what came out (``expand``). Methods are written against these two and know no layer kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Form:
    """The linear layer, ``x (…, in) → (…, out)``; other kinds override what differs."""

    pointwise: ClassVar[bool] = True  # apply(x, M) is x @ M.T on the last axis: one fused op serves it
    stacked: ClassVar[bool] = False  # the weight is a stack of matrices (experts), reached only as a tensor

    @property
    def taps(self) -> int:
        """Columns of the matrix that belong to one channel of the input."""
        return 1

    def narrow(self, channels: int) -> Form:
        """The same kind of layer on so many channels of input."""
        return self

    def pick(self, x: Tensor, channels: Tensor) -> Tensor:
        """Some channels of the input, as a new tensor that does not keep the others alive."""
        return x.index_select(-1, channels)

    def matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as an (out, in) view."""
        return weight

    def stored(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix` for a tensor of the stored weight's shape."""
        return matrix

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer with ``matrix`` (k, in) in place of its weight: k output channels."""
        return F.linear(x, matrix, bias)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer with its weight as stored: the same arithmetic, to the bit."""
        return self.apply(x, self.matrix(weight), bias)

    def columns(self, x: Tensor) -> Tensor:
        """The vectors that the weight multiplies in ``x``, (…, in): ``apply(x, M)`` holds ``columns(x) @ M.T``."""
        return x

    def places(self, y: Tensor) -> Tensor:
        """The vectors that came out, (…, out), in the order of :meth:`columns`."""
        return y

    def expand(self, z: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        """``matrix`` (out, k) on the k channels of ``z``, place by place."""
        return F.linear(z, matrix, bias)

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        """``y`` with each channel times its entry of ``vector``, (out,)."""
        return y * vector

    def shift(self, y: Tensor, vector: Tensor) -> Tensor:
        """``y`` with its entry of ``vector``, (out,), added to each channel."""
        return y + vector


@dataclass(frozen=True)
class TransposedForm(Form):
    """transformers' ``Conv1D`` (GPT-2): a linear layer that stores its weight as (in, out)."""

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.t()


@dataclass(frozen=True)
class ConvForm(Form):
    """``nn.Conv1d/2d/3d`` without groups: W as (out, in·∏kernel); A keeps the geometry, B is a 1×1 convolution."""

    pointwise: ClassVar[bool] = False
    channels: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str = "zeros"
    padding_pairs: tuple[int, ...] = ()
    groups: int = 1  # for matrices that are block-diagonal, held without zeros: blocks one below the other, (k, in/n)

    @property
    def taps(self) -> int:
        return math.prod(self.kernel)

    def narrow(self, channels: int) -> ConvForm:
        return replace(self, channels=channels)

    def pick(self, x: Tensor, channels: Tensor) -> Tensor:
        return x.index_select(x.dim() - len(self.kernel) - 1, channels)

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.flatten(1)

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(matrix.shape[0], self.channels // self.groups, *self.kernel)

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.run(x, self.stored(matrix), bias)

    def run(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # channels_last stays that
        conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        padding: tuple[int, ...] | str = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, self.padding_pairs, mode=self.padding_mode)
            padding = (0,) * len(self.kernel)
        return conv(x, weight, bias, self.stride, padding, self.dilation, self.groups)

    def columns(self, x: Tensor) -> Tensor:
        """The patches under the kernel, (batch, *places, in·∏kernel)."""
        dims = len(self.kernel)
        if x.dim() == dims + 1:
            x = x[None]
        x = F.pad(x, self.padding_pairs, mode="constant" if self.padding_mode == "zeros" else self.padding_mode)
        for axis, (k, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            x = x.unfold(axis, dilation * (k - 1) + 1, stride)[..., ::dilation]
        return x.movedim(1, 1 + dims).flatten(1 + dims)  # (batch, *places, channels, *kernel) → …

    def places(self, y: Tensor) -> Tensor:
        return y.movedim(y.dim() - len(self.kernel) - 1, -1)

    def _channelwise(self, y: Tensor, vector: Tensor) -> Tensor:
        return vector.reshape(-1, *(1,) * len(self.kernel))

    def expand(self, z: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        conv: Callable[..., Tensor] = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        return conv(z, matrix.reshape(*matrix.shape, *(1,) * len(self.kernel)), bias, groups=self.groups)

    def scale(self, y: Tensor, vector: Tensor) -> Tensor:
        return y * self._channelwise(y, vector)

    def shift(self, y: Tensor, vector: Tensor) -> Tensor:
        return y + self._channelwise(y, vector)


@dataclass(frozen=True)
class EmbeddingForm(Form):
    """``nn.Embedding``: W is the (dim, vocab) transpose of the table, the input a one-hot column named by its index."""

    pointwise: ClassVar[bool] = False
    padding_idx: int | None = None
    scale_grad_by_freq: bool = False

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.t()

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.embedding(x, matrix.t(), self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq)


@dataclass(frozen=True)
class ExpertsForm(Form):
    """Fused experts of transformers 5: a stack (experts, out, in), one matrix an expert; some store (experts, in, out).

    The module multiplies slices of the stack by itself, so methods reach it only as a tensor, W + ΔW: a site of this
    form calls ``delta`` and never ``forward``.
    """

    pointwise: ClassVar[bool] = False
    stacked: ClassVar[bool] = True
    experts: int
    transposed: bool = False

    def matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def stored(self, matrix: Tensor) -> Tensor:
        return matrix.mT if self.transposed else matrix

    def apply(self, x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        return torch.einsum("e...i,eki->e...k", x, matrix)

    def expand(self, z: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
        assert bias is None, "a stack has none"
        return torch.einsum("e...k,eok->e...o", z, matrix)
