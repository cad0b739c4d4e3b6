"""Base: an (out, in) weight in some storage, seen by every method through the same few verbs.

Dense, the format the model came in, is here; other formats are one file each in ``storage/``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.form import EmbeddingForm, Form, TransposedForm

_BLOCK = 1 << 24  # elements of fp32 scratch per block when a delta is added

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
"""Where a module keeps what hooked it: who hooked a layer hooked its place."""


class Tenant(Protocol):
    """An adapter whose columns stand in the stored weight while it acts."""

    @property
    def occupied(self) -> Tensor:
        """Which columns, (k,), sorted."""
        ...

    origin: nn.Parameter  # (out, k) what stood there before, in the weight's dtype

    def enter(self) -> None: ...

    def leave(self) -> None: ...


class Format:
    """How the tensors that hold an (out, in) weight stand for it, and how it multiplies.

    A value without tensors: a fused autograd node keeps it, and saves the tensors it is called with and nothing else.
    Another storage overrides ``dense``; one that multiplies by itself ``times`` and ``back`` too; one that can add
    before it rounds ``merged``.
    """

    stacks: ClassVar[int] = 0
    """How many of the tensors, from the first on, have a row for each output and are all that ``times`` needs: those of
    layers that read one input, one below the other, are those of a layer of all outputs. 0 where that is not so."""

    adds: ClassVar[bool] = False
    """Whether :meth:`merged` in 16 bits adds to numbers that were not rounded to them yet, at no more cost than
    :meth:`dense`."""

    def grown(self, out: int) -> Format:
        """The format of such a layer, with ``out`` outputs."""
        return self

    @property
    def computes(self) -> torch.dtype | None:
        """What the layer computes in without autocast unless its input is narrower; None: in the dtype of its input."""
        return None

    def dense(self, *packed: Tensor) -> Tensor:
        """(out, in) in the compute dtype."""
        raise NotImplementedError

    def fill(self, out: Tensor, *packed: Tensor) -> None:
        """Write :meth:`dense` into memory that is there."""
        out.copy_(self.dense(*packed))

    def merged(self, B: Tensor, A: Tensor, *packed: Tensor) -> Tensor:
        """W + B A, (out, r) and (r, in), in their dtype: (out, in). Where :attr:`adds` is false W is rounded before."""
        return torch.addmm(self.dense(*packed).to(A.dtype), B, A)

    @property
    def multiplies(self) -> bool:
        """Whether it multiplies by itself, without the dense weight."""
        return type(self).times is not Format.times

    def times(self, x: Tensor, bias: Tensor | None, *packed: Tensor) -> Tensor:
        """x Wᵀ + bias in the dtype of x: (b, in) → (b, out)."""
        W = self.dense(*packed).to(x.dtype)
        return x @ W.t() if bias is None else torch.addmm(bias.to(x.dtype), x, W.t())

    def back(self, dY: Tensor, *packed: Tensor) -> Tensor:
        """dY W in the dtype of dY: (b, out) → (b, in)."""
        return dY @ self.dense(*packed).to(dY.dtype)


class Plain(Format):
    """The weight itself."""

    stacks: ClassVar[int] = 1

    def dense(self, *packed: Tensor) -> Tensor:
        return packed[0]


class Base(nn.Module):
    """A weight of shape (out, in) and the layer it acts as."""

    exact: ClassVar[bool] = True
    """False if ``add_`` re-rounds more than the weight's dtype does; what must preserve the function refuses it."""

    storage: ClassVar[bool] = True
    """True if the weight is held here, as ``packed`` in a ``format``; False for an adapter that stands on another base,
    and for a layer that keeps its weight to itself."""

    kind: ClassVar[str] = "dense"
    """The storage's name in tables and saved runs."""

    hosts: ClassVar[bool] = False
    """True if an adapter's columns may stand in the stored weight: ``columns`` and ``put_`` are served."""

    form: Form
    format: Format = Plain()
    out_features: int
    in_features: int
    weight: Tensor  # as stored: model code may ask for its dtype or device
    bias: Tensor | None  # (out,)
    changed: bool = False
    """True once ``add_`` was called: the weight no longer is what it came as, so a run must save it."""
    tenant: Tenant | None = None
    """Whose columns stand in the stored weight now. ``rows`` and ``add_`` mean the weight without them."""
    kept: list[Tensor] | None = None
    """While this is a list, :meth:`add_` puts the weight there before it first changes it: see :meth:`revert_`."""

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """The tensors that hold the weight."""
        raise NotImplementedError

    @property
    def stored(self) -> dict[str, Tensor]:
        """The parameters that hold the weight, by their names here."""
        return {"weight": self.weight}

    def dense(self) -> Tensor:
        """The weight (out, in) in the compute dtype; of a plain one, itself."""
        return self.format.dense(*self.packed)

    @property
    def layer(self) -> nn.Module | None:
        """The module that stood here, for what model code asks of it besides its weight (stride, embedding_dim)."""
        return None

    @property
    def hooks(self) -> dict[str, Any]:
        """What hooked the layer that stood here."""
        return {} if self.layer is None else {name: getattr(self.layer, name) for name in HOOKS}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the layer computes in."""
        return self.weight.dtype

    @classmethod
    def over(cls, module: nn.Module, dtype: torch.dtype | None = None) -> Base:
        """The base of a layer that is in this storage already; copies nothing. Of what ``storages`` know.

        Args:
            dtype: what its model computes in, for layers that do not say.
        """
        raise NotImplementedError

    @classmethod
    def measure(cls, module: nn.Module, dtype: torch.dtype | None = None) -> tuple[int, int, torch.dtype, torch.device]:
        """Out, in, compute dtype and device of such a layer; ``dtype`` as in :meth:`over`."""
        raise NotImplementedError

    @classmethod
    def name_of(cls, module: nn.Module) -> str:
        """The storage's name, of such a layer."""
        return cls.kind

    def linear(self, x: Tensor) -> Tensor:
        """The layer as it came, bias included. Keeps no activation."""
        raise NotImplementedError

    def product(self, x: Tensor) -> Tensor:
        """The layer without its bias."""
        return self.form.apply(x, self.dense())

    @property
    def total_bias(self) -> Tensor | None:
        """What :meth:`linear` adds to :meth:`product`, (out,), differentiable; None if that is nothing."""
        return self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)

    def check_open(self, name: str) -> None:
        """Raise UnsupportedLayer where the weight can be neither read nor written; ``name`` is the layer's. Methods
        that do so only in training ask when they are attached."""

    def rows(self, rows: slice = slice(None)) -> Tensor:
        """A dense (k, in) copy of some rows of the whole weight. Under sharding every rank must call it."""
        raise NotImplementedError

    @torch.no_grad()
    def add_(self, delta: Callable[[slice], Tensor]) -> None:
        """W += delta. Asks ``delta`` for fp32 (or wider) rows of the part held here, block by block; rounds once."""
        self.changed = True
        tenant = self.tenant
        if tenant is not None:
            tenant.leave()
        self.keep()
        with exactly(self.weight.device):
            self._add(delta)
        if tenant is not None:
            tenant.enter()

    def _add(self, delta: Callable[[slice], Tensor]) -> None:
        """What :meth:`add_` does, in this storage."""
        raise NotImplementedError

    def rewrite_(self, how: Callable[[Tensor], None]) -> None:
        """Let ``how`` write into the weight as it is stored and sharded: an update, which rounds in its own way."""
        raise NotImplementedError

    def keep(self) -> None:
        """Put the weight aside where that is asked for and was not done yet."""
        if self.kept is not None and not self.kept:
            self.kept.extend(shard.local(tensor)[0].clone() for tensor in self.stored.values())

    @torch.no_grad()
    def revert_(self) -> None:
        """Undo what was added since ``kept`` is a list, bit for bit."""
        for before, tensor in zip(self.kept or (), self.stored.values(), strict=False):
            shard.local(tensor)[0].copy_(before)

    def house(self, tenant: Tenant | None) -> None:
        """Say whose columns stand in the stored weight from now on; None: nobody's."""
        self.__dict__["tenant"] = tenant  # a plain reference: nn.Module would take the adapter for a part of the base

    def columns(self, at: Tensor, rows: slice) -> Tensor:
        """A copy of rows of the stored columns ``at``, (rows, k). Under sharding every rank must call this."""
        raise NotImplementedError

    def put_(self, at: Tensor, values: Tensor) -> None:
        """Write the columns ``at``, (out, k), sharded along out as a weight is; rounds once. Under sharding every rank
        must call this. Marks nothing as changed: who writes keeps what stood there and puts it back."""
        raise NotImplementedError

    def restore(self) -> nn.Module:
        """The layer as a plain module again, with the weight as it now is."""
        raise NotImplementedError

    def plainly(self) -> Base:
        """A base in which ``add_`` rounds no more than the layer's dtype does: itself, if it is one."""
        return self

    def rounded(self) -> Base:
        """A base with everything rounded into its storage, as :meth:`restore` does it: itself, if it is one."""
        return self


class Dense(Base):
    """The layer's own parameters, in the dtype and layout they came in. Takes them over; copies nothing."""

    hosts: ClassVar[bool] = True

    def __init__(self, module: nn.Module, form: Form):
        super().__init__()
        self.form = form
        weight = module.weight
        assert isinstance(weight, nn.Parameter)
        # One dictionary for both: what replaces a parameter here (FSDP2's shards, .to) replaces it in the layer that
        # restore() hands back, and nothing keeps the old one alive.
        self._parameters = module._parameters
        self._layer = (module,)  # in a tuple, hidden from nn.Module: it must not appear in names
        self.out_features, self.in_features = form.matrix(weight).shape[-2:]

    @property
    def layer(self) -> nn.Module:
        return self._layer[0]

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        return self._parameters.get("bias")

    @property
    def packed(self) -> tuple[Tensor, ...]:
        return (self.form.matrix(self.weight),)

    def linear(self, x: Tensor) -> Tensor:
        return self.form.run(x, self.weight, self.bias)

    def rows(self, rows: slice = slice(None)) -> Tensor:
        weight = self.form.matrix(shard.whole(self.weight))[..., rows, :].clone()
        if self.tenant is not None:
            weight[:, self.tenant.occupied] = shard.whole(self.tenant.origin)[rows]
        return weight

    def columns(self, at: Tensor, rows: slice) -> Tensor:
        part, held = shard.local(self.weight)
        if held == rows and self._out_first:  # no other rank is needed
            return self.form.matrix(part)[:, at]
        return self.form.matrix(shard.whole(self.weight))[rows][:, at]

    @torch.no_grad()
    def put_(self, at: Tensor, values: Tensor) -> None:
        part, held = shard.local(self.weight)
        if self._out_first:  # the rows held here of one are those of the other
            matrix = self.form.matrix(part)
            matrix.index_copy_(1, at, shard.local(values)[0].to(matrix.dtype))
            if matrix.untyped_storage().data_ptr() != part.untyped_storage().data_ptr():
                part.copy_(self.form.stored(matrix))  # channels_last has no (out, in) view
        else:
            mine = (at >= held.start) & (at < held.stop)  # the part held is some of the columns
            part.index_copy_(0, at[mine] - held.start, shard.whole(values)[:, mine].t().to(part.dtype))

    @property
    def _out_first(self) -> bool:
        """Whether axis 0, along which weights are sharded, is that of the outputs."""
        return not isinstance(self.form, (TransposedForm, EmbeddingForm))

    def _add(self, delta: Callable[[slice], Tensor]) -> None:
        part, held = shard.local(self.weight)
        if type(self.form) is Form:  # axis 0 is out: ask for the rows held, a block at a time
            for block in blocks(held, self.in_features):
                here = part[block.start - held.start : block.stop - held.start]
                here.copy_(_sum(here, delta(block)))
        else:
            here = part
            here.copy_(_sum(here, self.form.stored(delta(slice(None)))[held]))

    @torch.no_grad()
    def rewrite_(self, how: Callable[[Tensor], None]) -> None:
        self.changed = True
        how(self.weight)

    def takes(self, delta: Tensor) -> bool:
        """Whether a change of this kind can be added to the weight as it is stored: in its order, whole, unrounded."""
        weight = self._parameters["weight"]  # events ask this of every layer: not by nn.Module's look-up
        assert weight is not None
        plain = type(self.form) is Form and self.tenant is None and not shard.is_sharded(weight)
        return plain and (weight.dtype, weight.device) == (delta.dtype, delta.device)

    def restore(self) -> nn.Module:
        return self._layer[0]


class Slab(Base):
    """One stack of expert matrices, (experts, out, in), that stays a parameter of the module that multiplies it."""

    def __init__(self, module: nn.Module, parameter: str, form: Form):
        super().__init__()
        self.form, self.parameter = form, parameter
        self._module = (module,)
        self.out_features, self.in_features = form.matrix(self.weight).shape[-2:]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        weight: Tensor = getattr(self._module[0], self.parameter)
        return weight

    @property
    def bias(self) -> None:  # type: ignore[override]
        return None

    @property
    def packed(self) -> tuple[Tensor, ...]:
        return (self.form.matrix(self.weight),)

    def rows(self, rows: slice = slice(None)) -> Tensor:
        return self.form.matrix(shard.whole(self.weight))[:, rows, :].clone()

    def _add(self, delta: Callable[[slice], Tensor]) -> None:
        part, held = shard.local(self.weight)
        part.copy_(_sum(part, self.form.stored(delta(slice(None)))[held]))


storages: list[Callable[[nn.Module], type[Base] | None]] = []
"""Who knows layers in another storage: each says what base such a layer gets, or None."""


def storage_of(module: nn.Module) -> type[Base] | None:
    """The base that a layer in a storage of its own gets; None if it is in none that is known."""
    return next((found for find in storages if (found := find(module)) is not None), None)


def _sum(weight: Tensor, delta: Tensor) -> Tensor:
    """weight + delta in the wider of the two dtypes; the caller's copy rounds once."""
    delta = delta.to(weight.device)
    return weight.to(torch.promote_types(weight.dtype, delta.dtype)) + delta


@contextlib.contextmanager
def exactly(device: torch.device) -> Iterator[None]:
    """Products as exact as their dtype for a ``with`` block, whatever autocast and TF32 would make of them."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    narrow = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    with torch.autocast(device.type, enabled=False) if narrow else contextlib.nullcontext():
        matmul.fp32_precision = "ieee"
        try:
            yield
        finally:
            matmul.fp32_precision = before


@torch.no_grad()
def add_products_(bases: Sequence[Base], left: Tensor, right: Tensor) -> None:
    """W += left @ right for many layers of one shape, (L, out, k) and (L, k, in) in fp32 or wider; rounds once.

    Plain weights take it together, a few launches for all; any other takes :meth:`Base.add_`. Under sharding every rank
    must call this, with all rows.
    """
    if not all(isinstance(base, Dense) and base.takes(left) for base in bases):
        for base, a, b in zip(bases, left, right, strict=True):
            base.add_(lambda rows, a=a, b=b: a[rows] @ b)  # type: ignore[misc]
        return
    count = max(1, _BLOCK // max(1, left.shape[1] * right.shape[2]))
    with exactly(left.device):
        for start in range(0, len(bases), count):
            some = slice(start, start + count)
            products = torch.bmm(left[some], right[some]).unbind()
            torch._foreach_add_([base.weight for base in bases[some]], products)
    for base in bases:
        if not base.changed:
            base.changed = True


def blocks(rows: slice, width: int) -> Iterator[slice]:
    """Cut a range of rows of ``width`` elements into blocks of bounded size."""
    step = max(1, _BLOCK // max(1, width))
    for start in range(rows.start, rows.stop, step):
        yield slice(start, min(start + step, rows.stop))
