"""Inside: Adam on a gradient that was projected as it was formed. :class:`rankshift.optim.project.Project` without W.

    ∂L/∂X = A Q, (l, r), is the gradient of a parameter X of zeros
    X ← −lr·α·N            N: Adam inside the subspace, as in Project

Whoever owns the layer folds X Qᵀ into its weight and puts X back to zero. X, its moments and Q stay allocated at the
largest rank. At a smaller one their columns beyond it are zero, and stay zero: Adam's step on zeros is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from rankshift.core import shard
from rankshift.core.errors import ConfigError
from rankshift.core.form import Form
from rankshift.core.random import Key, signed
from rankshift.optim import subspace
from rankshift.optim.moments import Wide
from rankshift.optim.project import AT_ONCE, Project, Turn, agreed, begun, draw_word, even
from rankshift.optim.transform import Hyper


@dataclass(frozen=True)
class Inside(Project):
    """A transform for parameters X (l, r) as above. For :class:`Project`, the input side of an (l, r) weight."""

    @classmethod
    def of(cls, project: Project) -> Inside:
        """The same choices."""
        chosen = {field.name: getattr(project, field.name) for field in fields(Project)}
        return cls(**{**chosen, "side": "in", "form": Form()})

    def init(
        self, p: Tensor, key: Key | None = None, rank: int | None = None, place: tuple[int, int] = (1, 1)
    ) -> dict[str, Tensor]:
        """As in Project, without the basis, which the layer holds; the rank of now is a counter."""
        state = Project.init(replace(self, energy=None), p, key, None, place)  # none: no memory follows the rank
        del state["basis"]
        state["rank"] = torch.tensor(p.shape[1], dtype=torch.int64)
        return state

    def adopt(self, p: Tensor, saved: dict[str, Tensor], fresh: dict[str, Tensor]) -> list[str]:
        if "rank" not in saved:
            raise ConfigError("it is not that of a gradient that is projected as it is formed.")
        return self._taken(p, saved, fresh, tuple(p.shape))

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        hyper: Hyper,
    ) -> None:
        """X ← −lr·α·N, from X = 0. Weight decay is for whoever folds X into the weight."""
        if not parameters:
            return
        parts = [shard.held(p) if shard.is_sharded(p) else p for p in parameters]  # all of them: no views are needed
        if self._plain and all(even(state) for state in states):
            self._whole(parts, [shard.held(g) for g in gradients], states, hyper)
        elif hyper.void is not None and bool(hyper.void):
            torch._foreach_add_([state["step"] for state in states], 1)  # is counted back
        else:
            for batch in subspace.together([part.numel() for part in parts], AT_ONCE):
                ss = [states[i] for i in batch]
                gs = [shard.held(gradients[i]).to(shard.held(states[i]["mass"]).dtype) for i in batch]
                steps = self.adam(gs, ss, hyper)
                torch._foreach_mul_(steps, -hyper.lr * self.scale)
                torch._foreach_copy_([parts[i] for i in batch], steps)
        if self.clock.earliest is not None:
            norms = torch._foreach_norm([shard.held(g) for g in gradients])
            self.look(parameters, [norm.square() for norm in norms], states)

    @property
    def defers(self) -> bool:
        return self._plain and self.clock.earliest is None  # who looks for convergence asks the host

    @property
    def _plain(self) -> bool:
        """Whether c = 1 − β2ᵗ, and the moments are ordinary tensors."""
        return isinstance(self.store, Wide) and self.transport in ("none", "reset")

    def retract(self, states: Sequence[dict[str, Tensor]], hyper: Hyper) -> None:
        torch._foreach_sub_([state["step"] for state in states], 1)
        if all(even(state) for state in states):
            self._weigh(states, [int(state["step"]) - int(state["born"]) for state in states], hyper)

    def _whole(
        self, Xs: Sequence[Tensor], gradients: Sequence[Tensor], states: Sequence[dict[str, Tensor]], hyper: Hyper
    ) -> None:
        """As :meth:`adam` where c = 1 − β2ᵗ, by torch's kernel, which reads and writes each number once."""
        torch._foreach_add_([state["step"] for state in states], 1)
        ages = [int(state["step"]) - int(state["born"]) for state in states]
        kinds = [(X.dtype, X.device) for X in Xs]
        for dtype, device in dict.fromkeys(kinds):
            alike = [i for i, kind in enumerate(kinds) if kind == (dtype, device)]
            taken = {age: torch.full((), age, dtype=torch.float32, device=device) for age in {ages[i] for i in alike}}
            torch._fused_adamw_(
                [Xs[i] for i in alike],
                [gradients[i].to(dtype).contiguous() for i in alike],
                [shard.held(states[i]["exp_avg"]) for i in alike],
                [shard.held(states[i]["exp_avg_sq"]) for i in alike],
                [],
                [taken[ages[i]] for i in alike],
                lr=hyper.lr * self.scale,
                beta1=hyper.betas[0],
                beta2=hyper.betas[1],
                weight_decay=0.0,
                eps=hyper.eps,
                amsgrad=False,
                maximize=False,
                found_inf=hyper.void,
            )
        self._weigh(states, ages, hyper)

    def _weigh(self, states: Sequence[dict[str, Tensor]], ages: Sequence[int], hyper: Hyper) -> None:
        """c = 1 − β2ᵗ in every direction. A function of t alone: what was counted back has the bits of before."""
        masses = [shard.held(state["mass"]) for state in states]
        torch._foreach_zero_(masses)
        torch._foreach_add_(masses, [1 - hyper.betas[1] ** age for age in ages])

    def rank_of(self, state: dict[str, Tensor]) -> int:
        return int(state["rank"])

    def fitted(self, vectors: Tensor, p: Tensor) -> Tensor:
        return F.pad(vectors, (0, p.shape[1] - vectors.shape[-1]))

    def resize(self, p: Tensor, state: dict[str, Tensor], rank: int) -> None:
        state["rank"].fill_(rank)
        for name in ("exp_avg", "exp_avg_sq"):
            self.store.write(state, name, torch.zeros_like(self.store.read(state, name)))

    def turn(
        self,
        A: Tensor,
        Q: Tensor,
        Xs: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        keys: Sequence[Key],
    ) -> Turn:
        """New directions for layers of one shape, with a basis all or none; :meth:`enter` takes the moments along.

        Args:
            A: (n, l, s), the whole gradients, equal on all ranks.
            Q: (n, s, width), the whole bases of now, zero beyond the rank.
            keys: of the weights, so that the draws are those of :class:`Project`.
        """
        olds = [basis[:, : self.rank_of(state)] for basis, state in zip(Q, states, strict=True)]
        words = [draw_word(signed((key / "basis").word), state) for key, state in zip(keys, states, strict=True)]
        found = self.seek(A, olds if begun(states[0]) else [], words, self.limit(Xs[0]))
        return Turn(Xs, states, list(Q), agreed(found, A, False))
