"""MELoRA: y = W x + s·[B₁A₁x₁; …; BₙAₙxₙ], x = [x₁; …; xₙ]. Ren et al. 2024, ACL, arXiv 2402.17263.

n independent LoRAs of mini rank r, the i-th from the i-th slice of the input to the i-th slice of the output. ΔW is
block-diagonal, so its rank adds up to n·r while the parameters stay those of one LoRA of rank r. s = alpha/r with the
mini rank (an output sums r terms, whatever n is; so rsLoRA's s is alpha/√r). A starts uniform in ±1/√(in/n), as each
small LoRA would alone, B at zero. One block is LoRA bit for bit. Blocks follow the order of the features.

Where this differs from the published code: ΔW merges, unmerges and is exported (there both fail); sides that n does not
divide are refused (there features at the end are dropped and the sum fails); inputs have any number of axes (there
three); convolutions are served, in blocks of channels; the n products are one batched product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, RankTooLarge, UnsupportedLayer
from rankshift.core.form import ConvForm, EmbeddingForm
from rankshift.core.method import Method
from rankshift.core.random import Key, uniform
from rankshift.core.site import Spec
from rankshift.methods.lora_siblings import Sibling
from rankshift.ops.block_lora_linear import block_diagonal, block_lora_linear


class MELoRALayer(Sibling):
    """y = W x + s·diag(BᵢAᵢ) x. Factors are held without zeros, blocks one below the other: with n = 1 they are LoRA's.

    Linear layers run as one autograd node, ops/block_lora_linear. With dropout, or standing on another adapter,
    ordinary operations compose the layer; convolutions are grouped ones.
    """

    silent = frozenset("A")

    def __init__(self, base: Base, spec: Spec, rank: int, scale: float, config: MELoRA):
        super().__init__(base)
        self.scale, self.blocks, self.dropout = scale, config.blocks, config.dropout

        def new(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, dtype=spec.master, device=spec.device))

        self.A = new(self.blocks * rank, spec.into // self.blocks)  # A₁ over A₂ over …, each (r, in/n)
        self.B = new(spec.out, rank)  # B₁ over B₂ over …, each (out/n, r)

    @property
    def rank(self) -> int:
        """The mini rank: with the number of blocks, which the method holds, it determines every shape."""
        return self.B.shape[1]

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the only block."""
        return self.A, self.B

    @property
    def joins(self) -> bool:
        return self.blocks == 1  # then it is LoRA, with the same bits

    @property
    def fused(self) -> bool:
        base, dropped = self.base, self.dropout > 0 and self.training
        return base.storage and self.form.pointwise and not dropped and not base.weight.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        return self.add_branch(x)

    def product(self, x: Tensor) -> Tensor:
        return self.add_branch(x, bias=False)

    def add_branch(self, x: Tensor, bias: bool = True) -> Tensor:
        """W x + s·diag(BᵢAᵢ) x, with the base's bias or without."""
        base, form, n = self.base, self.form, self.blocks
        if self.fused:
            offset = base.bias if bias else None
            together = self.together(x, offset)
            if together is not None:
                return together
            return block_lora_linear(x, self.A, self.B, n, self.scale, offset, base.format, base.packed)
        p = self.dropout if self.training else 0.0
        y = base.linear(x) if bias else base.product(x)
        x = F.dropout(x, p) if p else x  # drawn over all features: every block has a mask of its own
        A, B = self.A.to(y.dtype), (self.scale * self.B).to(y.dtype)
        if isinstance(form, ConvForm):
            grouped = replace(form, groups=n)
            return y + grouped.expand(grouped.apply(x, A), B)
        if n == 1:  # as LoRA has it, for the same bits
            return y + form.expand(form.apply(x, A), B)
        i, r = A.shape[1], B.shape[1]
        z = torch.einsum("...ni,nri->...nr", x.reshape(*x.shape[:-1], n, i), A.reshape(n, r, i))
        return y + torch.einsum("...nr,nor->...no", z, B.reshape(n, -1, r)).flatten(-2)

    def delta(self, rows: slice = slice(None)) -> Tensor:
        n, (start, stop, _) = self.blocks, rows.indices(self.out_features)
        o, i = self.out_features // n, self.in_features // n
        parts = []
        for k, A in enumerate(self.A.chunk(n)):
            B = self.B[max(start, k * o) : min(stop, (k + 1) * o)]  # empty where the rows miss the block
            parts.append(F.pad(self.scale * B @ A, (k * i, (n - 1 - k) * i)))
        return torch.cat(parts)

    def branch(self) -> tuple[Tensor, Tensor] | None:
        return block_diagonal(self.scale * self.A, self.B, self.blocks)

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """Whole (A (n·r, in), B (out, n·r)) with their zeros, detached: ΔW = s·B A as a LoRA of rank n·r holds it."""
        return block_diagonal(shard.whole(self.A), shard.whole(self.B), self.blocks)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        A, B = self.whole_factors()
        return self.scale * A, B


@dataclass(frozen=True, kw_only=True)
class MELoRA(Method):
    """Small LoRAs beside each other, one for every slice of the features."""

    name: ClassVar[str] = "melora"
    paper: ClassVar[str] = "Ren et al. 2024, arXiv 2402.17263"
    summary: ClassVar[str] = "a block-diagonal update of rank n·r with the parameters of rank r"
    formula: ClassVar[str] = "r·(out + in)"
    default_lr: ClassVar[float] = 4e-4  # RoBERTa-base on GLUE in the authors' scripts; 3e-4 for Llama-2-7B

    rank: int = 8
    """r, the mini rank: that of each block. The authors' scripts use 8 (GLUE) and 1 (Llama-2-7B)."""
    blocks: int = 2
    """n, how many blocks; it must divide both sides of every adapted layer. ΔW has rank n·r. The authors' scripts use 2
    (GLUE) and 8 (Llama-2-7B); more blocks see less of the input each."""
    alpha: float = 16.0
    """Numerator of the scale s = alpha / rank, with the mini rank: the authors' 16."""
    scaling: Literal["standard", "rslora"] = "standard"
    """s = alpha / rank, or rank-stabilised alpha / √rank (Kalajdzievski 2023)."""
    dropout: float = 0.0
    """Probability of dropping an input of the branch while training; the authors use 0.05. No fused op then."""

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"MELoRA.rank = {self.rank} is below 1.")
        if self.blocks < 1:
            raise ConfigError(f"MELoRA.blocks = {self.blocks} is below 1. One block is LoRA.")
        if not 0 < self.alpha < math.inf:
            raise ConfigError(f"MELoRA.alpha = {self.alpha} is not a positive number.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"MELoRA.dropout = {self.dropout} is not in [0, 1).")

    def fit(self, spec: Spec) -> None:
        leaf = spec.name.rpartition(".")[2]
        if spec.form.stacked:
            raise UnsupportedLayer(
                f"{spec.name} is a stack of expert weights, reached only as W + ΔW: block-diagonal factors would have "
                "to be held there with their zeros, which is a LoRA of n times the size. Exclude it, or use LoRA."
            )
        if isinstance(spec.form, EmbeddingForm):
            raise UnsupportedLayer(
                f"{spec.name} is an Embedding: in blocks, each part of the vocabulary could change one slice of its "
                "vectors only, whatever the order of the words happens to be. Exclude it, or use LoRA."
            )
        channels = isinstance(spec.form, ConvForm)
        into = spec.form.channels if isinstance(spec.form, ConvForm) else spec.into
        if spec.out % self.blocks or into % self.blocks:
            sides = f"out = {spec.out} and in = {into}{' channels' if channels else ''}"
            other = _nearest_divisor(math.gcd(spec.out, into), self.blocks)
            way = f"Set blocks={other}, which does, or exclude" if other else "No number but 1 does. Exclude"
            raise UnsupportedLayer(
                f'blocks = {self.blocks} does not divide both sides of {spec.name}, {sides}. {way} "{leaf}".'
            )
        side = spec.max_rank // self.blocks
        if self.rank > side:
            raise RankTooLarge(
                f"mini rank {self.rank} at {spec.name} exceeds min(out, in) / blocks = {spec.max_rank} / {self.blocks} "
                f'= {side}. Lower rank or blocks, or exclude "{leaf}".'
            )

    def rank_at(self, name: str, found: Any = None) -> int:
        return self.rank

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        scale = self.alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)
        return MELoRALayer(base, spec, rank, scale, self)

    @torch.no_grad()
    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        assert isinstance(adapter, MELoRALayer)
        bound = 1 / math.sqrt(adapter.A.shape[1])
        adapter.A.copy_(uniform(key / "A", tuple(adapter.A.shape), -bound, bound, dtype=torch.float64))
        adapter.B.zero_()


def _nearest_divisor(number: int, wanted: int) -> int | None:
    """The divisor of ``number``, above 1, nearest to ``wanted``, of two the smaller; None if there is none."""
    return min((d for d in range(2, number + 1) if number % d == 0), key=lambda d: abs(d - wanted), default=None)
