"""EVA: A starts as the top right singular vectors of a layer's input. Paischer et al. 2024, arXiv 2410.07170.

    X = U S Vᵀ, the layer's inputs as rows, over minibatches      A = V[:r]ᵀ, B = 0
    r of a layer = how many of the budget's largest S²/‖X‖² are its own, at most ρ·rank and at least 1

The decomposition is carried from batch to batch as (S, V): the SVD of [S Vᵀ; X] has the singular values and right
vectors of all rows so far, up to what lies beyond the directions kept. Unlike scikit-learn's (and PEFT's) incremental
PCA the mean is not taken off, because the layer multiplies X and not X − mean.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankshift.core import calibration, shard
from rankshift.core.errors import DataError
from rankshift.core.site import Spec

_SPARE = 16  # directions kept beyond the cap: a direction that a batch pushes out may return with the next


@dataclass
class Stream:
    """A running SVD of rows that come in batches."""

    cap: int  # components that may be asked for
    tau: float  # cosine from which a component counts as settled
    values: Tensor | None = None  # S, (k,)
    vectors: Tensor | None = None  # Vᵀ, (k, in)
    energy: float = 0.0  # ‖X‖² of all rows
    rows: int = 0
    settled: bool = False

    def add(self, X: Tensor) -> None:
        """Take in rows (b, in)."""
        X = X.to(torch.promote_types(X.dtype, torch.float32))
        self.rows += X.shape[0]
        self.energy += float(torch.linalg.vector_norm(X, dtype=torch.float64)) ** 2
        if not math.isfinite(self.energy):
            raise DataError("EVA met NaN or Inf in a layer's input. Check the data, or look in float32.")
        before = self.vectors
        if self.values is not None and before is not None:
            X = torch.cat([self.values[:, None] * before, X])
        _, S, Vh = torch.linalg.svd(X, full_matrices=False)
        keep = self.cap + _SPARE
        self.values, self.vectors = S[:keep], Vh[:keep]
        if before is not None and min(len(before), len(self.vectors)) >= self.cap:
            cosine = (before[: self.cap] * self.vectors[: self.cap]).sum(1).abs()  # a singular vector has no sign
            self.settled = bool((cosine >= self.tau).all())

    def shares(self) -> list[float]:
        """S²/‖X‖² of each component that may be used, descending."""
        assert self.values is not None
        used = self.values[: min(self.cap, self.rows)].double().square() / max(self.energy, 1e-300)
        return [float(share) for share in used]


def survey(
    model: nn.Module,
    specs: Sequence[Spec],
    ranks: Mapping[str, int],
    data: Iterable[Any],
    ratio: float,
    tau: float,
    tokens: Literal["attention", "labels"],
) -> dict[str, Tensor]:
    """A (r, in) for every site, from a pass over ``data`` before a site is built; Σ r is that of ``ranks``.

    Raises:
        DataError: a layer saw fewer rows than its rank.
    """
    streams = {spec.name: Stream(min(math.floor(ratio * ranks[spec.name]), spec.max_rank), tau) for spec in specs}
    batches = _watch(model, specs, streams, data, tokens)
    for name, stream in streams.items():
        if stream.rows < ranks[name]:
            raise DataError(
                f"EVA saw {stream.rows} rows of input at {name} in {batches} batches, too few for rank {ranks[name]}. "
                "Pass more data, or exclude the layer if the model does not use it."
            )
    shared = redistribute({name: stream.shares() for name, stream in streams.items()}, sum(ranks.values()))
    found: dict[str, Tensor] = {}
    for name, stream in streams.items():
        assert stream.vectors is not None
        found[name] = stream.vectors[: shared[name]].cpu()
    return shard.from_first(found)  # each rank sees data of its own, but shapes must agree


def redistribute(shares: Mapping[str, Sequence[float]], budget: int) -> dict[str, int]:
    """Ranks: each layer's first component, then the largest shares of all layers until ``budget`` is spent.

    ``shares`` are descending in each layer and end at its cap. Ties go to the layer that comes first.
    """
    ranks = dict.fromkeys(shares, 1)
    rest = [(-share, order, name) for order, name in enumerate(shares) for share in shares[name][1:]]
    for _, _, name in sorted(rest)[: budget - len(ranks)]:
        ranks[name] += 1
    return ranks


def _watch(
    model: nn.Module,
    specs: Sequence[Spec],
    streams: Mapping[str, Stream],
    data: Iterable[Any],
    tokens: Literal["attention", "labels"],
) -> int:
    """Run the batches through the model, in evaluation mode, until all streams are settled; how many it took."""
    counted: list[Tensor | None] = [None]  # which tokens of the batch count, (batch, length)
    hooks: dict[str, Any] = {}

    def watch(spec: Spec) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            streams[spec.name].add(calibration.rows(spec, args[0].detach(), counted[0]))

        return model.get_submodule(spec.name).register_forward_pre_hook(hook)

    device = calibration.device_of(model)
    batches = 0
    with calibration.evaluating(model), torch.no_grad():
        try:
            for spec in specs:
                hooks[spec.name] = watch(spec)
            for batch in data:
                batch = calibration.moved(batch, device)
                counted[0] = _counted(batch, tokens)
                batches += 1
                calibration.call(model, batch)
                for name in [name for name in hooks if streams[name].settled]:
                    hooks.pop(name).remove()
                if not hooks:
                    break
        finally:
            for hook in hooks.values():
                hook.remove()
    return batches


def _counted(batch: Any, tokens: Literal["attention", "labels"]) -> Tensor | None:
    """Which tokens of a batch are not padding and, with ``tokens="labels"``, carry a label."""
    if not isinstance(batch, Mapping):
        return None
    counted = calibration.attended(batch)
    if tokens == "labels":
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise DataError('LoRA(eva_tokens="labels") needs batches with "labels".')
        counted = labels != -100 if counted is None else counted & (labels != -100)
    return counted
