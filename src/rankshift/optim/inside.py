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
from rankshift.optim.project import Project
from rankshift.optim.transform import Hyper

_TOGETHER = 1 << 24  # numbers of moments that are stepped at once


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

    def update(self, g: Tensor, state: dict[str, Tensor], p: Tensor | None, hyper: Hyper) -> Tensor:
        """α N, of the part held here."""
        assert p is not None
        X = shard.held(g).to(shard.held(state["mass"]).dtype)
        N = self.adam(X, state, hyper)
        self.look([p], [X.square().sum()], [state])
        return self.scale * N

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        hyper: Hyper,
    ) -> None:
        """X ← −lr·α·N. Weight decay is for whoever folds X into the weight."""
        parts = [shard.held(p) for p in parameters]
        for batch in subspace.same_shape([tuple(part.shape) for part in parts], _TOGETHER):
            ss = [states[i] for i in batch]
            gs = [shard.held(gradients[i]).to(shard.held(states[i]["mass"]).dtype) for i in batch]
            if isinstance(self.store, Wide):
                steps = self._adam_together(gs, ss, hyper)
            else:
                steps = [self.adam(g, state, hyper) for g, state in zip(gs, ss, strict=True)]
                torch._foreach_mul_(steps, -hyper.lr * self.scale)
            torch._foreach_copy_([parts[i] for i in batch], steps)
        if self.clock.earliest is not None and parameters:
            norms = torch._foreach_norm([shard.held(g) for g in gradients])
            self.look(parameters, [norm.square() for norm in norms], states)

    def _adam_together(self, gs: list[Tensor], states: Sequence[dict[str, Tensor]], hyper: Hyper) -> list[Tensor]:
        """−lr·α·N of each: :meth:`adam` with one launch for what all tensors share."""
        beta1, beta2 = hyper.betas
        m, v, mass = ([shard.held(state[key]) for state in states] for key in ("exp_avg", "exp_avg_sq", "mass"))
        torch._foreach_add_([state["step"] for state in states], 1)
        torch._foreach_lerp_(m, gs, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, gs, gs, value=1 - beta2)
        torch._foreach_mul_(mass, beta2)
        torch._foreach_add_(mass, 1 - beta2)
        below = [average / filled for average, filled in zip(v, mass, strict=True)]
        torch._foreach_sqrt_(below)
        torch._foreach_add_(below, hyper.eps)
        steps = list(torch._foreach_div(m, below))
        ages = [int(state["step"]) - int(state["born"]) for state in states]
        torch._foreach_mul_(steps, [-hyper.lr * self.scale / (1 - beta1**age) for age in ages])
        return steps

    def turn(self, A: Tensor, Q: Tensor, rows: slice, state: dict[str, Tensor], key: Key, hyper: Hyper) -> Tensor:
        """A new basis for A, (s, width) as the old one, and the moments taken along.

        Args:
            A: (l, s), the whole gradient, equal on all ranks.
            Q: (s, width) the whole basis of now, zero beyond the rank.
            rows: of A, those that the moments held here belong to.
            key: of the weight, so that the draws are those of :class:`Project`.
        """
        plain, rank, width = replace(self, store=Wide()), int(state["rank"]), Q.shape[1]
        # what Project would hold for these rows of a weight A at the rank of now; counters are the state's own
        view = {**state, "basis": Q[:, :rank].clone(), "mass": shard.held(state["mass"])[:rank].clone()}
        view["key"] = torch.tensor(signed((key / "basis").word), dtype=torch.int64)
        for name in ("exp_avg", "exp_avg_sq"):
            view[name] = self.store.read(state, name)[:, :rank].clone()
        found = plain._find([A], [A], [view])
        (new,) = plain._ranks([A], [view], found)
        if not new:  # a gradient of zeros
            return Q
        plain._move(A[rows], view, found[0], new, hyper)
        for name in ("exp_avg", "exp_avg_sq"):
            self.store.write(state, name, F.pad(view[name], (0, width - new)))
        shard.held(state["mass"]).copy_(F.pad(view["mass"], (0, width - new)))
        state["rank"].fill_(new)
        return F.pad(view["basis"], (0, width - new))
