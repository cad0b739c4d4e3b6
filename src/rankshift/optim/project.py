"""Project: Adam in a subspace of each weight's gradient, which is renewed now and then. GaLore, AdaRankGrad, Fira.

For G (out, in), seen from the side that is projected as A (l, s) — G itself, or Gᵀ for the output side:

    now and then  Q ← leading right singular directions of A, (s, r): a fixed number, or the fewest that keep a share
                  m, v ← in the new basis (:func:`rankshift.optim.subspace.transport`)
    always        X = A Q, (l, r)
                  m ← β1 m + (1−β1) X,  v ← β2 v + (1−β2) X²,  c ← β2 c + (1−β2)
                  N = (m / (1−β1ᵗ)) / (√(v / c) + ε)
                  W ← (1 − lr·wd) W − lr·α·N Qᵀ

c, one number a direction, is how much of the average v has been filled: 1 − β2ᵗ for a direction that was always there,
0 for one that was never seen; without it a new direction would be stepped along several times too far.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from rankshift.core import shard
from rankshift.core.errors import ConfigError
from rankshift.core.form import EmbeddingForm, Form, TransposedForm
from rankshift.core.random import Key, signed
from rankshift.ops.products import into
from rankshift.optim import rounding, subspace
from rankshift.optim.moments import Store, Wide, adopt
from rankshift.optim.rounding import Rounding
from rankshift.optim.subspace import Finder, Transport
from rankshift.optim.transform import Hyper

TOGETHER = 1 << 27  # elements of the gradients that are decomposed at once
AT_ONCE = 1 << 24  # numbers of projected gradients that are stepped at once
_FIRST = 5  # updates after a renewal whose mean gradient is the measure of convergence
_MOMENTS = 5  # in a period at which tensors are renewed, where that is spread: what is due together is cheaper
_FADE = 0.9  # of the running mean that is compared with it
_NEVER = 1 << 62  # updates


@dataclass(frozen=True)
class Clock:
    """When a basis is renewed: every so many updates, or earlier, once training inside the subspace has converged.

    Converged: the running mean of ‖X‖ is at most ``kappa`` times what it was just after the renewal.
    """

    every: int = 200
    """Updates between two renewals, at most. ∞ is 0: never again after the first."""
    earliest: int | None = None
    """Updates before which no convergence is looked for; None: the clock alone."""
    kappa: float = 0.5
    look: int = 10
    """Updates between two looks: one transfer to the host each."""
    stagger: bool = True
    """Spread the second renewal of all tensors over the first ``every`` updates, at five moments at most, so that no
    update has them all; False renews all at once, as GaLore does."""

    def wait(self, place: tuple[int, int] | None = None) -> int:
        """Updates between two renewals; with ``place``, between the first two of one tensor of so many."""
        if not self.every:
            return _NEVER
        index, count = place if place is not None and self.stagger else (1, 1)
        moments = min(count, self.every, _MOMENTS)
        return -(-self.every * -(-index * moments // count) // moments)


@dataclass(frozen=True)
class Turn:
    """Tensors of one shape whose bases are renewed together."""

    ps: Sequence[Tensor]
    states: Sequence[dict[str, Tensor]]
    olds: Sequence[Tensor]  # (…, s, r) each, the bases until now
    found: subspace.Basis  # (n, …): the new ones

    def some(self, indices: list[int]) -> Turn:
        """Those at some places."""
        found = subspace.Basis(*(t[indices] for t in (self.found.vectors, self.found.energies, self.found.total)))
        ps, states, olds = (
            [self.ps[i] for i in indices],
            [self.states[i] for i in indices],
            [self.olds[i] for i in indices],
        )
        return Turn(ps, states, olds, found)


@dataclass(frozen=True)
class Project:
    """A transform for weights; what its fields choose is described where they are typed."""

    rank: int
    energy: float | None = None  # the share of ‖A‖² to keep; None: the rank is fixed
    min_rank: int = 1
    multiple: int = 1  # ranks chosen by energy are multiples of this
    clock: Clock = field(default_factory=Clock)
    finder: Finder = "eigh"
    oversample: int = 8  # directions of a sketch beside those that are kept
    power: int = 0  # iterations of "range" after the first
    transport: Transport = "none"
    residual: bool = False  # Fira: what lies outside the subspace goes along, scaled as Adam scaled what lies inside
    side: str = "smaller"  # of W, to project: "smaller" | "larger" | "in"
    scale: float = 1.0
    form: Form = field(default_factory=Form)
    store: Store = field(default_factory=Wide)
    rounding: Rounding = "nearest"  # of weights in bf16 and fp16

    # ---- geometry

    def face(self, p: Tensor) -> tuple[tuple[int, ...], bool]:
        """(…, l, s) of a whole parameter, and whether its input side is projected; of equal sides it is."""
        *batch, out, into = self.form.matrix(torch.empty(p.shape, device="meta")).shape
        on_input = self.side == "in" or out == into or (into < out) == (self.side == "smaller")
        return ((*batch, out, into) if on_input else (*batch, into, out)), on_input

    def facing(self, p: Tensor, stored: Tensor) -> Tensor:
        """A tensor stored as ``p`` is, or this rank's part of one, as A."""
        matrix = self.form.matrix(stored)
        return matrix if self.face(p)[1] else matrix.mT

    def split(self, p: Tensor) -> str:
        """Which part of A other ranks hold: "" none, "rows", "columns", or "batch" for whole matrices."""
        if not shard.is_sharded(p):
            return ""
        if self.form.stacked:
            return "batch"
        by_out = not isinstance(self.form, (TransposedForm, EmbeddingForm))
        return "rows" if by_out == self.face(p)[1] else "columns"

    def limit(self, p: Tensor) -> int:
        """The largest rank of a parameter: ``rank``, or what its sides allow."""
        return min(self.rank, *self.face(p)[0][-2:])

    # ---- state

    def init(
        self, p: Tensor, key: Key | None = None, rank: int | None = None, place: tuple[int, int] = (1, 1)
    ) -> dict[str, Tensor]:
        """Counters, on the CPU; basis (…, s, r) and moments (…, l, r) of zeros, in the rank of now.

        Basis and mass are held whole on every rank, moments as the rows of A are.
        """
        rank = self.limit(p) if rank is None else rank
        wide, device = torch.promote_types(p.dtype, torch.float32), p.device
        counters = ("step", "born", "renewed", "renewals", "next")
        state = {name: torch.zeros((), dtype=torch.int64) for name in counters}
        state["even"] = torch.ones((), dtype=torch.int64)  # whether all directions were seen as often: c = 1 − β2ᵗ
        state["next"].fill_(self.clock.wait(place) - self.clock.wait())  # ≤ 0: how much sooner the second renewal is
        state["key"] = torch.tensor(signed((Key(0) if key is None else key / "basis").word), dtype=torch.int64)
        state |= self._sized(p, rank) | rounding.init(p, self.rounding)
        state["energy"] = torch.zeros((), dtype=wide, device=device)  # E(r) at the last renewal
        if self.clock.earliest is not None:
            state["pace"] = torch.zeros(2, dtype=wide, device=device)  # mean ‖X‖² now, and just after the renewal
        if self.residual:
            state["limit"] = torch.zeros((), dtype=wide, device=device)  # norm of the last residual
        return state

    def adopt(self, p: Tensor, saved: dict[str, Tensor], fresh: dict[str, Tensor]) -> list[str]:
        if "basis" not in saved:
            raise ConfigError("it is that of plain AdamW, and here its gradient is projected.")
        mine, theirs = fresh["basis"].shape, saved["basis"].shape
        if mine != theirs:
            raise ConfigError(
                f"its basis is {tuple(theirs)} and would be {tuple(mine)}: another side was projected, or the layer "
                "had another shape."
            )
        *batch, length, _ = self.face(p)[0]
        changed = self._taken(p, saved, fresh, (*batch, length, mine[-1]))
        if self.energy is None and mine[-1] != self.limit(p):
            lost = "; its moments begin anew there" if self.transport == "none" else ""
            changed.append(f"rank {mine[-1]} until the next renewal, then {self.limit(p)}{lost}")
        return changed

    def _taken(
        self, p: Tensor, saved: dict[str, Tensor], fresh: dict[str, Tensor], shape: tuple[int, ...]
    ) -> list[str]:
        """Fill a new state with moments of this shape; the clock is this one's."""
        sooner = fresh["next"].clone()
        changed = adopt(self.store, saved, fresh, shape, p, self.split(p) in ("rows", "batch"))
        step, wait = int(fresh["step"]), self.clock.wait()
        if not begun(fresh):
            fresh["next"].copy_(sooner)
        elif int(fresh["next"]) > step + wait or (not self.clock.every and step < int(fresh["next"]) < _NEVER):
            fresh["next"].fill_(step + wait)  # a longer wait, from another clock
        if "pace" in fresh and "pace" not in saved:
            fresh["renewed"].fill_(step)  # what is compared with begins now
        return changed

    # ---- a step

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        hyper: Hyper,
    ) -> None:
        due = [i for i, state in enumerate(states) if _due(state)]
        totals: dict[int, Tensor] = {}
        if due:
            mine, theirs, kept = [parameters[i] for i in due], [gradients[i] for i in due], [states[i] for i in due]
            totals = {due[i]: total for i, total in self.renew(mine, theirs, kept, hyper).items()}
        seen: list[Tensor] = []
        sizes = [
            p.numel() * state["basis"].shape[-1] // self.face(p)[0][-1]
            for p, state in zip(parameters, states, strict=True)
        ]
        for batch in subspace.together(sizes, AT_ONCE):
            ps, ss = [parameters[i] for i in batch], [states[i] for i in batch]
            As = [self.facing(p, shard.held(gradients[i])) for i, p in zip(batch, ps, strict=True)]
            Xs = [self.project(A, p, state) for A, p, state in zip(As, ps, ss, strict=True)]
            for i, X, p, state in zip(batch, Xs, ps, ss, strict=True):
                if i in totals:
                    self.tell([state], X.square().sum((-2, -1))[None], totals[i][None], p)
            for N, X, A, p, state in zip(self.adam(Xs, ss, hyper), Xs, As, ps, ss, strict=True):
                self.apply(N, X, A, p, state, hyper)
            if self.clock.earliest is not None:
                seen += [norm.square() for norm in torch._foreach_norm(Xs)]
        self.look(parameters, seen, states)

    def project(self, A: Tensor, p: Tensor, state: dict[str, Tensor]) -> Tensor:
        """X = A Q, for the rows of A held here."""
        Q = self.basis(p, state)
        # on a GPU a gradient of 16 bits stays that, and Q is rounded to it; sums are in fp32
        X = into(A, Q.to(A.dtype), Q.dtype) if A.is_cuda and A.dim() == 2 else A.to(Q.dtype) @ Q
        return shard.sum_like(X, p) if self.split(p) == "columns" else X

    def adam(self, Xs: Sequence[Tensor], states: Sequence[dict[str, Tensor]], hyper: Hyper) -> list[Tensor]:
        """N of projected gradients X, with the moments advanced: one launch for what all tensors share."""
        beta1, beta2 = hyper.betas
        store, Xs = self.store, list(Xs)
        masses = [shard.held(state["mass"]) for state in states]
        m, v = ([store.read(state, name) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_mul_(masses, beta2)
        torch._foreach_add_(masses, 1 - beta2)
        torch._foreach_lerp_(m, Xs, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, Xs, Xs, value=1 - beta2)
        ages = [int(state["step"]) - int(state["born"]) for state in states]
        if self.transport in ("none", "reset") and all(even(state) for state in states):
            below = list(torch._foreach_div(v, [1 - beta2**age for age in ages]))
        else:
            below = [average / mass[..., None, :] for average, mass in zip(v, masses, strict=True)]
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, hyper.eps)
        N = list(torch._foreach_div(m, below))
        torch._foreach_div_(N, [1 - beta1**age for age in ages])
        for name, averages in (("exp_avg", m), ("exp_avg_sq", v)):
            for state, average in zip(states, averages, strict=True):
                store.write(state, name, average)
        return N

    def apply(self, N: Tensor, X: Tensor, A: Tensor, p: Tensor, state: dict[str, Tensor], hyper: Hyper) -> None:
        """W ← (1 − lr·wd) W − lr·lift(N), rounded once."""
        here, decay = shard.held(p), 1 - hyper.lr * hyper.weight_decay
        viewed = self.facing(p, here).data_ptr() == here.data_ptr()  # not a weight with its channels last
        if self.residual or not viewed:
            weight, direction = rounding.opened(p, state), self.lift(N, X, A, p, state)
            direction = self.form.stored(direction if self.face(p)[1] else direction.mT)
            weight.mul_(decay).sub_(direction, alpha=hyper.lr)
        else:  # a product in 16 bits is summed in fp32 and rounded once, to the nearest
            weight = here if self.rounding == "nearest" else rounding.opened(p, state)
            view, basis = self.facing(p, weight), self.basis(p, state).to(weight.dtype)
            step = view.addmm_ if view.dim() == 2 else view.baddbmm_
            step(N.to(weight.dtype), basis.mT, beta=decay, alpha=-hyper.lr * self.scale)
        rounding.close(p, weight, state, self.rounding)

    def basis(self, p: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The rows of Q that go with the columns of A held here."""
        basis = shard.held(state["basis"])
        return basis[shard.local(p)[1]] if self.split(p) == "columns" else basis

    def lift(self, N: Tensor, X: Tensor, A: Tensor, p: Tensor, state: dict[str, Tensor]) -> Tensor:
        """α N Qᵀ, with Fira's residual where it is asked for; this rank's part of A's shape."""
        basis = self.basis(p, state)
        direction = self.scale * (N @ basis.mT)
        if not self.residual:
            return direction
        tiny = torch.finfo(X.dtype).tiny
        gain = N.norm(dim=-1, keepdim=True) / X.norm(dim=-1, keepdim=True).clamp(min=tiny)
        rest = gain * (A - X @ basis.mT)
        norm = (shard.sum_like(rest.square().sum(), p) if self.split(p) else rest.square().sum()).sqrt()
        bound = 1.01 * state["limit"]
        shrink = torch.where((state["limit"] > 0) & (norm > bound), bound / norm.clamp(min=tiny), torch.ones_like(norm))
        state["limit"].copy_(norm * shrink)
        direction += shrink * rest
        return direction

    # ---- renewal

    def renew(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        hyper: Hyper,
    ) -> dict[int, Tensor]:
        """A new basis for each, decided once for all ranks; the moments go along. At most one transfer to the host.

        Returns:
            ‖A‖² of those that have one now, (…), by index.
        """
        kinds = [
            (self.face(p)[0], self.split(p), p.dtype, p.device, begun(state))
            for p, state in zip(parameters, states, strict=True)
        ]
        turns, batches = [], subspace.alike(kinds, [p.numel() for p in parameters], TOGETHER)
        for batch in batches:
            ps, ss = [parameters[i] for i in batch], [states[i] for i in batch]
            olds = [shard.held(state["basis"]) for state in ss]
            turns.append(Turn(ps, ss, olds, self._find(ps, [gradients[i] for i in batch], ss)))
        totals: dict[int, Tensor] = {}
        for batch, turn, news in zip(batches, turns, self.enter(turns, hyper), strict=True):
            for i, state, new, total in zip(batch, turn.states, news, turn.found.total, strict=True):
                if new is not None:
                    shard.held(state["basis"]).copy_(new)
                    totals[i] = total
        return totals

    def tell(self, states: Sequence[dict[str, Tensor]], kept: Tensor, total: Tensor, p: Tensor) -> None:
        """Note the energy E(r) of new bases; of a stack the mean. A gradient of zeros says nothing.

        Args:
            kept: (n, …), ‖X‖² for the rows of A held here.
            total: (n, …), ‖A‖².
            p: one of the tensors.
        """
        split = self.split(p)
        share = subspace.captured(shard.sum_like(kept, p) if split == "rows" else kept, total)
        share = share[:, None].flatten(1).sum(1)
        share = shard.sum_like(share, p) if split == "batch" else share
        share = share / math.prod(self.face(p)[0][:-2])
        energies = [state["energy"] for state in states]
        torch._foreach_copy_(energies, list(torch.where(share > 0, share, torch.stack(energies)).unbind()))

    def rank_of(self, state: dict[str, Tensor]) -> int:
        """The rank of now."""
        return state["basis"].shape[-1]

    def _find(self, ps: Sequence[Tensor], gs: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> subspace.Basis:
        """Bases of gradients of one shape, equal on all ranks that hold a part of them."""
        split, wide = self.split(ps[0]), shard.held(states[0]["basis"]).dtype
        gather = split == "columns" or (split == "rows" and self.finder == "svd")
        parts = [shard.whole(g) if gather else shard.held(g) for g in gs]
        faces = [self.facing(p, part).to(wide) for p, part in zip(ps, parts, strict=True)]
        A = torch.stack(faces) if len(faces) > 1 else faces[0].contiguous()[None]  # one alone has the same bits
        del parts, faces
        olds = [shard.held(state["basis"]) for state in states] if begun(states[0]) else []
        found = self.seek(
            A, olds, [draw_word(int(state["key"]), state) for state in states], self.limit(ps[0]),
            (lambda part: shard.sum_like(part, ps[0])) if split == "rows" and not gather else (lambda part: part),
        )  # fmt: skip
        return agreed(found, ps[0], split == "batch")

    def seek(
        self,
        A: Tensor,
        olds: Sequence[Tensor],
        words: Sequence[int],
        most: int,
        reduce: Callable[[Tensor], Tensor] = lambda part: part,
    ) -> subspace.Basis:
        """Directions of matrices of one shape.

        Args:
            A: (n, …, l, s).
            olds: (…, s, r) each, the bases that are to be replaced, where "warm" begins; none the first time.
            words: of each, what random numbers are drawn by.
            most: the largest rank.
            reduce: as in :func:`rankshift.optim.subspace.find`.
        """
        if self.finder in ("svd", "eigh"):
            return subspace.find(A, most, self.finder, reduce=reduce)
        warm = bool(olds) and self.finder == "warm"
        s = A.shape[-1]
        width = min(s, most + self.oversample)
        # one for all matrices of a stack, of which other ranks hold others
        draws = [_draw(word, (s, width), A).expand(*A.shape[1:-2], s, width) for word in words]
        if warm:
            draws = [torch.cat(pair, -1)[..., :width] for pair in zip(olds, draws, strict=True)]
        power = 0 if warm else self.power
        return subspace.find(A, width, self.finder, begin=torch.stack(draws), power=power, reduce=reduce)

    def enter(self, turns: Sequence[Turn], hyper: Hyper) -> list[list[Tensor | None]]:
        """Put states into their new bases, which are returned; None: it has to wait for a gradient.

        At most one transfer to the host. A gradient of zeros says nothing: what was never renewed stays due, the rest
        keeps its rank.
        """
        wanted = [self._wanted(turn) for turn in turns]
        given = [numbers for numbers in wanted if numbers is not None]
        numbers = iter(torch.cat([n.to(given[0].device) for n in given]).tolist() if given else ())
        news: list[list[Tensor | None]] = []
        for turn, asked in zip(turns, wanted, strict=True):
            ranks = [self._rank(turn.ps[0], state, None if asked is None else next(numbers)) for state in turn.states]
            new: list[Tensor | None] = [None] * len(ranks)
            for rank in dict.fromkeys(ranks):
                some = [i for i, other in enumerate(ranks) if other == rank]
                part = turn if len(some) == len(ranks) else turn.some(some)
                for i, basis in zip(some, self._enter(part, rank, hyper) if rank else [None] * len(some), strict=True):
                    new[i] = basis
            news.append(new)
        return news

    def _wanted(self, turn: Turn) -> Tensor | None:
        """(n,) int64: the fewest directions that keep the energy of each, 0 for a gradient of zeros; None where that
        changes nothing."""
        if self.energy is None and begun(turn.states[0]):
            return None
        # of what got no gradient, as an expert without tokens, nothing is needed; a rank may hold no matrix of a stack
        needed = torch.where(turn.found.total > 0, subspace.needed(turn.found, self.energy or 1), 0)
        most = F.pad(needed[:, None].flatten(1), (0, 1)).amax(1)
        p = turn.ps[0]
        return shard.max_like(most, p) if self.split(p) == "batch" else most  # one rank for all matrices of a stack

    def _rank(self, p: Tensor, state: dict[str, Tensor], wanted: int | None) -> int:
        """The rank from now on, 0 where the basis has to wait for a gradient."""
        most = self.limit(p)
        if wanted == 0:
            return self.rank_of(state) if begun(state) else 0
        if wanted is None or self.energy is None:
            return most
        return subspace.rounded_up(max(wanted, min(self.min_rank, most)), self.multiple, most)

    def _enter(self, turn: Turn, rank: int, hyper: Hyper) -> list[Tensor]:
        """As :meth:`enter`, for those that have one rank from now on."""
        p, states, found = turn.ps[0], turn.states, turn.found
        vectors = self.fitted(found.vectors[..., :rank], p)
        if begun(states[0]):  # what got no gradient, as an expert without tokens, stays where it is
            kept = [_widened(old, new) for old, new in zip(turn.olds, vectors, strict=True)]
            vectors = torch.where((found.total > 0)[..., None, None], vectors, torch.stack(kept))
        news = list(vectors.unbind())
        for X, state, old, new in zip(turn.ps, states, turn.olds, news, strict=True):
            self._move(X, state, old, new, rank, hyper)
            sooner = 0 if begun(state) else int(state["next"])
            state["renewals"] += 1
            state["renewed"].copy_(state["step"])
            state["next"].copy_(state["step"] + (self.clock.wait() + sooner))
            if "pace" in state:
                state["pace"].zero_()
        return news

    def fitted(self, vectors: Tensor, p: Tensor) -> Tensor:
        """A basis as it is held."""
        return vectors

    def _move(self, p: Tensor, state: dict[str, Tensor], old: Tensor, new: Tensor, rank: int, hyper: Hyper) -> None:
        """Take the moments of one tensor from one basis to another."""
        first, resized = not begun(state), rank != self.rank_of(state)
        mass = shard.held(state["mass"])
        if not first and self.transport != "none":
            seen = 1 - hyper.betas[0] ** (int(state["step"]) - int(state["born"]))
            moments = subspace.Moments(self.store.read(state, "exp_avg"), self.store.read(state, "exp_avg_sq"), mass)
            moments = subspace.transport(moments, new.mT @ old, self.transport, seen)
            if resized:
                self.resize(p, state, rank)
            self.store.write(state, "exp_avg", moments.first)
            self.store.write(state, "exp_avg_sq", moments.second)
            shard.held(state["mass"]).copy_(moments.mass)
            state["even"].fill_(self.transport == "reset")
            if self.transport == "reset":
                state["born"].copy_(state["step"])
        elif first or resized:  # there is nothing to bring along, or it has no place there
            if resized:
                self.resize(p, state, rank)
            shard.held(state["mass"]).zero_()
            state["even"].fill_(1)
            state["born"].copy_(state["step"])

    def resize(self, p: Tensor, state: dict[str, Tensor], rank: int) -> None:
        """Make room for another rank; what was there is gone."""
        state |= self._sized(p, rank)

    def _sized(self, p: Tensor, rank: int) -> dict[str, Tensor]:
        """Fresh memory for what has the rank in its shape."""
        *batch, length, s = self.face(p)[0]
        split, wide = self.split(p), torch.promote_types(p.dtype, torch.float32)
        by_rows = split in ("rows", "batch")
        if by_rows and self.energy is not None:  # any rank that it may come to
            least = subspace.rounded_up(min(self.min_rank, self.limit(p)), self.multiple, self.limit(p))
            self.store.check((*batch, length, least), p)
        state = {"basis": shard.zeros((*batch, s, rank), p, wide, split == "batch")}
        state |= self.store.init("exp_avg", (*batch, length, rank), p, by_rows)
        state |= self.store.init("exp_avg_sq", (*batch, length, rank), p, by_rows)
        state["mass"] = shard.zeros((*batch, rank), p, wide, split == "batch")
        return state

    def look(self, parameters: Sequence[Tensor], sizes: Sequence[Tensor], states: Sequence[dict[str, Tensor]]) -> None:
        """Follow ‖X‖², and let those be renewed next whose training in the subspace has converged."""
        clock = self.clock
        if clock.earliest is None or not states:
            return
        device = sizes[0].device
        parts = torch.stack([size.to(device) for size in sizes])
        cut = [i for i, p in enumerate(parameters) if self.split(p) in ("rows", "batch")]
        if cut:
            parts[cut] = shard.sum_like(parts[cut], parameters[cut[0]])
        asked = []
        for size, state in zip(parts, states, strict=True):
            age = int(state["step"]) - int(state["renewed"])  # 1 in the update of the renewal
            now, after = state["pace"]
            size = size.to(now.device)
            now.copy_(size if age == 1 else now.lerp(size, 1 - _FADE))
            if age <= _FIRST:
                after.add_(size / _FIRST)
            ripe = age >= max(clock.earliest, _FIRST) and int(state["next"]) > int(state["step"])
            if ripe and int(state["step"]) % clock.look == 0:  # all in the same updates
                asked.append(state)
        if asked:
            pace = torch.stack([state["pace"].to(device) for state in asked])
            done = pace[:, 0] <= clock.kappa**2 * pace[:, 1]
            done = shard.from_rank_zero(done, parameters[0])
            for state, converged in zip(asked, done.tolist(), strict=True):
                if converged:
                    state["next"].copy_(state["step"])


def even(state: dict[str, Tensor]) -> bool:
    """Whether all directions were seen as often, so that c = 1 − β2ᵗ."""
    return bool(state["even"])


def begun(state: dict[str, Tensor]) -> bool:
    """Whether there is a basis that comes from a gradient."""
    return int(state["renewals"]) > 0


def _due(state: dict[str, Tensor]) -> bool:
    return int(state["step"]) >= int(state["next"])


def draw_word(key: int, state: dict[str, Tensor]) -> int:
    """What the random numbers of one tensor's coming renewal are drawn by."""
    return (key + int(state["renewals"]) * 0x9E3779B97F4A7C15) & ((1 << 63) - 1)


def agreed(found: subspace.Basis, p: Tensor, parts: bool) -> subspace.Basis:
    """What the first rank found, on all that hold ``p``; ``parts``: that hold the same part of it."""
    told = (found.vectors, found.energies, found.total)
    return subspace.Basis(*(shard.from_rank_zero(part, p, parts) for part in told))


def _widened(old: Tensor, new: Tensor) -> Tensor:
    """The old basis in the shape of the new one, for the matrices of a stack that got no gradient where others did."""
    if old.shape == new.shape or new.dim() == 2:
        return old if old.shape == new.shape else new
    Q: Tensor = torch.linalg.qr(torch.cat([old, new], -1)).Q
    return Q[..., : new.shape[-1]]


def _draw(word: int, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Random numbers of one tensor's renewal, from a generator of its own: equal on devices of one kind."""
    generator = torch.Generator(device=like.device).manual_seed(word)
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)
