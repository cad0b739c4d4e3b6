"""Weighted sums of adapters, exact: Σ wᵢ Bᵢ Aᵢ = [B₁ B₂ …] [w₁A₁; w₂A₂; …], of rank Σ rᵢ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.errors import ConfigError, ExportError
from rankshift.methods.lora import LoRA


def concatenate(
    parts: Sequence[Mapping[str, Adapter]], weights: Sequence[float]
) -> tuple[LoRA, dict[str, int], dict[str, Tensor]]:
    """The method, the rank at each site and the values (``site.leaf`` → tensor) of Σ wᵢ · partᵢ, with scale 1.

    Args:
        parts: adapters as ``Run.adapter`` gives them, site → its part.
        weights: one for each.

    Raises:
        ExportError: one of them changes a layer in a way that is no product of two factors.
    """
    if not parts or len(weights) != len(parts):
        raise ConfigError(f"combine has {len(parts)} adapters and {len(weights)} weights; give one weight for each.")
    at: dict[str, list[tuple[float, Adapter]]] = {}
    for part, weight in zip(parts, weights, strict=True):
        for site, adapter in part.items():
            at.setdefault(site, []).append((float(weight), adapter))
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    biases: dict[str, Tensor] = {}
    for site, members in at.items():
        pairs = [(weight, adapter.low_rank()) for weight, adapter in members]
        if any(pair is None for _, pair in pairs):
            raise ExportError(
                f"At {site} one of the adapters is no low-rank sum (DoRA rescales whole rows): it cannot be combined. "
                "Add them up with run.use(…) instead, or merge one of them."
            )
        known = [(weight, pair) for weight, pair in pairs if pair is not None]
        A, B = torch.cat([w * A for w, (A, _) in known], -2), torch.cat([B for _, (_, B) in known], -1)
        if A.shape[-2] == 0:  # every rank there is closed
            continue
        factors[site] = A, B
        shifts = [(weight, adapter.delta_bias()) for weight, adapter in members]
        found = [weight * shard.whole(shift) for weight, shift in shifts if shift is not None]
        if found:
            biases[site] = torch.stack(found).sum(0)
    if not factors:
        raise ExportError("None of the adapters has a rank left at any layer: their sum is no change.")
    ranks = {site: A.shape[-2] for site, (A, _) in factors.items()}
    tensors: dict[str, Tensor] = {}
    for site, (A, B) in factors.items():
        tensors |= {f"{site}.A": A, f"{site}.B": B}
        if biases:
            tensors[f"{site}.b"] = biases.get(site, torch.zeros(B.shape[-2], dtype=B.dtype, device=B.device))
    order = sorted(ranks, key=len)  # the last match counts: a name that ends in another comes after it
    method = LoRA(
        rank=max(ranks.values()),
        alpha=float(max(ranks.values())),
        rank_pattern={site: ranks[site] for site in order},
        alpha_pattern={site: float(ranks[site]) for site in order},
        targets=tuple(ranks),
        lora_bias=bool(biases),
    )
    return method, ranks, tensors
