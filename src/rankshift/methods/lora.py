"""LoRA: y = W x + s·B(A x), W frozen. Hu et al. 2021, arXiv 2106.09685.

A is (r, in), B is (out, r), s = alpha/r. B starts at zero, so the function is that of the base and A stands still for
one step. Variants that keep this equation are fields: rank-stabilised scaling (s = alpha/√r, Kalajdzievski 2023, arXiv
2312.03732), starting points (see lora_init.py), LoRA+ (B learns faster, Hayou et al. 2024, arXiv 2402.12354), LoRA-FA
(A frozen, Zhang et al. 2023, arXiv 2308.03303) and DoRA, which adds a trained row norm:

    DoRA   y = μ ⊙ (W x + s·B(A x)) / ‖W + s·BA‖_row + bias     Liu et al. 2024, arXiv 2402.09353; the norm is detached
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter, LowRank
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, RankTooLarge, UnsupportedLayer
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import EmbeddingForm
from rankshift.core.method import Method
from rankshift.core.random import Key
from rankshift.core.site import Spec, by_pattern
from rankshift.methods import lora_eva, lora_init
from rankshift.methods.lora_siblings import Sibling
from rankshift.ops.lora_linear import lora_linear
from rankshift.ops.lora_linear.order import SAVES_Z, Backward, Forward, choose


class LoRALayer(Sibling):
    """y = W x + s·B(A x).

    ``form.apply`` takes the product with A as the layer takes its own (a convolution, a look-up), ``form.expand`` the
    one with B at every place. Linear layers, the bulk, run the same equation as one autograd node, ops/lora_linear, or
    share nodes with those that read the same input, see lora_siblings.py.
    With dropout, or standing on another adapter, ordinary operations compose it, and autograd keeps what those keep:
    the dropped input and its mask where there is dropout, else x by reference; A x; and the factors as multiplied.
    """

    slots: ClassVar[dict[str, int]] = {"A": 0, "B": 1}

    def __init__(self, base: Base, spec: Spec, rank: int, scale: float, config: LoRA):
        super().__init__(base)
        self.scale, self.config = scale, config
        stack = (spec.form.experts,) if spec.form.stacked else ()  # type: ignore[attr-defined]

        def new(*shape: int, train: bool = True) -> nn.Parameter:
            return nn.Parameter(torch.empty(*stack, *shape, dtype=spec.master, device=spec.device), train)

        self.A = new(rank, spec.into, train="A" in config.train)
        self.B = new(spec.out, rank, train="B" in config.train)
        anchored = config.init in ("pissa", "olora")
        self.A0 = new(rank, spec.into, train=False) if anchored else None
        self.B0 = new(spec.out, rank, train=False) if anchored else None
        self.b = new(spec.out) if config.lora_bias else None  # bias of B
        if isinstance(spec.form, EmbeddingForm):
            self.silent = frozenset("B")  # it is A that starts at zero there
        elif not anchored and config.init != "orthogonal":
            self.silent = frozenset("A")

    @property
    def rank(self) -> int:
        return self.A.shape[-2]

    def factors(self) -> tuple[Tensor, Tensor]:
        """(A, B) with ΔW = s·B A: the trained pair, and where there is an anchor its negative beside it."""
        if self.A0 is None or self.B0 is None:
            return self.A, self.B
        return torch.cat([self.A, self.A0], -2), torch.cat([self.B, -self.B0], -1)

    @property
    def joins(self) -> bool:
        return type(self).forward is LoRALayer.forward and not self.config.fixed

    @property
    def fused(self) -> bool:
        base, dropped = self.base, self.config.dropout > 0 and self.training
        return base.storage and self.form.pointwise and not dropped and not base.weight.requires_grad

    def forward(self, x: Tensor) -> Tensor:
        y = self.add_branch(x)
        return y if self.b is None else self.form.shift(y, (self.scale * self.b).to(y.dtype))

    def product(self, x: Tensor) -> Tensor:
        return self.add_branch(x, bias=False)

    def add_branch(self, x: Tensor, bias: bool = True) -> Tensor:
        """W x + s·B(A x), with the base's bias or without."""
        base, form, config = self.base, self.form, self.config
        if self.fused:
            offset = base.bias if bias else None
            together = self.together(x, offset)
            if together is not None:
                return together
            A, B = self.factors()
            return lora_linear(
                x, A, B, self.scale, offset, base.format, base.packed, config.forward_order, config.backward_order
            )
        A, B = self.factors()
        p = config.dropout if self.training and not isinstance(form, EmbeddingForm) else 0.0
        y = base.linear(x) if bias else base.product(x)
        z = form.apply(F.dropout(x, p) if p else x, A.to(y.dtype))
        return y + form.expand(z, (self.scale * B).to(y.dtype))

    def orders(
        self, tokens: int, dtype: torch.dtype | None = None, input_grad: bool = True
    ) -> tuple[Forward, Backward]:
        """The orders of multiplication that a forward of this many tokens runs, where one fused op serves the layer."""
        A, B = (factor.requires_grad for factor in (self.A, self.B))
        rank = self.factors()[0].shape[-2]
        return choose(
            tokens, self.in_features, self.out_features, rank, dtype or self.base.dtype, input_grad, A, B,
            self.config.forward_order, self.config.backward_order, self.base.format.adds,
        )  # fmt: skip

    def delta(self, rows: slice = slice(None)) -> Tensor:
        A, B = self.factors()
        return self.scale * B[..., rows, :] @ A

    def delta_bias(self) -> Tensor | None:
        return None if self.b is None else self.scale * self.b

    def term(self) -> LowRank | None:
        if self.b is not None or (self.config.dropout and self.training):
            return None
        return LowRank(*self.factors(), self.scale)

    def branch(self) -> tuple[Tensor, Tensor] | None:
        A, B = self.factors()
        return self.scale * A, B

    def whole_factors(self) -> tuple[Tensor, Tensor]:
        """:meth:`factors`, whole and detached. Under sharding every rank must call this."""
        A, B = self.factors()
        return shard.whole(A), shard.whole(B)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        A, B = self.whole_factors()
        return self.scale * A, B


class DoRALayer(LoRALayer):
    """y = μ ⊙ (W x + s·B(A x)) / ‖W + s·BA‖_row + bias. A row of zeros has nothing to rescale and stays."""

    def __init__(self, base: Base, spec: Spec, rank: int, scale: float, config: LoRA):
        super().__init__(base, spec, rank, scale, config)
        self.magnitude = nn.Parameter(torch.empty(spec.out, dtype=spec.master, device=spec.device))  # (out,)
        self.empty: bool | None = None  # whether a row of the weight is zero; None until somebody asks

    def row_norm(self) -> Tensor:
        """‖W + s·BA‖ of each row, (out,), detached."""
        A, B = self.factors()
        W = self.base.dense() if self.base.storage else self.base.rows()
        return row_norm(W, self.scale * A, B)

    @torch.no_grad()
    def rebased(self) -> None:
        norm = torch.linalg.vector_norm(self.base.rows(), dim=1, dtype=self.B.dtype)
        self.magnitude.copy_(norm)
        self.empty = bool((norm == 0).any())

    def forward(self, x: Tensor) -> Tensor:
        y, bias = self.product(x), self.base.total_bias
        return y if bias is None else self.form.shift(y, bias.to(y.dtype))

    def product(self, x: Tensor) -> Tensor:
        y = self.add_branch(x, bias=False)
        return self.form.scale(y, _gain(self.magnitude, self.row_norm()).to(y.dtype))

    def delta(self, rows: slice = slice(None)) -> Tensor:
        W = self.base.rows(rows).to(self.B.dtype)
        V = W + super().delta(rows)
        norm: Tensor = torch.linalg.vector_norm(V, dim=1).detach()
        return _gain(self.magnitude[rows], norm)[:, None] * V - W

    def term(self) -> LowRank | None:
        low = super().term()  # whose user finds no gradient of a magnitude that is 0
        if low is not None and self.empty is None:  # loaded, not made
            with torch.no_grad():
                self.empty = bool((self.base.rows() == 0).all(1).any())
        return None if low is None or self.empty else low._replace(magnitude=self.magnitude)

    def branch(self) -> None:
        return None

    def low_rank(self) -> None:
        return None


@torch.no_grad()
def row_norm(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """‖W + BA‖ of each row, (out,), detached, without forming BA: ‖w + b A‖² = ‖w‖² + 2⟨w Aᵀ, b⟩ + b AAᵀ bᵀ."""
    square: Tensor = torch.linalg.vector_norm(W, dim=1, dtype=B.dtype).square()
    cross = (W @ A.to(W.dtype).t()).to(B.dtype)  # (out, r)
    return (square + ((2 * cross + B @ (A @ A.t())) * B).sum(1)).clamp_min_(0).sqrt()


def _gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """μ / ‖V‖, (out,); 1 where the detached norm is 0, so that B can move there and no gradient is 0/0."""
    zero = norm == 0
    return magnitude / norm.masked_fill(zero, torch.inf) + zero


@dataclass(frozen=True)
class Precondition:
    """LoRA-FA's gradient: g_B ← s⁻² g_B (A Aᵀ)⁻¹, so that the step on B A is the projected step on W."""

    moment: ClassVar[Moment] = Moment.GRADS

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, LoRALayer)
        if adapter.B.grad is None:
            return
        A = shard.whole(adapter.A).to(torch.float64)
        gram = adapter.scale**2 * (A @ A.mT)
        gradient, held = shard.local(adapter.B.grad)
        ridge = 1e-8 * gram.diagonal(dim1=-2, dim2=-1).mean() * torch.eye(gram.shape[-1], device=gram.device)
        if gram.dim() == 3:  # sharded along the experts: each has a gram of its own
            gram = gram[held]
        gradient.copy_(torch.linalg.solve(gram + ridge, gradient.to(torch.float64), left=False))


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """A low-rank update beside every frozen weight."""

    name: ClassVar[str] = "lora"
    paper: ClassVar[str] = "Hu et al. 2021, arXiv 2106.09685"
    summary: ClassVar[str] = "a trained low-rank update beside each frozen weight"
    formula: ClassVar[str] = "r·(out + in)"

    rank: int = 16
    """r, columns of B and rows of A. The paper uses 1 to 64; 16 on all linear layers is today's habit."""
    alpha: float = 32.0
    """Numerator of the scale s = alpha / rank. Usually 1 to 2 times rank."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks for layers matched by name, e.g. {"q_proj": 8}; the last match counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas for layers matched by name; the last match counts."""
    scaling: Literal["standard", "rslora"] = "standard"
    """s = alpha / rank, or rank-stabilised alpha / √rank (Kalajdzievski 2023)."""
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "eva"] = "kaiming"
    """Where A and B start; see methods/lora_init.py. "eva" needs data= at attach."""
    train: Literal["AB", "A", "B"] = "AB"
    """Which factors train. "B" is LoRA-FA: A is frozen and the layer's input is not kept for backward."""
    precondition: bool = False
    """With train="B": LoRA-FA's corrected gradient s⁻² g (A Aᵀ)⁻¹ before the optimizer."""
    dora: bool = False
    """Weight decomposition (DoRA): train the row norm of W + sBA too."""
    lr_ratio: float = 1.0
    """LoRA+: the learning rate of B is this many times lr. Its paper recommends about 16 with a smaller lr."""
    dropout: float = 0.0
    """Probability of dropping an input of the branch while training; the base path is not touched. No fused op then."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases trained in place: none, all of the model, or those of adapted layers."""
    lora_bias: bool = False
    """A trained bias on B."""
    eva_ratio: float = 2.0
    """EVA's ρ: after redistribution no layer has more than ρ·rank. 1 keeps all ranks equal."""
    eva_tau: float = 0.99
    """EVA's τ: a layer needs no more data once the cosine of each component with its last state is this large."""
    eva_tokens: Literal["attention", "labels"] = "attention"
    """Tokens that EVA looks at: all that attention_mask keeps, or of those the ones whose label is not -100."""
    forward_order: Forward | None = None
    """Order of multiplication in forward; none: the cheapest that is safe (ops/lora_linear/order.py)."""
    backward_order: Backward | None = None
    """Order of multiplication in backward; none: the cheapest that is safe."""

    @property
    def fixed(self) -> bool:
        """Whether an order of multiplication is named."""
        return self.forward_order is not None or self.backward_order is not None

    def check(self) -> None:
        for where, rank in (("rank", self.rank), *self.rank_pattern.items()):
            if rank < 1:
                raise ConfigError(f"LoRA rank {rank} at {where!r} is below 1.")
        for where, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            if not alpha > 0 or not math.isfinite(alpha):
                raise ConfigError(f"LoRA alpha {alpha} at {where!r} is not a positive number.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"LoRA.dropout = {self.dropout} is not in [0, 1).")
        if not 0 < self.lr_ratio < math.inf:
            raise ConfigError(f"LoRA.lr_ratio = {self.lr_ratio} is not a positive number.")
        if not 1 <= self.eva_ratio < math.inf or not 0 < self.eva_tau <= 1:
            raise ConfigError("LoRA.eva_ratio must be at least 1 and LoRA.eva_tau in (0, 1].")
        if self.train == "A" and self.init not in ("orthogonal", "pissa", "olora"):
            raise ConfigError(
                f'LoRA(train="A", init={self.init!r}) freezes B at zero, so nothing can learn. '
                'Use init="orthogonal", "pissa" or "olora".'
            )
        if self.precondition and self.train != "B":
            raise ConfigError('LoRA.precondition is LoRA-FA\'s gradient for B over a frozen A: it needs train="B".')
        if self.train == "B" and self.backward_order and self.backward_order not in SAVES_Z:
            raise ConfigError(
                f'LoRA(train="B", backward_order={self.backward_order!r}): that order keeps the layer\'s input, which '
                'LoRA-FA is there to free. Use "b1s" or "b5s", or leave the order open.'
            )
        if self.dropout and (self.forward_order or self.backward_order):
            raise ConfigError(
                "LoRA.forward_order and LoRA.backward_order are orders of the fused op, and dropout composes the layer "
                "of ordinary operations instead. Leave the orders open, or set dropout=0."
            )
        if self.dora and self.lora_bias:
            raise ConfigError("LoRA(dora=True, lora_bias=True): DoRA's equation has no bias on B. Drop one of the two.")
        if self.init == "orthogonal" and any(r % 2 for r in (self.rank, *self.rank_pattern.values())):
            raise ConfigError('LoRA(init="orthogonal") splits the rank in two halves: the rank must be even.')

    # ---- one site

    def rank_at(self, name: str, found: Any = None) -> int:
        if isinstance(found, Tensor):
            return found.shape[0]
        return by_pattern(self.rank_pattern, name, self.rank)

    def scale_at(self, name: str, rank: int) -> float:
        """s at a site. EVA moves ranks between layers and scales alpha along, so s stays alpha/rank of the config."""
        if self.init == "eva":
            rank = self.rank_at(name)
        alpha = by_pattern(self.alpha_pattern, name, self.alpha)
        return alpha / (math.sqrt(rank) if self.scaling == "rslora" else rank)

    def fit(self, spec: Spec) -> None:
        kind = type(spec.form).__name__.removesuffix("Form") or "Linear"
        if self.dora and (spec.form.stacked or isinstance(spec.form, EmbeddingForm)):
            raise UnsupportedLayer(f"DoRA at {spec.name}: its row norms are not defined for {kind} layers. Exclude it.")
        if isinstance(spec.form, EmbeddingForm):
            if self.init in ("pissa", "olora", "eva"):
                raise UnsupportedLayer(f'init="{self.init}" at {spec.name} needs a matrix product, not a look-up.')
            if self.train == "B" or self.lora_bias:
                raise UnsupportedLayer(
                    f"{spec.name} is an Embedding: there A starts at zero, so A must train, and there is no bias. "
                    'Exclude it, or use train="AB" and lora_bias=False.'
                )
        if spec.form.stacked and (self.dropout or self.lora_bias or self.init == "eva"):
            raise UnsupportedLayer(
                f"{spec.name} is a stack of expert weights, reached only as W + ΔW: dropout, lora_bias and "
                'init="eva" need the layer\'s input. Exclude it, or turn them off.'
            )
        rank = self.rank_at(spec.name)
        if rank > spec.max_rank:
            raise RankTooLarge(
                f"rank {rank} at {spec.name} exceeds min(out, in) = {spec.max_rank}. "
                f'Lower rank, set rank_pattern for it, or exclude "{spec.name.rpartition(".")[2]}".'
            )

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        layer = DoRALayer if self.dora else LoRALayer
        return layer(base, spec, rank, self.scale_at(spec.name, rank), self)

    @torch.no_grad()
    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        assert isinstance(adapter, LoRALayer)
        out, into, rank = adapter.out_features, adapter.in_features, adapter.rank
        W = adapter.base.rows().to(torch.float64) if self.init in ("pissa", "olora") else torch.empty(0)
        stack = adapter.A.shape[:-2]
        for expert in range(stack[0]) if stack else (...,):
            here = key / expert if isinstance(expert, int) else key
            if isinstance(adapter.form, EmbeddingForm):
                A, B = lora_init.embedding(here, out, into, rank)
            elif self.init == "pissa":
                A, B = lora_init.pissa(W[expert], rank, adapter.scale)
            elif self.init == "olora":
                A, B = lora_init.olora(W[expert], rank)
            elif self.init == "eva":
                A, B = found, torch.zeros(out, rank, device="cpu")
            else:
                A, B = getattr(lora_init, self.init)(here, out, into, rank)
            adapter.A[expert].copy_(A)
            adapter.B[expert].copy_(B)
        if adapter.A0 is not None and adapter.B0 is not None:
            adapter.A0.copy_(adapter.A)
            adapter.B0.copy_(adapter.B)
        if adapter.b is not None:
            adapter.b.zero_()
        if isinstance(adapter, DoRALayer):
            adapter.rebased()

    # ---- the model

    @property
    def needs_data(self) -> bool:
        return self.init == "eva"

    def survey(self, model: nn.Module, specs: Sequence[Spec], data: Iterable[Any] | None, seed: int) -> dict[str, Any]:
        if self.init != "eva":
            return {}
        ranks = {spec.name: self.rank_at(spec.name) for spec in specs}
        assert data is not None
        return dict(lora_eva.survey(model, specs, ranks, data, self.eva_ratio, self.eva_tau, self.eva_tokens))

    def in_place(self, name: str, adapted: bool) -> bool:
        leaf = name.rpartition(".")[2]
        return leaf == "bias" and (self.bias == "all" or (self.bias == "lora_only" and adapted))

    def must_learn(self, name: str) -> bool:
        return self.bias != "all"  # models own biases that a task never reaches, such as BERT's pooler

    @property
    def own_bias(self) -> bool:
        return self.lora_bias

    def learning_rate(self, name: str, leaf: str) -> float:
        return self.lr_ratio if leaf == "B" else 1.0

    def events(self) -> tuple[Event, ...]:
        return (Precondition(),) if self.precondition else ()
