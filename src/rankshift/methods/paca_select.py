"""Which input channels PaCA trains. Each choice is sorted and without repetition; ties go to the lower index.

    random        r of n, every set equally likely                    the paper's choice
    blocks        r / block of the n / block aligned blocks           reads of X[:, I] are whole cache lines
    weight_norm   the r largest ‖W[:, j]‖                             as the authors' code has it, commented out
    activation    the r largest mean x_j²                             over the tokens of ``data``
    gradient      the r largest Σ ‖(dYᵀX)[:, j]‖²                     one term for each batch of ``data``

For a convolution j is an input channel and its columns are those of all taps. The last two look at data: the model runs
as it is, in evaluation mode, and of one layer at a time the (out, in) gradient exists.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankshift.core import calibration, shard
from rankshift.core.errors import DataError
from rankshift.core.random import Key, permutation
from rankshift.core.site import Spec


def random(key: Key, channels: int, rank: int) -> Tensor:
    """(rank,) of 0…channels−1."""
    return permutation(key, channels)[:rank].sort().values


def blocks(key: Key, channels: int, rank: int, block: int) -> Tensor:
    """(rank,) in aligned blocks; ``block`` divides both."""
    first = block * random(key, channels // block, rank // block)
    return (first[:, None] + torch.arange(block, device="cpu")).flatten()


def largest(scores: Tensor, rank: int) -> Tensor:
    """(rank,) channels of the largest scores, on the CPU."""
    return scores.cpu().argsort(descending=True, stable=True)[:rank].sort().values


def by_channel(squares: Tensor, taps: int) -> Tensor:
    """Sums over the columns of each channel: (in,) → (in / taps,)."""
    return squares.reshape(-1, taps).sum(1)


def weight_norm(weight: Tensor, taps: int) -> Tensor:
    """‖W[:, j]‖² of each channel, from an (out, in) weight."""
    norms: Tensor = torch.linalg.vector_norm(weight, dim=0, dtype=torch.promote_types(weight.dtype, torch.float32))
    return by_channel(norms.square(), taps)


@dataclass
class Score:
    """A running score of one layer's channels."""

    spec: Spec
    total: Tensor | None = None  # (n,)
    rows: int = 0
    pending: int = 0  # calls of this batch whose gradient is still to come
    gradient: Tensor | None = None  # (out, in), of the calls of this batch

    def add(self, squares: Tensor, rows: int) -> None:
        """Take in (in,) sums of squares over some rows."""
        found = by_channel(squares, self.spec.form.taps).double()
        self.total = found if self.total is None else self.total + found
        self.rows += rows

    def watch(self, x: Tensor, y: Tensor) -> Tensor:
        """The output y of one call on x, which will report its gradient."""
        self.pending += 1
        if not y.requires_grad:  # everything below is frozen: the graph starts here
            y = y.detach().requires_grad_().clone()

        def collect(dY: Tensor) -> None:
            out, into = self.spec.form.places(dY).flatten(0, -2), calibration.rows(self.spec, x)
            wide = torch.promote_types(into.dtype, torch.float32)
            G = out.to(wide).t() @ into.to(wide)
            self.gradient = G if self.gradient is None else self.gradient + G
            self.pending -= 1
            if self.pending == 0:
                self.flush(len(into))

        y.register_hook(collect)  # type: ignore[no-untyped-call]
        return y

    def flush(self, rows: int = 0) -> None:
        """The gradient of this batch is complete."""
        if self.gradient is not None:
            self.add(self.gradient.square().sum(0), rows)
        self.gradient, self.pending = None, 0


def survey(
    model: nn.Module,
    specs: Sequence[Spec],
    ranks: Mapping[str, int],
    data: Iterable[Any],
    select: Literal["activation", "gradient"],
) -> dict[str, Tensor]:
    """The channels of every site, from a pass over ``data`` before a site is built; those of rank 0 on every rank.

    Raises:
        DataError: a layer saw none of it, or it gives no loss, NaN or Inf.
    """
    scores = {spec.name: Score(spec) for spec in specs}
    batches = (_activations if select == "activation" else _gradients)(model, scores, data)
    found: dict[str, Tensor] = {}
    for name, score in scores.items():
        if score.total is None or score.rows == 0:
            raise DataError(
                f'PaCA(select="{select}") saw nothing of {name} in {batches} batches. Pass data, or exclude the layer '
                "if the model does not use it."
            )
        if not bool(torch.isfinite(score.total).all()):
            raise DataError(f'PaCA(select="{select}") met NaN or Inf at {name}. Check the data, or look in float32.')
        found[name] = largest(score.total / score.rows, ranks[name])
    return shard.from_first(found)  # each rank sees data of its own, but must choose alike


def _activations(model: nn.Module, scores: Mapping[str, Score], data: Iterable[Any]) -> int:
    counted: list[Tensor | None] = [None]  # which tokens of the batch are not padding

    def watch(score: Score) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            into = calibration.rows(score.spec, args[0].detach(), counted[0])
            into = into.to(torch.promote_types(into.dtype, torch.float32))
            score.add(into.square().sum(0), len(into))

        return model.get_submodule(score.spec.name).register_forward_pre_hook(hook)

    hooks = [watch(score) for score in scores.values()]
    device, batches = calibration.device_of(model), 0
    try:
        with calibration.evaluating(model), torch.no_grad():
            for batch in data:
                batch = calibration.moved(batch, device)
                counted[0] = calibration.attended(batch)
                batches += 1
                calibration.call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return batches


def _gradients(model: nn.Module, scores: Mapping[str, Score], data: Iterable[Any]) -> int:
    def watch(score: Score) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return score.watch(args[0].detach(), output)

        return model.get_submodule(score.spec.name).register_forward_hook(hook)

    hooks = [watch(score) for score in scores.values()]
    device, batches = calibration.device_of(model), 0
    try:
        with calibration.evaluating(model), calibration.frozen(model), torch.enable_grad():
            for batch in data:
                batches += 1
                _loss(calibration.call(model, calibration.moved(batch, device))).backward()  # type: ignore[no-untyped-call]
                for score in scores.values():
                    score.flush(1)  # of calls that the loss did not reach
    finally:
        for hook in hooks:
            hook.remove()
    return batches


def _loss(output: Any) -> Tensor:
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise DataError(
            'PaCA(select="gradient") needs the loss of each batch: pass keyword dictionaries with "labels" to a model '
            "whose output has a .loss, as those of transformers do."
        )
    return loss
