"""Layers that read one input, multiplied together: q, k and v; gate and up; or one layer alone.

Of a group the input is read once where its layers' own forwards would read it once each, for the base and for the
adapters. Weights that lie one behind the other in memory (see :func:`join`) take one GEMM. What adapters add is handed
on as low-rank terms (Z, B), for the kernel that reads the product next to add Z Bᵀ there; and what DoRA makes of the
sum as gains (:func:`rankshift.ops.skinny.gains`), for the same kernel to multiply by.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor, nn

from rankshift.core.adapter import Columns, LowRank
from rankshift.core.base import Base, Dense, Format, Plain, storage_of
from rankshift.core.form import Form
from rankshift.core.site import Site, form_of
from rankshift.ops.products import accumulate, into
from rankshift.ops.skinny import down_back, gains, pack, up_gradient

Low = tuple[Tensor, Tensor]
"""(Z, B) for Z Bᵀ, or (S, A) for S A."""

WIDEST = 128  # rank up to which a term is added by whoever reads the product next; wider ones have a GEMM of their own
ROUND = 16  # numbers in a row come in multiples of this where kernels read them several at once
NEAR = 40 << 20  # bytes that a GPU's cache still has when the next kernel comes: adding onto more costs a pass over it
DEEPEST = 192  # rows of A up to which they stand below the weights; more would cost as much as by themselves


def base_of(module: nn.Module) -> Base | None:
    """The base of a linear layer, adapted or not; None if it is no layer that can stand in a group."""
    if isinstance(module, Site):
        return module.base if type(module.spec.form) is Form else None
    if (known := storage_of(module)) is not None:
        return known.over(module)
    return Dense(module, Form()) if type(form_of(module)) is Form else None


def term_of(module: nn.Module) -> LowRank | Columns | str | None:
    """What stands on the base of a layer, or why only its own forward knows."""
    if not isinstance(module, Site) or not module.active:
        return None
    if len(module.active) > 1:
        return "several adapters act at once"
    adapter = module[module.active[0]]
    term = adapter.term()
    if term is None:
        return f"{type(adapter).__name__} is more than a low-rank term beside a weight"
    return term


class Group:
    """Layers that read one input, as they are in one forward. All tensors are (T, …)."""

    def __init__(
        self,
        bases: Sequence[Base],
        terms: Sequence[LowRank | Columns | None],
        slot: int = 0,
        apart: bool = False,
    ):
        """
        Args:
            slot: how many rows of room :func:`join` made below the weights.
            apart: take x Aᵀ by itself, as a backward must that has x again but not the product.
        """
        self.bases, self.terms, self.slot, self.apart = bases, terms, slot, apart
        self.widths = [base.out_features for base in bases]
        self.low: list[tuple[int, LowRank]] = []  # which layer, its term: of those that have a low-rank one
        self.factors: list[Tensor] = []  # what autograd follows: A and B, or D, of each layer; then magnitudes
        for i, term in enumerate(terms):
            if isinstance(term, LowRank):
                self.low.append((i, term))
                self.factors += (term.A, term.B)
            elif term is not None:
                self.factors.append(term.D)
        self.magnitudes = [term.magnitude if isinstance(term, LowRank) else None for term in terms]
        self.scaled = any(magnitude is not None for magnitude in self.magnitudes)  # their bias then comes with a gain
        self.factors += [magnitude for magnitude in self.magnitudes if magnitude is not None]
        self.biases = [None if self.scaled else base.bias for base in bases]
        ranks = [term.A.shape[0] for _, term in self.low]
        self.rank = max(ranks, default=0)  # narrower ones are filled up with zeros
        self.filled = len(ranks) < len(terms) or min(ranks) < self.rank
        self.shared = not self.filled and self._one_down()
        self.steps = [sum(self.widths)] if self.shared else self.widths  # widths as the low-rank products see them
        scales = {term.scale for term in terms if term is not None}
        # s of all layers; 1 where they differ, and gradients are then scaled layer by layer
        self.scale = scales.pop() if len(scales) == 1 else 1.0
        self.packed = [base.packed for base in bases]
        self.weights = [tensor for tensors in self.packed for tensor in tensors]  # what holds them, layer by layer
        self._joined: tuple[list[int], list[Tensor]] | None = None

    def _one_down(self) -> bool:
        """Whether all layers have one A between them, as VeRA's have: then they are one layer of the summed width."""
        first = self.low[0][1].A
        return all(term.A.data_ptr() == first.data_ptr() and term.A.shape == first.shape for _, term in self.low)

    # ---- products with the bases

    def times(
        self, x: Tensor, A: Tensor | None = None, deep: Tensor | None = None, there: bool = False
    ) -> list[Tensor]:
        """x (T, K) Wᵀ + bias of each layer, (T, N): new tensors, slices of one if there is one product for all.

        Args:
            A: (R, K): x Aᵀ (T, R) is the last of them then, of the same product if ``deep`` is given.
            deep: the weights with room for A below them, (ΣN + R, K).
            there: A stands there already.
        """
        one = self._as_one(self.weights) if deep is None else (Plain(), [deep])
        if one is None:
            parts = zip(self.bases, self.packed, strict=True)
            ys = [base.format.times(x, bias, *packed) for (base, packed), bias in zip(parts, self.biases, strict=True)]
        else:
            widths = self.widths if deep is None else [*self.widths, len(deep) - sum(self.widths)]
            if A is not None and deep is not None and not (there and deep is self.deep):
                deep[sum(self.widths) :] = A
            ys = list(one[0].times(x, self._bias(x, widths), *one[1]).split_with_sizes(widths, 1))
        if A is not None and deep is None:
            ys.append(x @ A.t())
        return ys

    def _bias(self, x: Tensor, widths: Sequence[int]) -> Tensor | None:
        """Of all layers, zeros where there is none; None if no layer has one."""
        if len(widths) == 1 or all(bias is None for bias in self.biases):
            return self.biases[0]
        found = [x.new_zeros(n) if b is None else b.to(x.dtype) for n, b in zip_longest(widths, self.biases)]
        return torch.cat(found)

    @cached_property
    def deep(self) -> Tensor | None:
        """The weights as they stand and the rows below them that A goes to, (ΣN + R, K); None where there is no such
        room: their memory is no longer these rows and the room; or they are of other ranks than when joined."""
        rank = self.rank * len(self.steps)
        if self.apart or self.filled or not _goes_below(sum(self.widths), rank) or rank > self.slot:
            return None
        formats = [base.format for base in self.bases]
        found = self._as_they_lie(formats, self.weights) if isinstance(formats[0], Plain) else None
        if found is None:
            return None
        (W,) = found
        room = self.slot * W.shape[1] * W.element_size()
        if W.storage_offset() or W.untyped_storage().nbytes() != W.nbytes + room:
            return None
        # a version of its own: to write A is no change of the weights that autograd keeps
        return W.data.as_strided((len(W) + rank, W.shape[1]), W.stride())

    def _with_room(self, rank: int) -> Tensor | None:
        """:attr:`deep`; of weights that are unpacked for each product, memory with room for A below them."""
        formats = [base.format for base in self.bases]
        below = _goes_below(sum(self.widths), rank)
        if self.deep is not None or not below or any(type(f).fill is Format.fill for f in formats):
            return self.deep
        return self._unpacked(self.weights, rank)

    def back(self, dY: Tensor, weights: Sequence[Tensor], low: Low | None = None) -> list[Tensor]:
        """What sums to Σ dYᵢ Wᵢ + S A, (T, K) each, of the layers' gradients side by side, (T, ΣN): one tensor, but for
        formats that multiply by themselves and do not lie in one piece, and then one for a layer at most.

        Args:
            weights: as they were kept.
            low: S (T, R) and A (R, K).
        """
        one = self._as_one(weights, backward=True)
        if one is not None and isinstance(one[0], Plain):
            (W,) = one[1]
            if low is not None and dY.element_size() * len(dY) * W.shape[1] > NEAR:
                return [accumulate(low[0] @ low[1], dY, W)]
        if one is not None:
            dX = one[0].back(dY, *one[1])
            return [dX if low is None else accumulate(dX, *low)]
        found: list[Tensor] = []
        if low is not None and isinstance(self.bases[0], Dense):
            found, low = [low[0] @ low[1]], None
        parts = zip(self.bases, self._apart(weights), dY.split_with_sizes(self.widths, 1), strict=True)
        for base, packed, part in parts:
            if found and isinstance(base, Dense):
                found[-1].addmm_(part, packed[0])
            else:
                found.append(base.format.back(part, *packed))
        if low is not None:
            accumulate(found[0], *low)
        return found

    def _apart(self, weights: Sequence[Tensor]) -> list[list[Tensor]]:
        """Those of each layer."""
        rest = iter(weights)
        return [[next(rest) for _ in packed] for packed in self.packed]

    def _as_one(self, weights: Sequence[Tensor], backward: bool = False) -> tuple[Format, Sequence[Tensor]] | None:
        """A layer of all outputs in the place of these: their tensors as they lie, or unpacked into one weight."""
        if len(self.bases) == 1:
            return self.bases[0].format, weights
        formats = [base.format for base in self.bases]
        found = self._as_they_lie(formats, weights)
        if found is not None and not (backward and len(found) < len(self.packed[0])):
            return formats[0].grown(sum(self.widths)), found
        if any(format.multiplies or isinstance(format, Plain) for format in formats):
            return None
        return Plain(), [self._unpacked(weights)]

    def _unpacked(self, weights: Sequence[Tensor], room: int = 0) -> Tensor:
        """All weights, one below the other, and as many rows for others to fill: (ΣN + room, K)."""
        base, out = self.bases[0], sum(self.widths)
        W = torch.empty(out + room, base.in_features, dtype=base.dtype, device=weights[0].device)
        parts = zip(self.bases, self._apart(weights), W[:out].split_with_sizes(self.widths), strict=True)
        for base, packed, rows in parts:
            base.format.fill(rows, *packed)
        return W

    def _as_they_lie(self, formats: Sequence[Format], weights: Sequence[Tensor]) -> list[Tensor] | None:
        """What :func:`joined` finds, looked for once if the backward is given what the forward had."""
        places = [tensor.data_ptr() for tensor in weights]
        if self._joined is not None and self._joined[0] == places:
            return self._joined[1]
        found = joined(formats, self._apart(weights))
        if found is not None:
            self._joined = places, found
        return found

    # ---- low-rank terms

    def room(
        self, like: Tensor, sources: list[Tensor], scales: list[float], targets: list[Tensor]
    ) -> tuple[Tensor, ...]:
        """A's one below the other, (R, K), and s·B's, (ΣN, r), in the dtype of ``like``: what they are to be made of is
        noted in the lists."""
        r = self.rank
        new = like.new_zeros if self.filled else like.new_empty
        A, B = new(r * len(self.steps), self.bases[0].in_features), new(sum(self.widths), r)
        downs, ups = A.split_with_sizes([r] * len(self.steps)), B.split_with_sizes(self.widths)
        places = [downs]
        if self.deep is not None:  # for this forward alone: backwards read the A that is kept
            places.append(self.deep[sum(self.widths) :].split_with_sizes([r] * len(self.steps)))
        for i, term in self.low:
            own = term.A.shape[0]
            for rows in () if self.shared and i else places:
                sources.append(term.A)
                scales.append(1.0)
                targets.append(rows[i] if own == r else rows[i][:own])
            sources.append(term.B)
            scales.append(term.scale)
            targets.append(ups[i] if own == r else ups[i][:, :own])
        return A, B

    def lows(self, Z: Tensor, B: Tensor) -> list[Low | None]:
        """What is to be added to the product of each layer."""
        if len(self.terms) == 1:
            return [(Z, B)]
        zs = (Z,) * len(self.terms) if self.shared else Z.split_with_sizes([self.rank] * len(self.terms), 1)
        found: list[Low | None] = [None] * len(self.terms)
        rows = B.split_with_sizes(self.widths)
        for i, _ in self.low:
            found[i] = zs[i], rows[i]
        return found

    def forward(
        self, x: Tensor, factors: tuple[Tensor, ...], again: bool = False
    ) -> tuple[list[Tensor], list[Low | None], tuple[Tensor, ...]]:
        """The products, what is still to be added to each, and what the backward wants kept: (A, B, Z), and with
        magnitudes their gain (see :func:`gain_of`), or nothing.

        Args:
            x: (T, K).
            factors: of this group, by :func:`packed`; and their gain, if there is one from an earlier forward.
            again: they are those of an earlier forward.
        """
        if not factors:
            ys = self.times(x)
            return ys, [None] * len(ys), ()
        A, B, *gain = factors
        deep = None if self.apart else self._with_room(len(A))
        if self.scaled and not gain:
            gain = [gains(self._dense(deep), A, B, self.widths, self.magnitudes, [base.bias for base in self.bases])]
        one = self._as_one(self.weights) if self.rank > WIDEST else None
        if one is not None and isinstance(one[0], Plain) and all(bias is None for bias in self.biases):
            ys, Z = self._wide(x, A, B, one[1][0])
            return ys, [None] * len(ys), (A, B, Z, *gain)
        *ys, Z = self.times(x, A, deep, there=not again)
        if len(ys) == 1:
            Z = Z.contiguous()  # kept, when the product is not
        lows = self.lows(Z, B)
        if self.rank > WIDEST:
            for y, low in zip(ys, lows, strict=True):
                if low is not None:
                    y.addmm_(low[0], low[1].t())
            lows = [None] * len(ys)
        return ys, lows, (A, B, Z, *gain)

    def _dense(self, deep: Tensor | None) -> Sequence[Tensor]:
        """The weights: one for all layers, or one of each."""
        one = self._as_one(self.weights) if deep is None else (Plain(), [deep[: sum(self.widths)]])
        if one is not None and isinstance(one[0], Plain):
            return one[1]
        return [base.format.dense(*packed) for base, packed in zip(self.bases, self.packed, strict=True)]

    def _wide(self, x: Tensor, A: Tensor, B: Tensor, W: Tensor) -> tuple[list[Tensor], Tensor]:
        """The products and Z, where the terms come first and x Wᵀ is added onto them."""
        Z = x @ A.t()
        y = x.new_empty(len(x), len(W))
        ys = list(y.split_with_sizes(self.widths, 1))
        if self.shared:
            torch.mm(Z, B.t(), out=y)
        else:
            for part, low in zip(ys, self.lows(Z, B), strict=True):
                part.zero_() if low is None else torch.mm(low[0], low[1].t(), out=part)
        accumulate(y, x, W.t())
        return ys, Z

    def down(
        self, dY: Tensor, B: Tensor, Z: Tensor | None, normed: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """S = dY B (T, R), and where Z is given the gradient of the packed B, s · dYᵀ Z (ΣN, r).

        Args:
            normed: ρ (T,) and where ρ S is written.
        """
        return down_back(dY, B, Z, self.steps, self.scale, normed)

    def asked(self, needs: Sequence[bool]) -> tuple[bool, bool]:
        """Whether any A and whether any B wants a gradient, if ``needs`` says it of each of :attr:`factors`."""
        pairs = 2 * len(self.low)
        return any(needs[:pairs:2]), any(needs[1:pairs:2])

    def gradients(
        self, dA: Tensor | None, dB: Tensor | Sequence[Tensor] | None, dm: Tensor | None = None
    ) -> list[Tensor | None]:
        """Those of :attr:`factors`, out of the packed ones; ``dB`` whole, or layer by layer; ``dm`` (ΣN,), of
        magnitudes."""
        r, many = self.rank, len(self.terms) > 1
        downs = None if dA is None else dA.split_with_sizes([r] * len(self.steps))
        ups = dB if not isinstance(dB, Tensor) else dB.split_with_sizes(self.widths) if many else (dB,)
        found: list[Tensor | None] = []
        for i, term in self.low:
            own = term.A.shape[0]
            down = None if downs is None or (self.shared and i) else downs[i]
            up = None if ups is None else ups[i]
            if own < r:
                down, up = None if down is None else down[:own], None if up is None else up[:, :own]
            found += _in(down, term.A.dtype), _in(up, term.B.dtype, self._left(term))
        if dm is not None:
            parts = zip(dm.split_with_sizes(self.widths), self.magnitudes, strict=True)
            found += [_in(part, magnitude.dtype) for part, magnitude in parts if magnitude is not None]
        return found

    def _left(self, term: LowRank | Columns) -> float:
        """What a gradient is still to be multiplied by that has been by :attr:`scale`."""
        return term.scale if self.scale == 1.0 else 1.0

    # ---- columns of the weights

    @property
    def channels(self) -> tuple[Tensor, ...]:
        """Those of each layer whose weight has columns that train."""
        return tuple([term.channels for term in self.terms if isinstance(term, Columns)])

    def column_gradients(self, dY: Tensor, x: Tensor) -> list[Tensor | None]:
        """s · dYᵢᵀ x of each D, (out, r), where ``x`` (T, Σr) are the inputs in these channels times :attr:`scale`."""
        terms = [term for term in self.terms if isinstance(term, Columns)]
        ranks = [len(term.channels) for term in terms]
        if len(terms) == len(self.terms) and len(set(ranks)) == 1:
            parts: Sequence[Tensor] = up_gradient(dY, x, self.widths).split_with_sizes(self.widths)
        else:
            dYs = zip(self.terms, dY.split_with_sizes(self.widths, 1), strict=True)
            of = [part for term, part in dYs if isinstance(term, Columns)]
            xs = x.split_with_sizes(ranks, 1)
            parts = [into(d.t(), z, term.D.dtype) for d, z, term in zip(of, xs, terms, strict=True)]
        return [_in(dD, term.D.dtype, self._left(term)) for dD, term in zip(parts, terms, strict=True)]


def gain_of(terms: Sequence[Tensor]) -> Tensor | None:
    """What a group's products with their terms are still to be scaled by, (G, ΣN), of what its forward kept."""
    return terms[3] if len(terms) > 3 else None


def packed(groups: Sequence[Group], like: Tensor) -> list[tuple[Tensor, ...]]:
    """A and s·B of each group, as :meth:`Group.room` says, by one launch; () of one without low-rank terms."""
    sources: list[Tensor] = []
    scales: list[float] = []
    targets: list[Tensor] = []
    found = [group.room(like, sources, scales, targets) if group.low else () for group in groups]
    if sources:
        pack(sources, scales, targets)
    return found


def _in(gradient: Tensor | None, dtype: torch.dtype, scale: float = 1.0) -> Tensor | None:
    if gradient is None or (gradient.dtype == dtype and scale == 1.0):
        return gradient
    return gradient.to(dtype) if scale == 1.0 else (gradient * scale).to(dtype)


# ---- tensors in one piece of memory


def joined(formats: Sequence[Format], apart: Sequence[Sequence[Tensor]]) -> list[Tensor] | None:
    """The tensors of a layer of all outputs, as views of what the layers have; None where they do not lie so."""
    if not _alike(formats):
        return None
    found = [_behind([tensors[i] for tensors in apart]) for i in range(formats[0].stacks)]
    return None if any(t is None for t in found) else [t for t in found if t is not None]


def _goes_below(out: int, rank: int) -> bool:
    """Whether products with A (rank, K) below weights (out, K) have rows that are read at full speed, and few more
    columns."""
    return 0 < rank <= DEEPEST and (out + rank) % ROUND == 0


def _alike(formats: Sequence[Format]) -> bool:
    """Whether tensors of these formats may stand one below the other."""
    return formats[0].stacks > 0 and all(format.grown(0) == formats[0].grown(0) for format in formats)


def _behind(tensors: Sequence[Tensor]) -> Tensor | None:
    """What tensors make that lie one behind the other, without a copy."""
    first = tensors[0]
    at, storage = first.data_ptr(), first.untyped_storage()
    for t in tensors:
        if t.data_ptr() != at or not t.is_contiguous() or t.dtype != first.dtype or t.shape[1:] != first.shape[1:]:
            return None
        at += t.nbytes
    if at - storage.data_ptr() > storage.nbytes():  # neighbours by chance
        return None
    shape = (sum(t.shape[0] for t in tensors), *first.shape[1:])
    return first.detach().as_strided(shape, first.stride(), first.storage_offset())


@torch.no_grad()
def join(bases: Sequence[Base], terms: Sequence[LowRank | Columns | str | None] = ()) -> int:
    """Move tensors that can lie so into one piece of memory, bit for bit; below dense weights with room for the A's of
    the terms that stand on them. Returns how many rows that is: nobody but the weights holds that memory."""
    formats, apart = [base.format for base in bases], [base.packed for base in bases]
    ranks = [len(term.A) for term in terms if isinstance(term, LowRank)]
    below = ranks == ranks[:1] * len(bases) and _goes_below(sum(base.out_features for base in bases), sum(ranks))
    room = sum(ranks) if below and isinstance(formats[0], Plain) else 0
    if (len(bases) == 1 and not room) or not _alike(formats):
        return 0
    made = 0
    for i in range(formats[0].stacks):
        tensors = [packed[i] for packed in apart]
        kinds = {(t.dtype, t.device, t.shape[1:]) for t in tensors}
        if len(kinds) > 1 or tensors[0].is_meta or (not room and _behind(tensors) is not None):
            continue
        heights = [t.shape[0] for t in tensors]
        whole = tensors[0].new_empty(sum(heights) + room, *tensors[0].shape[1:], requires_grad=False)
        for t, rows in zip(tensors, whole[: sum(heights)].split_with_sizes(heights), strict=True):
            rows.copy_(t.detach())
            t.data = rows
        made = room
    return made


@torch.no_grad()
def part(bases: Sequence[Base]) -> None:
    """Give each of those tensors memory of its own again."""
    for base in bases:
        for tensor in base.packed[: base.format.stacks]:
            if tensor.untyped_storage().nbytes() > tensor.nbytes:
                tensor.data = tensor.detach().clone()
