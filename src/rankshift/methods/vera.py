"""VeRA: y = W x + b ⊙ (B (d ⊙ (A x))), only the vectors d and b train. Kopiczko et al. 2023, arXiv 2310.11454.

A (r, in) and B (out, r) are random, frozen and the same for every layer: one pair, as wide as the widest layer, of
which a layer takes the first columns of A and the first rows of B (PEFT's choice; the paper has equal shapes). d starts
at d₀, b at zero, so the function is that of the base and d stands still for one step. No alpha: the learning rate is
the scale, about ten times LoRA's.

The pair follows from (seed, r, in_max, out_max): float32 on the CPU, A first, then B, uniform within ±√(6/columns)
(Kaiming with gain √2, which the paper's ablation favours), the numbers that PEFT draws. Where PEFT's code differs:
  a second adapter there uses the first one's pair, whatever it was trained on; here every adapter has its own
  in_max and out_max are not in its files; here they are, with a digest, so that other numbers are noticed
  every layer there holds the pair in its state; here one does, and it is saved only on demand
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter, LowRank
from rankshift.core.base import Base
from rankshift.core.errors import ConfigError, UnsupportedLayer, WrongBase
from rankshift.core.form import EmbeddingForm
from rankshift.core.method import Method
from rankshift.core.random import Key
from rankshift.core.site import Spec, matches, prefixes
from rankshift.ops.vera_linear import vera_linear
from rankshift.ops.vera_linear.op import factor, fused_factor

GENERATOR = "torch.Generator(cpu), float32, A then B, uniform ±sqrt(6/columns)"


@dataclass(frozen=True)
class Numbers:
    """What the pair follows from."""

    rank: int
    in_max: int
    out_max: int
    seed: int

    def draw(self) -> tuple[Tensor, Tensor]:
        """(A (rank, in_max), B (out_max, rank)), fp32 on the CPU."""
        generator = torch.Generator(device="cpu").manual_seed(self.seed)
        pair = []
        for shape in ((self.rank, self.in_max), (self.out_max, self.rank)):
            bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))  # √(6/columns), to PEFT's last bit
            pair.append(torch.empty(shape, device="cpu").uniform_(-bound, bound, generator=generator))
        return pair[0], pair[1]


def digest(A: Tensor, B: Tensor) -> str:
    """16 hexadecimal digits that tell one pair from another, by its fp32 bits."""
    found = hashlib.sha256()
    for matrix in (A, B):
        found.update(matrix.detach().to("cpu", torch.float32).contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


class Projection(nn.Module):
    """The pair on one device: two buffers in one place, which every layer there reads.

    The buffers keep their dtype when the model is cast (``model.to(torch.bfloat16)``, ``.half()``): a rounded pair is
    another one. Leaving the meta device they are drawn.
    """

    A: Tensor  # (rank, in_max)
    B: Tensor  # (out_max, rank)

    def __init__(self, A: Tensor, B: Tensor, draw: Callable[[], tuple[Tensor, Tensor]], save: bool):
        super().__init__()
        self.register_buffer("A", A, persistent=save)
        self.register_buffer("B", B, persistent=save)
        self.draw = draw

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Projection:
        before, dtype = (self.A, self.B), self.A.dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if before[0].is_meta and not self.A.is_meta:
            before = self.draw()
        elif self.A.dtype == before[0].dtype:
            return self
        self.A, self.B = (old.to(new.device, dtype) for old, new in zip(before, (self.A, self.B), strict=True))
        return self


class Pair:
    """What the sites of one adapter share: the pair's numbers, and a :class:`Projection` on each of their devices."""

    def __init__(self, numbers: Numbers, dtype: torch.dtype, save: bool, known: str | None = None):
        self.numbers, self.dtype, self.save, self.digest = numbers, dtype, save, known
        self.on: dict[torch.device, Projection] = {}

    def draw(self) -> tuple[Tensor, Tensor]:
        """The pair, fp32 on the CPU.

        Raises:
            WrongBase: it is not the pair that the adapter was trained with, and no other one will be loaded.
        """
        A, B = self.numbers.draw()
        found = digest(A, B)
        if self.digest is None:
            self.digest = found
        if found != self.digest and not self.save:
            raise WrongBase(
                f"This VeRA adapter was trained with random projections {self.digest}, drawn from seed "
                f"{self.numbers.seed}; torch {torch.__version__} draws others ({found}), with which it computes "
                "something else. Load it with the torch that trained it and save it with save_projection=True, or "
                "export it as a merged model there."
            )
        return A, B

    def lend(self, layer: VeRALayer, device: torch.device) -> None:
        """Give a layer the pair on its device. The first layer there owns it: one place that is moved, wrapped, saved;
        the others keep a reference that no module sees."""
        if device in self.on:
            layer.__dict__["projection"] = self.on[device]
            return
        if device.type == "meta":
            A = torch.empty(self.numbers.rank, self.numbers.in_max, dtype=self.dtype, device=device)
            B = torch.empty(self.numbers.out_max, self.numbers.rank, dtype=self.dtype, device=device)
        else:
            A, B = (matrix.to(device, self.dtype) for matrix in self.draw())
        save = self.save and not self.on  # once, however many devices
        layer.__dict__["source"] = next(iter(self.on.values())) if self.save and self.on else None
        layer.projection = self.on[device] = Projection(A, B, self.draw, save)

    def describe(self) -> dict[str, Any]:
        if self.digest is None:  # on the meta device nothing was drawn yet
            self.draw()
        return {"generator": GENERATOR, **dataclasses.asdict(self.numbers), "digest": self.digest}


class VeRALayer(Adapter):
    """y = W x + b ⊙ (B (d ⊙ (A x))).

    Linear layers run it as one autograd node, ops/vera_linear, that keeps A x alone. Elsewhere (convolutions, dropout,
    standing on another adapter) b and d go into B first, C = diag(b) B diag(d), so that nothing of the output's size is
    kept there either.
    """

    silent: frozenset[str] = frozenset({"lambda_d"})
    projection: Projection
    source: Projection | None = None  # where the pair that this layer owns is loaded, if that is on another device

    def __init__(self, base: Base, spec: Spec, pair: Pair, config: VeRA):
        super().__init__(base)
        self.config = config
        stack = (spec.form.experts,) if spec.form.stacked else ()  # type: ignore[attr-defined]
        rank = pair.numbers.rank
        self.lambda_d = nn.Parameter(torch.empty(*stack, rank, dtype=spec.master, device=spec.device))  # (r,)
        self.lambda_b = nn.Parameter(torch.empty(*stack, spec.out, dtype=spec.master, device=spec.device))  # (out,)
        pair.lend(self, spec.device)

    @property
    def rank(self) -> int:
        return self.lambda_d.shape[-1]

    @property
    def A(self) -> Tensor:  # noqa: N802  the paper's letter
        """The layer's columns of A, (r, in)."""
        return self.projection.A[:, : self.in_features]

    @property
    def B(self) -> Tensor:  # noqa: N802
        """The layer's rows of B, (out, r)."""
        return self.projection.B[: self.out_features]

    @torch.no_grad()
    def enter(self) -> None:
        if self.source is not None and self.source.A.device.type != "meta":
            self.projection.A.copy_(self.source.A)
            self.projection.B.copy_(self.source.B)

    def forward(self, x: Tensor) -> Tensor:
        return self.add_branch(x)

    def product(self, x: Tensor) -> Tensor:
        return self.add_branch(x, bias=False)

    def add_branch(self, x: Tensor, bias: bool = True) -> Tensor:
        """W x + b ⊙ (B (d ⊙ (A x))), with the base's bias or without."""
        base, form, d, b = self.base, self.form, self.lambda_d, self.lambda_b
        p = self.config.dropout if self.training else 0.0
        if base.storage and form.pointwise and p == 0 and not base.weight.requires_grad:
            return vera_linear(x, self.A, self.B, d, b, base.bias if bias else None, base.format, base.packed)
        y = base.linear(x) if bias else base.product(x)
        z = form.apply(F.dropout(x, p) if p else x, self.A.to(y.dtype))
        return y + form.expand(z, factor(self.B, d, b).to(y.dtype))

    def delta(self, rows: slice = slice(None)) -> Tensor:
        C = factor(self.B[rows], self.lambda_d, self.lambda_b[..., rows])
        return C @ self.A.to(C.dtype)

    def term(self) -> LowRank | None:
        if self.config.dropout and self.training:
            return None
        return LowRank(self.A, fused_factor(self.B, self.lambda_d, self.lambda_b), 1.0)

    def branch(self) -> tuple[Tensor, Tensor]:
        C = factor(self.B, self.lambda_d, self.lambda_b)
        return self.A.to(C.dtype).expand(*C.shape[:-2], *self.A.shape), C

    def low_rank(self) -> tuple[Tensor, Tensor]:
        C = factor(self.B, shard.whole(self.lambda_d), shard.whole(self.lambda_b))
        return self.A.to(C.dtype).expand(*C.shape[:-2], *self.A.shape), C


@dataclass(frozen=True, kw_only=True)
class VeRA(Method):
    """Two trained vectors beside each frozen weight, between random matrices that all layers share."""

    name: ClassVar[str] = "vera"
    paper: ClassVar[str] = "Kopiczko et al. 2023, arXiv 2310.11454"
    summary: ClassVar[str] = "two trained vectors a layer, between random frozen matrices that all layers share"
    formula: ClassVar[str] = "out + r"
    default_lr: ClassVar[float] = 4e-3

    rank: int = 256
    """r, length of d: columns of B and rows of A. The paper uses 256 and 1024; it may exceed a layer's width."""
    d_initial: float = 0.1
    """Where every entry of d starts. The paper uses 0.1; 1e-7 works as well, 1.0 is bad."""
    projection_seed: int = 0
    """Seed of the random pair (PEFT's projection_prng_key). Equal seed, rank and targets give equal pairs."""
    save_projection: bool = False
    """Save the pair with the adapter, r·(in_max + out_max) values, instead of drawing it again when loading: safe from
    a torch that draws other numbers (which is otherwise noticed and refused). PEFT's default is True."""
    dropout: float = 0.0
    """Probability of dropping an input of the branch while training; the base path is not touched. No fused op then."""
    bias: Literal["none", "all", "vera_only"] = "none"
    """Biases trained in place: none, all of the model, or those of adapted layers."""
    head_lr_ratio: float = 1.0
    """The learning rate of modules_to_save is this many times lr. The paper tunes it apart: 0.02 to 2.5 on GLUE."""

    def check(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"VeRA.rank = {self.rank} is below 1.")
        if self.d_initial == 0 or not math.isfinite(self.d_initial):
            raise ConfigError(
                f"VeRA.d_initial = {self.d_initial}: with d = 0 and b = 0 neither vector has a gradient, so nothing "
                "can learn. Use the paper's 0.1, or a small number such as 1e-7."
            )
        if not -(2**63) <= self.projection_seed < 2**64:
            raise ConfigError(f"VeRA.projection_seed = {self.projection_seed} is no seed: torch takes 64 bits.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"VeRA.dropout = {self.dropout} is not in [0, 1).")
        if not 0 < self.head_lr_ratio < math.inf:
            raise ConfigError(f"VeRA.head_lr_ratio = {self.head_lr_ratio} is not a positive number.")

    def fit(self, spec: Spec) -> None:
        if isinstance(spec.form, EmbeddingForm):
            raise UnsupportedLayer(
                f"{spec.name} is an Embedding: its {spec.into:,} columns would set the width of the pair that all "
                f"layers share, and with it the bound ±√(6/{spec.into:,}) of A. Exclude it, or name it in "
                "modules_to_save."
            )
        if spec.form.stacked and self.dropout:
            raise UnsupportedLayer(
                f"{spec.name} is a stack of expert weights, reached only as W + ΔW: dropout needs the layer's input. "
                "Exclude it, or set dropout=0."
            )

    def rank_at(self, name: str, found: Any = None) -> int:
        return self.rank

    def share(
        self, specs: Sequence[Spec], ranks: Mapping[str, int], saved: Mapping[str, Any] | None = None
    ) -> Pair | None:
        if not specs:
            return None
        into, out = max(spec.into for spec in specs), max(spec.out for spec in specs)
        dtype = torch.float64 if any(spec.master is torch.float64 for spec in specs) else torch.float32
        if saved is None:
            return Pair(Numbers(self.rank, into, out, self.projection_seed), dtype, self.save_projection)
        if saved.get("generator") != GENERATOR:
            raise WrongBase(
                f"The random projections of this VeRA adapter are drawn by {saved.get('generator')!r}, which this "
                "version of rankshift does not know. Update: pip install -U rankshift"
            )
        numbers = Numbers(saved["rank"], saved["in_max"], saved["out_max"], saved["seed"])
        if set(ranks.values()) != {numbers.rank} or numbers.in_max < into or numbers.out_max < out:
            raise WrongBase(
                f"This VeRA adapter was trained with projections A ({numbers.rank}, {numbers.in_max}) and B "
                f"({numbers.out_max}, {numbers.rank}), too small for this model's layers of up to {out} × {into} at "
                f"rank {max(ranks.values())}. Load the model that it was trained on."
            )
        return Pair(numbers, dtype, self.save_projection, saved["digest"])

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        assert isinstance(shared, Pair)
        return VeRALayer(base, spec, shared, self)

    @torch.no_grad()
    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        assert isinstance(adapter, VeRALayer)
        adapter.lambda_d.fill_(self.d_initial)
        adapter.lambda_b.zero_()

    def in_place(self, name: str, adapted: bool) -> bool:
        leaf = name.rpartition(".")[2]
        return leaf == "bias" and (self.bias == "all" or (self.bias == "vera_only" and adapted))

    def must_learn(self, name: str) -> bool:
        return self.bias != "all"  # models own biases that a task never reaches, such as BERT's pooler

    def learning_rate(self, name: str, leaf: str) -> float:
        head = not leaf and self._in_head(name.partition(":")[2] or name)
        return self.head_lr_ratio if head else 1.0

    def _in_head(self, name: str) -> bool:
        return any(matches(part, pattern) for part in prefixes(name) for pattern in self.modules_to_save)
