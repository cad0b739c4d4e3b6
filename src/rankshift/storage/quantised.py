"""What storages that hold a weight in fewer bits share: a layout, the tensors, and the verbs of a base.

A storage is a :class:`Layout` (how its tensors stand for the weight) and a :class:`Held` base: three functions between
tensors and layers (``quantised``, ``taken``, ``plain``). Rounding is theirs; what is added, hosted or merged is here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.base import HOOKS, Base, Dense, Format, Tenant, storage_of
from rankshift.core.errors import UnsupportedLayer
from rankshift.core.form import Form
from rankshift.core.site import Site
from rankshift.ops.frozen_linear import frozen_linear


@dataclass(frozen=True)
class Layout(Format):
    """How a storage's tensors stand for an (out, in) weight."""

    shape: tuple[int, int]
    dtype: torch.dtype

    def grown(self, out: int) -> Layout:
        return replace(self, shape=(out, self.shape[1]))

    @property
    def computes(self) -> torch.dtype | None:
        return self.dtype

    @property
    def beside(self) -> Beside:
        """The same with some columns held beside."""
        return Beside(self)


@dataclass(frozen=True)
class Beside(Format):
    """Some columns of the weight in the compute dtype; those in the layout's tensors do not count. Of ``packed`` the
    first two are the columns (out, k) and where they stand, (k,) int64."""

    layout: Layout

    @property
    def computes(self) -> torch.dtype | None:
        return self.layout.computes

    def dense(self, *packed: Tensor) -> Tensor:
        columns, at, *rest = packed
        return self.layout.dense(*rest).index_copy_(1, at, columns.to(self.layout.dtype))


class Held(Base):
    """A linear layer's weight in a storage that rounds."""

    exact: ClassVar[bool] = False
    hosts: ClassVar[bool] = True
    via: ClassVar[torch.dtype] = torch.float32
    """The narrowest range that a weight goes through when it is rounded."""
    names: ClassVar[tuple[str, ...]]
    """Names of the tensors of the layout, in its order; those that a layout does without are left out."""

    layout: Layout
    codes: Tensor
    at: Tensor  # (k,) int64, sorted: which columns are held beside
    own: Tensor  # int64: which of those are the weight's own; the others came out of the codes, and act for a tenant

    def __init__(self, module: nn.Module, layout: Layout, tensors: list[Tensor]):
        super().__init__()
        self.form, self.layout = Form(), layout
        self.out_features, self.in_features = layout.shape
        for name, tensor in zip(self.names, tensors, strict=False):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", module._parameters.get("bias"))
        self.register_parameter("columns_beside", None)
        for name in ("at", "own"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64, device=tensors[0].device), persistent=False)
        self._hooks = {name: getattr(module, name) for name in HOOKS}
        self.training = module.training
        self._shown = shown(layout, tensors[0].device)
        # columns that were asked for last, ``at`` then, the versions of both, and where they are
        self._seen: tuple[Tensor, Tensor, tuple[int, int], Tensor] | None = None

    # ---- between layers and tensors

    @classmethod
    def describe(cls, module: nn.Module) -> dict[str, Any] | None:
        """What quantisation a layer of this storage is in, as :meth:`of` takes it; None if it is not one."""
        raise NotImplementedError

    @classmethod
    def name_of(cls, module: nn.Module) -> str:
        if isinstance(module, Held):
            return module.kind
        described = cls.describe(module)
        assert described is not None
        return str(described["kind"])

    @classmethod
    def check(cls, devices: set[torch.device]) -> None:
        """Raise ConfigError where this storage cannot be computed with on one of these devices."""

    @classmethod
    def check_values(cls, weights: Iterable[tuple[str, Tensor]], kind: str) -> None:
        """Raise UnsupportedLayer where a weight, given with the name of its layer, has values that are not finite, or
        would not be where it is rounded from. Reads each once."""
        for name, weight in weights:
            if not bool(torch.linalg.vector_norm(weight.detach(), torch.inf).to(cls.via).isfinite()):
                of = str(cls.via).removeprefix("torch.")
                raise UnsupportedLayer(
                    f'{name} has weights that are not finite in {of}, from which base="{kind}" rounds. Look at the '
                    "checkpoint, or leave base=None."
                )

    @classmethod
    def quantised(cls, weight: Tensor, kind: str, **options: Any) -> tuple[Layout, list[Tensor]]:
        """The layout and tensors of a dense weight (out, in)."""
        raise NotImplementedError

    @classmethod
    def taken(cls, module: nn.Module) -> tuple[Layout, list[Tensor]]:
        """Those of a layer of this storage, which they are taken from, not copied."""
        raise NotImplementedError

    def plain(self) -> nn.Module:
        """A layer of this storage, with the tensors as they are; columns beside are rounded into it."""
        raise NotImplementedError

    @classmethod
    def says_dtype(cls, module: nn.Module) -> bool:
        """Whether a layer of this storage knows what it computes in."""
        return True

    @classmethod
    def over(cls, module: nn.Module, dtype: torch.dtype | None = None) -> Self:
        return module if isinstance(module, cls) else cls(module, *cls._taken(module, dtype))

    @classmethod
    def measure(cls, module: nn.Module, dtype: torch.dtype | None = None) -> tuple[int, int, torch.dtype, torch.device]:
        if isinstance(module, Held):
            return *module.layout.shape, module.layout.dtype, module.weight.device
        layout, tensors = cls._taken(module, dtype)
        return *layout.shape, layout.dtype, tensors[0].device

    @classmethod
    def _taken(cls, module: nn.Module, dtype: torch.dtype | None) -> tuple[Layout, list[Tensor]]:
        layout, tensors = cls.taken(module)
        if dtype is not None and not cls.says_dtype(module):
            layout = replace(layout, dtype=dtype)
        return layout, tensors

    @classmethod
    @torch.no_grad()
    def of(cls, base: Base, kind: str, keep: Tensor | None = None, **options: Any) -> Self:
        """A dense base in this storage.

        Args:
            keep: (k,) columns to hold beside, as they are; the codes are made with zeros in their place.
        """
        assert base.layer is not None
        weight = base.dense().detach()
        columns = None
        if keep is not None and len(keep):
            columns = weight[:, keep].clone()
            weight = weight.index_fill(1, keep, 0.0)
        held = cls(base.layer, *cls.quantised(weight, kind, **options))
        if keep is not None and columns is not None:
            held._beside(keep, columns, torch.arange(len(keep), device=keep.device))
        held.changed = base.changed
        return held

    # ---- the weight

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What model code may ask of a weight: shape, dtype, device. Without values, see :func:`shown`."""
        device = self.at.device
        if (self._shown.dtype, self._shown.device) != (self.layout.dtype, device):
            self._shown = shown(self.layout, device)
        return self._shown

    @property
    def stored(self) -> dict[str, Tensor]:
        names = (*self.names, "columns_beside")
        return {name: p for name in names if (p := self._parameters.get(name)) is not None}

    @property
    def divided(self) -> bool:
        """Whether the columns beside act in place of what the codes say of them."""
        return self.columns_beside is not None and (self.tenant is not None or len(self.own) > 0)

    @property
    def format(self) -> Format:  # type: ignore[override]
        return self.layout.beside if self.divided else self.layout

    @property
    def packed(self) -> tuple[Tensor, ...]:
        tensors = tuple(p for name in self.names if (p := self._parameters.get(name)) is not None)
        columns = self.columns_beside
        if columns is None or not self.divided:
            return tensors
        if self.tenant is None and len(self.own) < len(self.at):  # sharded: what is lent cannot be taken off
            return columns.index_select(1, self.own), self.at[self.own], *tensors
        return columns, self.at, *tensors

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What ``.half()`` and ``.to(dtype)`` do to weights: codes stay, and what they stand for is of that dtype."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        now = fn(torch.empty(0, dtype=self.layout.dtype, device=self.weight.device)).dtype
        if now.is_floating_point and now != self.layout.dtype:
            self.layout = replace(self.layout, dtype=now)
        return self

    @property
    def hooks(self) -> dict[str, Any]:
        return self._hooks

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

    def alone(self) -> Self:
        """The base as a layer of the model, without a site: what hooked the layer that stood here runs."""
        self.__dict__.update(self._hooks)
        return self

    def linear(self, x: Tensor) -> Tensor:
        return self._apply_to(x, self.bias)

    def product(self, x: Tensor) -> Tensor:
        return self._apply_to(x, None)

    def _apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return frozen_linear(x, bias, self.format, self.packed)

    def _whole(self, dtype: torch.dtype | None = None) -> Tensor:
        """(out, in) as it acts, a new tensor, in another dtype if one is named. Under sharding every rank must call."""
        layout = self.layout if dtype is None else replace(self.layout, dtype=dtype)
        format = layout.beside if self.divided else layout
        return format.dense(*map(shard.whole, self.packed))

    def rows(self, rows: slice = slice(None)) -> Tensor:
        weight = self._whole()
        if self.tenant is not None:
            weight[:, self.tenant.occupied] = shard.whole(self.tenant.origin)
        return weight[rows]

    def _add(self, delta: Callable[[slice], Tensor]) -> None:
        """Rounds everything anew. Under sharding every rank must call this."""
        after = self._whole(torch.promote_types(self.dtype, torch.float32))
        change = delta(slice(None)).to(after.device)
        after = after.add_(change) if after.dtype == change.dtype else after + change
        columns, own = after[:, self.at], self.at[self.own]
        after.index_fill_(1, own, 0.0)
        layout, tensors = self.quantised(after, self.kind, **self.options)
        for name, tensor in zip(self.names, tensors, strict=False):
            shard.assign_(self.stored[name], tensor)
        if self.columns_beside is not None:
            if len(self.own) < len(self.at):  # what is lent is what the codes say
                lent = layout.dense(*tensors)[:, self.at].to(columns.dtype)
                columns = lent.index_copy_(1, self.own, columns[:, self.own])
            shard.assign_(self.columns_beside, columns.to(self.columns_beside.dtype))

    @property
    def options(self) -> dict[str, Any]:
        """What :meth:`quantised` was told."""
        return {}

    # ---- columns beside

    def columns(self, at: Tensor, rows: slice) -> Tensor:
        where = self._lend(at)
        return shard.whole(self.columns_beside)[rows][:, where]  # type: ignore[arg-type]

    @torch.no_grad()
    def put_(self, at: Tensor, values: Tensor) -> None:
        where = self._lend(at)
        part, held = shard.local(self.columns_beside)  # type: ignore[arg-type]
        theirs, rows = shard.local(values)
        mine = theirs if rows == held else shard.whole(values)[held]
        part.index_copy_(1, where, mine.to(part.dtype))

    @torch.no_grad()
    def _lend(self, at: Tensor) -> Tensor:
        """Which of the columns beside these are, (k,); what was not there yet comes with the values of the layout."""
        seen = self._seen  # a tenant writes the same ones in every update: only their first time asks the device
        if seen is not None and seen[0] is at and seen[1] is self.at and seen[2] == (at._version, self.at._version):
            return seen[3]
        if not bool(torch.isin(at, self.at).all()):
            union = torch.unique(torch.cat([self.at, at]))
            self._beside(union, self._whole()[:, union], torch.searchsorted(union, self.at[self.own]))
        where = torch.searchsorted(self.at, at)
        self._seen = at, self.at, (at._version, self.at._version), where
        return where

    def _beside(self, at: Tensor, columns: Tensor | None, own: Tensor) -> None:
        """Hold these columns beside, of which ``own`` are the weight's; None: none."""
        there = columns is not None
        self.register_buffer("at", at, persistent=there)  # saved with the columns: they say where those belong
        self.register_buffer("own", own, persistent=there)
        self.columns_beside = None if columns is None else nn.Parameter(columns, requires_grad=False)

    def house(self, tenant: Tenant | None) -> None:
        super().house(tenant)
        columns = self.columns_beside
        if tenant is None and columns is not None and len(self.own) < len(self.at) and not shard.is_sharded(columns):
            mine = columns.detach().index_select(1, self.own) if len(self.own) else None
            self._beside(self.at[self.own], mine, torch.arange(len(self.own), device=self.own.device))

    @torch.no_grad()
    def settled(self) -> list[Tensor]:
        """The layout's tensors with the columns beside rounded into them: as they are, where that changes nothing."""
        tensors: list[Tensor] = [p for name in self.names if (p := self._parameters.get(name)) is not None]
        if not self.divided:
            return tensors
        columns, at = map(shard.whole, self.packed[:2])
        if torch.equal(self.layout.dense(*map(shard.whole, tensors))[:, at].to(columns.dtype), columns):
            return tensors
        wide = self._whole(torch.promote_types(self.dtype, torch.float32))
        _, anew = self.quantised(wide, self.kind, **self.options)
        return [shard.spread(value, like) for value, like in zip(anew, tensors, strict=True)]

    # ---- the layer again

    def restore(self) -> nn.Module:
        return self.plain()

    def plainly(self) -> Base:
        return Dense(self.dequantised(), self.form)

    def rounded(self) -> Base:
        return self if self.columns_beside is None else self.over(self.plain())

    def dequantised(self, weight: Tensor | None = None) -> nn.Linear:
        """A dense layer with the weight as it acts, or with another."""
        out, into = self.layout.shape
        layer = nn.Linear(into, out, bias=False, device="meta", dtype=self.layout.dtype)
        if weight is None:
            weight = self._whole()
        else:
            weight = weight.detach().to(self.weight.device, self.layout.dtype, copy=True)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        fresh(layer, self)
        return layer


def shown(layout: Layout, device: torch.device) -> Tensor:
    """(out, in) in the dtype that a layout stands for: one NaN in memory. Some models cast the input of a layer to the
    dtype of its weight, which must not be that of codes; who reads values where there are none sees it."""
    return torch.full((), torch.nan, dtype=layout.dtype, device=device).expand(layout.shape)


def marks(model: nn.Module) -> list[tuple[dict[str, Any], str]]:
    """Where a transformers model says that it is quantised, as (dictionary, key)."""
    said = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")
    places = [(vars(model), name) for name in said]
    if (config := getattr(model, "config", None)) is not None:
        places.append((vars(config), "quantization_config"))
    return [(place, key) for place, key in places if key in place]


def held_in(module: nn.Module) -> Held | None:
    """The base of a layer, or of a site, whose weight is held in a storage that rounds; None of any other."""
    base = getattr(module, "base", None) if isinstance(module, Site) else None
    if base is None and (storage := storage_of(module)) is not None and issubclass(storage, Held):
        base = storage.over(module)
    return base if isinstance(base, Held) else None


def fresh(layer: Any, base: Held) -> Any:
    """A layer that takes the place of a base: with its bias, its mode and the hooks of the layer that stood there."""
    layer.bias = base.bias
    layer.__dict__.update(base.hooks)
    return layer.train(base.training)
