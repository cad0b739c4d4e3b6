"""What storages that hold a weight in fewer bits share: a layout, the tensors, and the verbs of a base.

A storage is a :class:`Layout` (how its tensors stand for the weight) and a :class:`Held` base: three functions between
tensors and layers (``quantised``, ``taken``, ``plain``). Rounding is theirs; what is added, hosted or merged is here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.base import HOOKS, Base, Dense, Format, storage_of
from rankshift.core.form import Form
from rankshift.core.site import Site
from rankshift.ops.frozen_linear import frozen_linear


@dataclass(frozen=True)
class Layout(Format):
    """How a storage's tensors stand for an (out, in) weight."""

    shape: tuple[int, int]
    dtype: torch.dtype

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
    names: ClassVar[tuple[str, ...]]
    """Names of the tensors of the layout, in its order; those that a layout does without are left out."""

    layout: Layout
    at: Tensor  # (k,) int64, sorted: which columns are held beside
    lent: bool = False
    """The columns beside came out of the codes, for a tenant: when there is none, the codes are what acts."""

    def __init__(self, module: nn.Module, layout: Layout, tensors: list[Tensor]):
        super().__init__()
        self.form, self.layout = Form(), layout
        self.out_features, self.in_features = layout.shape
        for name, tensor in zip(self.names, tensors, strict=False):
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
        self.register_parameter("bias", module._parameters.get("bias"))
        self.register_parameter("columns_beside", None)
        self.register_buffer("at", torch.empty(0, dtype=torch.int64, device=tensors[0].device), persistent=False)
        self._hooks = {name: getattr(module, name) for name in HOOKS}

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
    def over(cls, module: nn.Module) -> Self:
        return module if isinstance(module, cls) else cls(module, *cls.taken(module))

    @classmethod
    def measure(cls, module: nn.Module) -> tuple[int, int, torch.dtype, torch.device]:
        if isinstance(module, Held):
            return *module.layout.shape, module.layout.dtype, module.weight.device
        layout, tensors = cls.taken(module)
        return *layout.shape, layout.dtype, tensors[0].device

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
            held._beside(keep, columns)
        held.changed = base.changed
        return held

    # ---- the weight

    @property
    def stored(self) -> dict[str, Tensor]:
        names = (*self.names, "columns_beside")
        return {name: p for name in names if (p := self._parameters.get(name)) is not None}

    @property
    def divided(self) -> bool:
        """Whether the columns beside act in place of what the codes say of them."""
        return self.columns_beside is not None and not (self.lent and self.tenant is None)

    @property
    def format(self) -> Format:  # type: ignore[override]
        return self.layout.beside if self.divided else self.layout

    @property
    def packed(self) -> tuple[Tensor, ...]:
        tensors = tuple(p for name in self.names if (p := self._parameters.get(name)) is not None)
        return (self.columns_beside, self.at, *tensors) if self.divided else tensors

    @property
    def hooks(self) -> dict[str, Any]:
        return self._hooks

    @property
    def dtype(self) -> torch.dtype:
        return self.layout.dtype

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
        if self.columns_beside is not None:
            self.lent = False
            shard.assign_(self.columns_beside, after[:, self.at].to(self.columns_beside.dtype))
            after.index_fill_(1, self.at, 0.0)
        _, tensors = self.quantised(after, self.kind, **self.options)
        for name, tensor in zip(self.names, tensors, strict=False):
            shard.assign_(self.stored[name], tensor)

    @property
    def options(self) -> dict[str, Any]:
        """What :meth:`quantised` was told."""
        return {}

    # ---- columns beside

    def columns(self, at: Tensor, rows: slice) -> Tensor:
        self._hold(at)
        where = torch.searchsorted(self.at, at)
        return shard.whole(self.columns_beside)[rows][:, where]

    @torch.no_grad()
    def put_(self, at: Tensor, values: Tensor) -> None:
        self._hold(at)
        part, held = shard.local(self.columns_beside)
        theirs, rows = shard.local(values)
        mine = theirs if rows == held else shard.whole(values)[held]
        part.index_copy_(1, torch.searchsorted(self.at, at), mine.to(part.dtype))

    @torch.no_grad()
    def _hold(self, at: Tensor) -> None:
        """Hold these columns beside, with the values they have in the layout if they are not there yet."""
        if bool(torch.isin(at, self.at).all()):
            return
        union = torch.unique(torch.cat([self.at, at]))
        lent = self.columns_beside is None or self.lent
        self._beside(union, self._whole()[:, union])
        self.lent = lent

    def _beside(self, at: Tensor, columns: Tensor) -> None:
        self.at = at
        self.columns_beside = nn.Parameter(columns, requires_grad=False)

    @torch.no_grad()
    def settled(self) -> list[Tensor]:
        """The layout's tensors with the columns beside rounded into them: as they are, where that changes nothing."""
        tensors: list[Tensor] = [p for name in self.names if (p := self._parameters.get(name)) is not None]
        if not self.divided:
            return tensors
        assert self.columns_beside is not None
        columns = shard.whole(self.columns_beside)
        if torch.equal(self.layout.dense(*map(shard.whole, tensors))[:, self.at].to(columns.dtype), columns):
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
