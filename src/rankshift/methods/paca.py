"""PaCA: y = W x, but r columns of W train where they stand. Woo et al. 2025, arXiv 2503.01905 (ICLR).

    W[:, I] = W₀[:, I] + s·D        I: r of the n input channels, drawn once      D (out, r), s = alpha/r
    dX = dY W                       dD = s·dYᵀ X[:, I]

The forward is the plain layer's own product, and of its input only X[:, I] is kept. D starts at zero in fp32 and is
what trains; W[:, I] = round(W₀[:, I] + s·D) is written once an update, never in forward, and what stood there is kept,
so that disabling, switching and unmerging give the base back bit for bit. Standing on another adapter, or on a base
that cannot be written, the same change is a branch, y = W x + s·D x[I]. A convolution trains the columns of r of its
input channels, D (out, r·∏kernel).

Where the published code differs:
- it trains W[:, I]/s itself, so weight decay shrinks the pretrained columns; here decay shrinks the change D;
- it writes columns in forward on every second training pass, so a step may use columns of the step before, and
  evaluation never writes them; here they are written when an update is taken, and whenever D was changed by hand;
- it draws I from the global generator, unsorted; here I is keyed by seed and layer, sorted and saved;
- its gradient is formed in the compute dtype; here it is accumulated in fp32;
- its gradient-based selection computes a gradient and throws it away; here ``select="gradient"`` uses it.
The paper draws I once; ``redraw_every`` is an addition (after Tripathi & Diddigi's R-PaCA): fold, draw, start anew.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter, Columns
from rankshift.core.base import Base, Dense
from rankshift.core.errors import ConfigError, RankTooLarge, UnsupportedLayer, WrongBase
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.form import ConvForm, EmbeddingForm, Form
from rankshift.core.method import Method
from rankshift.core.random import Key
from rankshift.core.site import Spec, by_pattern
from rankshift.methods import paca_select
from rankshift.ops import column_write
from rankshift.ops.paca_linear import paca_conv, paca_linear


class PaCALayer(Adapter):
    """y = W x + bias with W[:, I] = W₀[:, I] + s·D, as the base's tenant; else y = W x + s·D x[I]."""

    derived = frozenset({"origin"})
    channels: Tensor

    def __init__(self, base: Base, spec: Spec, rank: int, scale: float):
        super().__init__(base)
        self.scale = scale
        width = rank * spec.form.taps
        # filled, not empty: a run that is loaded enters before its values come
        self.D = nn.Parameter(torch.zeros(spec.out, width, dtype=spec.master, device=spec.device))
        self.origin = nn.Parameter(torch.zeros(spec.out, width, dtype=spec.dtype, device=spec.device), False)
        self.register_buffer("channels", torch.arange(rank, device=spec.device))  # (r,) I, sorted
        self._written: tuple[Any, Any, int] | None = None  # (W, D, D's version) when W was last written

    @property
    def rank(self) -> int:
        return len(self.channels)

    @property
    def occupied(self) -> Tensor:
        """The columns of W that belong to the channels, (r·∏kernel,), sorted."""
        taps = self.form.taps
        if taps == 1:
            return self.channels
        return (taps * self.channels[:, None] + torch.arange(taps, device=self.channels.device)).flatten()

    @property
    def keeps(self) -> Tensor:
        return self.occupied

    # ---- the columns in the base

    @torch.no_grad()
    def enter(self) -> None:
        base = self.base
        if not base.hosts or base.weight.is_meta:
            return
        if base.tenant is None:
            last, count = int(self.channels[-1]), self.in_features // self.form.taps
            if last >= count:
                raise WrongBase(
                    f"{self.site} has {count} input channels, and the adapter trains channel {last}: it was made for "
                    "another base."
                )
            part, held = shard.local(self.origin)
            part.copy_(base.columns(self.occupied, held))
            base.house(self)
        if base.tenant is self:
            self.write()

    @torch.no_grad()
    def leave(self) -> None:
        if self.base.tenant is self:
            self.base.put_(self.occupied, self.origin)
            self.base.house(None)
            self._written = None

    @torch.no_grad()
    def write(self, columns: Tensor | None = None) -> None:
        """W[:, I] = W₀[:, I] + s·D, rounded once; ``columns`` are that sum where it has been taken already."""
        self.base.put_(self.occupied, self.origin + self.scale * self.D if columns is None else columns)
        # what a sharded model computes with are gathered copies: there only updates and verbs write
        if shard.is_sharded(self.D):
            self._written = None
        else:
            self.wrote(self._stored, self.D)

    def wrote(self, W: Tensor, D: Tensor) -> None:
        """Note that W has been written from D as it is."""
        self.__dict__["_written"] = weakref.ref(W), weakref.ref(D), D._version  # nn.Module's own way takes longer

    def tensors(self) -> column_write.Layer | None:
        """What :meth:`write` reads and writes, where a kernel can do that for many layers together."""
        base, own = self.base, self._parameters
        if type(base) is not Dense or type(self.form) is not Form:
            return None
        found = base.weight, own["D"], own["origin"], self._buffers["channels"], self.scale
        layer = column_write.Layer(*found)  # type: ignore[arg-type]
        return layer if column_write.fits(layer) else None

    @property
    def _stored(self) -> Tensor:
        """A tensor that holds the weight."""
        return next(iter(self.base.stored.values()))

    def refresh(self) -> None:
        """Write if D was changed by another hand than the optimizer's (an average swapped in, a state loaded)."""
        if torch.compiler.is_compiling() or self._written is None:
            return
        weight, D, version = self._written
        if weight is not None and weight() is not self._stored:
            return  # gathered by FSDP2, with the columns that stand in the shards
        written = D()
        if written is None or not written.is_set_to(self.D) or self.D._version != version:
            self.write()

    def __getstate__(self) -> dict[str, Any]:
        written = self._written
        fresh = written is not None and written[1]() is self.D and written[2] == self.D._version
        return {**self.__dict__, "_written": None if written is None else fresh}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's tensors are others than those that were written from."""
        fresh = state["_written"]
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._written = None if fresh is None else (None, weakref.ref(self.D), self.D._version if fresh else -1)

    # ---- the equation

    def forward(self, x: Tensor) -> Tensor:
        return self._resident(x, self.base.bias) if self.base.tenant is self else self._beside(self.base.linear(x), x)

    def product(self, x: Tensor) -> Tensor:
        return self._resident(x, None) if self.base.tenant is self else self._beside(self.base.product(x), x)

    def _resident(self, x: Tensor, bias: Tensor | None) -> Tensor:
        self.refresh()
        base, form = self.base, self.form
        if isinstance(form, ConvForm):
            return paca_conv(x, self.D, self.scale, self.channels, base.weight, bias, form)
        return paca_linear(x, self.D, self.scale, self.channels, bias, base.format, base.packed)

    def term(self) -> Columns | None:
        if self.base.tenant is not self or not self.form.pointwise:
            return None
        self.refresh()
        return Columns(self.channels, self.D, self.scale)

    def _beside(self, y: Tensor, x: Tensor) -> Tensor:
        D = (self.scale * self.D).to(y.dtype)
        return y + self.form.narrow(self.rank).apply(self.form.pick(x, self.channels), D)

    def delta(self, rows: slice = slice(None)) -> Tensor:
        return widened(self.scale * self.D[rows], self.occupied, self.in_features)

    def low_rank(self) -> tuple[Tensor, Tensor] | None:
        columns = self.occupied
        A = torch.zeros(len(columns), self.in_features, dtype=self.D.dtype, device=columns.device)
        A[torch.arange(len(columns), device=columns.device), columns] = 1
        return A, self.scale * shard.whole(self.D)


def widened(D: Tensor, columns: Tensor, into: int) -> Tensor:
    """D (k, r) at its columns of (k, into), else zero; differentiable."""
    return D.new_zeros(D.shape[0], into).index_copy(1, columns, D)


@dataclass(frozen=True)
class WriteBack:
    """The optimizer has moved D: its columns go into W. If it has not after all, they are what stands there."""

    moment: ClassVar[Moment] = Moment.UPDATED
    essential: ClassVar[bool] = False
    steps: ClassVar[bool] = True

    def due(self, tick: Tick) -> bool:
        return True

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        self.apply_all([adapter], tick)

    def apply_all(self, adapters: Sequence[Adapter], tick: Tick) -> None:
        """All layers in one launch where a kernel takes them, or their sums in a few: a GPU would wait for many."""
        layers = [a for a in adapters if isinstance(a, PaCALayer) and a.base.tenant is a]
        together = {a: tensors for a in layers if (tensors := a.tensors()) is not None}
        if together:
            column_write.write_(list(together.values()))
            for layer, (W, D, *_) in together.items():
                layer.wrote(W, D)
        rest = [a for a in layers if a not in together and not shard.is_sharded(a.D)]
        if rest:
            columns = torch._foreach_mul([a.D for a in rest], [a.scale for a in rest])
            torch._foreach_add_(columns, [a.origin for a in rest])
            for layer, sums in zip(rest, columns, strict=True):
                layer.write(sums)
        written = {*together, *rest}
        for adapter in adapters:
            if adapter not in written:
                adapter.enter()


@dataclass(frozen=True)
class Redraw:
    """W₀ ← W₀ + s·D for good; I drawn anew; D and its moments zero."""

    method: PaCA
    every: int
    moment: ClassVar[Moment] = Moment.UPDATED

    def due(self, tick: Tick) -> bool:
        return (tick.step + 1) % self.every == 0

    def apply(self, adapter: Adapter, tick: Tick) -> None:
        assert isinstance(adapter, PaCALayer)
        D, columns, into = adapter.scale * shard.whole(adapter.D), adapter.occupied, adapter.in_features
        adapter.leave()
        adapter.base.add_(lambda rows: widened(D[rows], columns, into))
        adapter.channels.copy_(self.method.choose(adapter, tick.key(adapter.label, adapter.site, "channels")))
        for tensor in (adapter.D, *tick.state(adapter.D).values()):
            shard.local(tensor)[0].zero_()
        adapter.enter()


def _channels(spec: Spec, rank: int) -> int:
    """How many channels of input a layer has; at least ``rank``."""
    channels = spec.into // spec.form.taps
    if rank > channels:
        leaf = spec.name.rpartition(".")[2]
        raise RankTooLarge(
            f"rank {rank} at {spec.name} exceeds its {channels} input channels. Lower rank, set rank_pattern for it, "
            f'or exclude "{leaf}".'
        )
    return channels


@dataclass(frozen=True, kw_only=True)
class PaCA(Method):
    """A few columns of each weight, trained in place."""

    name: ClassVar[str] = "paca"
    paper: ClassVar[str] = "Woo et al. 2025, arXiv 2503.01905"
    summary: ClassVar[str] = "a few columns of each weight, trained where they stand"
    formula: ClassVar[str] = "r·out"

    rank: int = 16
    """r, input channels that train. The paper takes about twice LoRA's rank for equal parameters: 16 on MMLU, where
    LoRA has 8; 64 on Oasst1."""
    alpha: float = 32.0
    """Numerator of s = alpha / rank, which with Adam multiplies the learning rate and does nothing else. 32 makes
    s·lr = 4e-4 at lr 2e-4, as in the paper's MMLU run (alpha 64, lr 1e-4)."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks for layers matched by name, e.g. {"q_proj": 8}; the last match counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas for layers matched by name; the last match counts."""
    select: Literal["random", "blocks", "weight_norm", "activation", "gradient"] = "random"
    """How channels are chosen; see methods/paca_select.py. The paper's is random. "activation" and "gradient" need
    data= at attach."""
    block: int = 16
    """Channels in an aligned block of select="blocks". 16 of bf16 are the 32 bytes that a GPU reads at once."""
    redraw_every: int | None = None
    """Updates after which the change is folded into the base, channels are drawn anew and Adam's moments start anew;
    none: never, as in the paper. The base is then rewritten: disabled() and detach() cannot give it back."""

    @property
    def reversible(self) -> bool:  # type: ignore[override]
        """Whether the base as it came can be had back: not where changes are folded into it."""
        return self.redraw_every is None

    def check(self) -> None:
        for where, rank in (("rank", self.rank), *self.rank_pattern.items()):
            if rank < 1:
                raise ConfigError(f"PaCA rank {rank} at {where!r} is below 1.")
            if self.block < 1 or (self.select == "blocks" and rank % self.block):
                raise ConfigError(
                    f'PaCA(select="blocks") takes whole blocks: rank {rank} at {where!r} is no multiple of '
                    f"block = {self.block}. Raise rank, or lower block."
                )
        for where, alpha in (("alpha", self.alpha), *self.alpha_pattern.items()):
            if not alpha > 0 or not math.isfinite(alpha):
                raise ConfigError(f"PaCA alpha {alpha} at {where!r} is not a positive number.")
        if self.redraw_every is not None:
            if self.redraw_every < 1:
                raise ConfigError(f"PaCA.redraw_every = {self.redraw_every} is below 1. Leave it out to never re-draw.")
            if self.select in ("activation", "gradient"):
                raise ConfigError(
                    f'PaCA(redraw_every={self.redraw_every}, select="{self.select}"): in mid-run there is no data to '
                    'look at. Use "random", "blocks" or "weight_norm", or leave redraw_every out.'
                )

    # ---- one site

    def rank_at(self, name: str, found: Any = None) -> int:
        return by_pattern(self.rank_pattern, name, self.rank)

    def fit(self, spec: Spec) -> None:
        leaf = spec.name.rpartition(".")[2]
        if isinstance(spec.form, EmbeddingForm):
            raise UnsupportedLayer(
                f"{spec.name} is an Embedding: its columns are tokens, not input channels. Exclude it in targets, or "
                f'train it whole with modules_to_save=("{leaf}",).'
            )
        if spec.storage != "dense" and self.redraw_every is not None:
            raise UnsupportedLayer(
                f"{spec.name} is held in {spec.storage}, which would round every change that is folded into it. Leave "
                "redraw_every out, or base=None."
            )
        if spec.form.stacked:
            raise UnsupportedLayer(
                f"{spec.name} is a stack of expert weights that its module multiplies by itself, so no layer there "
                "could keep only some channels of its input. Exclude it in targets, or use LoRA there."
            )
        channels = _channels(spec, self.rank_at(spec.name))
        if self.select == "blocks" and channels % self.block:
            raise UnsupportedLayer(
                f"{spec.name} has {channels} input channels, which are no whole blocks of {self.block}. Lower block, "
                f'exclude "{leaf}", or use select="random".'
            )

    def adapt(self, base: Base, spec: Spec, rank: int, shared: Any = None) -> Adapter:
        _channels(spec, rank)  # a rank that was saved elsewhere
        alpha = by_pattern(self.alpha_pattern, spec.name, self.alpha)
        return PaCALayer(base, spec, rank, alpha / rank)

    @torch.no_grad()
    def start(self, adapter: Adapter, key: Key, found: Any = None) -> None:
        assert isinstance(adapter, PaCALayer)
        adapter.channels.copy_(self.choose(adapter, key / "channels") if found is None else found)
        adapter.D.zero_()

    def choose(self, adapter: PaCALayer, key: Key) -> Tensor:
        """I of one site, (r,), the same on every rank; for selections that need no data."""
        rank, taps = adapter.rank, adapter.form.taps
        channels = adapter.in_features // taps
        if self.select == "blocks":
            return paca_select.blocks(key, channels, rank, self.block)
        if self.select == "weight_norm":  # near-ties are decided once
            return shard.from_first(paca_select.largest(paca_select.weight_norm(adapter.base.rows(), taps), rank))
        return paca_select.random(key, channels, rank)

    # ---- the model

    @property
    def needs_data(self) -> bool:
        return self.select in ("activation", "gradient")

    def survey(self, model: nn.Module, specs: Sequence[Spec], data: Iterable[Any] | None, seed: int) -> dict[str, Any]:
        if self.select not in ("activation", "gradient"):
            return {}
        ranks = {spec.name: self.rank_at(spec.name) for spec in specs}
        assert data is not None
        return dict(paca_select.survey(model, specs, ranks, data, self.select))

    def events(self) -> tuple[Event, ...]:
        if self.redraw_every is None:
            return (WriteBack(),)
        return (Redraw(self, self.redraw_every), WriteBack())
