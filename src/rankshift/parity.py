"""Parity: the model as it acts beside the merged one, on sample inputs, and what is left of each layer's change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankshift.core.base import Base, exactly
from rankshift.core.errors import ConfigError
from rankshift.core.site import Site
from rankshift.holding import Onto, targets
from rankshift.placement import check_foldable, fold

if TYPE_CHECKING:
    from rankshift.run import Run

_BLOCK = 1 << 24  # logits that are compared at a time


@dataclass(frozen=True)
class Parity:
    """The merged model beside the one that acts; prints as a table."""

    onto: Onto
    tokens: int  # predictions compared
    largest: float  # difference of two logits
    mean: float  # absolute difference
    kl: float  # KL(acting ‖ merged) of a prediction, in nats, on average
    agreement: float  # share of predictions whose most likely class is the same
    errors: Mapping[str, float]
    """‖(W_after − W_before) − ΔW‖ / ‖ΔW‖ by layer: 0 where the whole change arrives, 1 where as much is wrong as there
    is. W_before is the base that the adapter was trained on. Without layers whose change is zero."""

    @property
    def median(self) -> float:
        """Of ``errors``; 0 where no layer has changed."""
        return median(self.errors.values()) if self.errors else 0.0

    @property
    def worst(self) -> str:
        """The layer whose change arrives worst; "" where none has changed."""
        return max(self.errors, key=self.errors.__getitem__) if self.errors else ""

    @property
    def lossy(self) -> bool:
        """Whether more than half of the change is lost at half of the layers."""
        return self.median > 0.5

    def __str__(self) -> str:
        lines = {
            "merged onto": self.onto,
            "predictions compared": f"{self.tokens:,}",
            "largest difference of logits": f"{self.largest:.3g}",
            "mean difference of logits": f"{self.mean:.3g}",
            "KL(acting ‖ merged), nats": f"{self.kl:.3g}",
            "same most likely class": f"{100 * self.agreement:.2f} %",
        }
        if self.errors:
            lines["error of the change, median"] = f"{100 * self.median:.3g} %"
            lines["error of the change, worst"] = f"{100 * self.errors[self.worst]:.3g} % ({self.worst})"
        width = max(map(len, lines))
        return "\n".join(f"{name.ljust(width)}  {value}" for name, value in lines.items())


@torch.no_grad()
def parity(run: Run, inputs: Tensor | Mapping[str, Any], onto: Onto, original: Any) -> Parity:
    """See :meth:`Run.parity`."""
    check_foldable(run.sites.values())
    target, _ = targets(run._on, onto, original)
    was = [module for module in run.model.modules() if module.training]
    try:
        run.model.eval()
        acting, mask = _logits(run.model, inputs)
        with run.merged(onto, original) as model:
            merged, _ = _logits(model, inputs)
    finally:
        for module in was:
            module.training = True
    if mask is not None:
        acting, merged = acting[mask], merged[mask]
    if not acting.numel():
        raise ConfigError("Parity has nothing to compare: the inputs are empty, or padding alone.")
    errors = {name: _error(site, target(site)) for name, site in run.sites.items() if site.active}
    known = {name: error for name, error in errors.items() if error is not None}
    return Parity(onto, *_compared(acting.flatten(0, -2), merged.flatten(0, -2)), known)


def _logits(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
    """(…, classes), and which of them count, where inputs are padded."""
    out = model(**inputs) if isinstance(inputs, Mapping) else model(inputs)
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() < 2:
        raise ConfigError(
            f"{type(model).__name__} gives {type(out).__name__} for these inputs, in which no logits (…, classes) are "
            "found. Parity compares those: give a batch that the model is called with, or a model with a head."
        )
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return logits, mask.bool() if mask is not None and mask.shape == logits.shape[:-1] else None


def _compared(acting: Tensor, merged: Tensor) -> tuple[int, float, float, float, float]:
    """Rows, largest and mean difference, mean KL, share of equal largest entries; of two (n, classes)."""
    count, size = acting.shape
    wide = torch.promote_types(acting.dtype, torch.float32)
    sums = torch.zeros(4, dtype=torch.float64, device=acting.device)
    step = max(1, _BLOCK // size)
    for one, other in zip(torch.split(acting, step), torch.split(merged, step), strict=True):
        p, q = one.to(wide), other.to(wide)
        off = (p - q).abs()
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        kl = (log_p.exp() * (log_p - log_q)).sum()
        same = (p.argmax(-1) == q.argmax(-1)).sum()
        sums[0] = torch.maximum(sums[0], off.max())
        sums[1:] += torch.stack([off.sum().double(), kl.double(), same.double()])
    largest, off_sum, kl_sum, same_sum = sums.tolist()
    return count, largest, off_sum / (count * size), max(0.0, kl_sum / count), same_sum / count


def _error(site: Site, onto: Base | None) -> float | None:
    """Of one layer, which is merged and put back; None where its change is zero."""
    active, before = site.active, site.base.rows()
    with exactly(before.device):
        change = site.change()(slice(0, before.shape[-2]))
    undo = fold(site, onto)
    try:
        after = site.base.rows()
    finally:
        undo()
        site.link(active)
    wide = torch.promote_types(change.dtype, torch.float32)
    norm = torch.linalg.vector_norm(change.to(wide))
    wrong = (after.to(wide) - before.to(wide)).sub_(change)
    return float(torch.linalg.vector_norm(wrong) / norm) if norm > 0 else None
