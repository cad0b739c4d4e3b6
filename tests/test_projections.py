"""What a run says of projected gradients: the table of subspaces, its means, and the summary's bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import rankshift as rs
from laws.laws import Experts
from laws.world import batch, loss_of, tiny
from rankshift.core.errors import AttachError


def train(run: rs.Run, steps: int) -> torch.optim.Optimizer:
    optimizer = run.optimizer(lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        loss_of(run.model, batch(step)).backward()
        optimizer.step()
    return optimizer


def spectra(run: rs.Run) -> dict[str, Tensor]:
    """σ² of every gradient, by the name of its weight, largest first; their sum is 1."""
    squares = {n: torch.linalg.svdvals(p.grad.double()).square() for n, p in run.trainable() if p.grad.dim() == 2}
    return {name: s / s.sum() for name, s in squares.items()}


@pytest.mark.parametrize("wish", [0.5, 0.9, 0.999999])
def test_rank_energy_and_saturation_are_those_of_the_gradient(wish: float) -> None:
    run = rs.attach(tiny(torch.float64), rs.AdaRankGrad(rank=5, energy=wish, finder="svd"))
    train(run, 1)
    table = run.subspace_table()
    found = spectra(run)
    assert [row.name for row in table.rows] == list(run.subspaces)
    for row in table.rows:
        share = found[row.name].cumsum(0)
        want = min(int((share < wish).sum()) + 1, 5)
        assert row.rank == want
        assert row.energy == pytest.approx(share[want - 1].item(), rel=1e-9)
        assert row.saturated == (share[4].item() < wish)
        assert (row.limit, row.renewals, row.renewed) == (5, 1, 0)
        assert row.shape == tuple(run.model.get_parameter(row.name).shape)
    saturated = [row.saturated for row in table.rows]
    assert any(saturated) == (wish > 0.95)
    assert ("!" in str(table)) == any(saturated)
    means = run.metrics()
    assert means == table.means()
    assert means["subspace_rank"] == pytest.approx(sum(row.rank for row in table.rows) / len(table.rows))
    assert means["subspace_saturated"] == pytest.approx(sum(saturated) / len(saturated))
    assert means["subspace_renewals"] == len(saturated)


def test_full_rank_that_keeps_everything_is_not_saturated() -> None:
    for finder in ("svd", "eigh", "range"):
        run = rs.attach(tiny(), rs.AdaRankGrad(rank=64, energy=1.0, finder=finder))
        train(run, 1)
        assert not any(row.saturated for row in run.subspace_table().rows), finder


def test_a_fixed_rank_has_no_wish_to_fall_short_of() -> None:
    run = rs.attach(tiny(), rs.GaLore(rank=1, every=2))
    before = run.subspace_table()
    assert [(row.rank, row.energy, row.renewals, row.bytes) for row in before.rows] == [(1, 0.0, 0, 0)] * 7
    assert run.metrics() == {"subspace_rank": 1.0, "subspace_energy": 0.0, "subspace_renewals": 0}
    train(run, 4)
    table = run.subspace_table()
    assert table.step == 4
    assert not any(row.saturated for row in table.rows)
    assert set(run.metrics()) == set(before.means()), "the same names from the start"
    assert run.metrics()["subspace_renewals"] == sum(row.renewals for row in table.rows) > 7
    lines = str(table).splitlines()
    assert lines[0].split() == ["weight", "shape", "rank", "energy", "renewals", "last", "in", "state"]
    assert len(lines) == 2 + 7
    assert "12 × 12  1 of 1" in lines[2]


def test_the_table_is_read_from_the_device_in_one_piece() -> None:
    class Reads(TorchDispatchMode):
        floats = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
                Reads.floats += 1  # counters are on the CPU; what is a float may be on a device
            return function(*args, **(kwargs or {}))

    run = rs.attach(tiny(), rs.AdaRankGrad(rank=5))
    train(run, 1)
    with Reads():
        torch.ones(1).item()
        assert Reads.floats == 1
        run.subspace_table()
        run.metrics()
    assert Reads.floats == 1


def test_other_methods_have_an_empty_table() -> None:
    run = rs.attach(tiny(), rs.LoRA(rank=2))
    assert run.subspace_table().rows == ()
    assert run.metrics() == {}


def test_ranks_are_known_after_loading(tmp_path: Any) -> None:
    run = rs.attach(tiny(), rs.AdaRankGrad(rank=8, energy=0.5))
    train(run, 2)
    ranks = {row.name: row.rank for row in run.subspace_table().rows}
    assert set(ranks.values()) != {8}
    run.save(tmp_path / "run")
    loaded = rs.load(tiny(), tmp_path / "run")
    assert {row.name: row.rank for row in loaded.subspace_table().rows} == ranks
    assert loaded.summary().bytes_optimizer == run.summary().bytes_optimizer


@pytest.mark.parametrize("method", [rs.GaLore(rank=4), rs.AdaRankGrad(rank=6, energy=0.6)])
def test_the_summary_weighs_the_state_at_the_ranks_of_now(method: rs.GaLore) -> None:
    run = rs.attach(tiny(), method)
    optimizer = train(run, 2)
    held = sum(t.untyped_storage().nbytes() for s in optimizer.state.values() for t in s.values() if t.dim())
    summary = run.summary()
    assert summary.bytes_optimizer == held
    assert summary.bytes_adamw == 8 * sum(p.numel() for _, p in run.trainable())
    assert sum(row.bytes for row in run.subspace_table().rows) == held - 8 * sum(
        p.numel() for name, p in run.trainable() if name not in run.subspaces
    )
    kinds = {row.layer: (row.sites, row.shape) for row in summary.rows}
    assert kinds == {
        **dict.fromkeys(("q", "k", "v", "o"), (1, "12 × 12")), "up": (1, "18 × 12"), "down": (1, "12 × 18"),
        "head": (1, "13 × 12"), "whole tensors": (12, "various"),
    }  # fmt: skip
    assert sum(row.trainable for row in summary.rows) == summary.trainable == summary.total
    assert f"{round(100 * (1 - held / summary.bytes_adamw))} % below AdamW's" in str(summary)


def test_lora_is_not_compared_with_adamw() -> None:
    summary = rs.attach(tiny(), rs.LoRA(rank=2)).summary()
    assert summary.bytes_optimizer == summary.bytes_adamw == 8 * summary.trainable
    assert "AdamW" not in str(summary)


def test_what_cannot_be_trained_as_it_is_has_a_summary() -> None:
    run = rs.attach(tiny(torch.bfloat16), rs.GaLore(rank=4))
    assert run.summary().bytes_optimizer == 4 * run.summary().trainable
    with pytest.raises(rs.errors.ConfigError, match="rounding"):
        run.optimizer()


def test_a_stack_of_experts_is_one_row() -> None:
    run = rs.attach(torch.nn.ModuleDict({"layer": Experts(3, 8, 6)}), rs.GaLore(rank=2, targets=("layer.weight",)))
    (row,) = run.subspace_table().rows
    assert run.model.layer.weight.shape == (3, 8, 6), "this one stores (experts, in, out)"
    assert (row.name, row.shape, row.rank) == ("layer.weight", (3, 6, 8), 2)


@pytest.mark.parametrize("rest", ["train", "freeze"])
def test_nothing_stands_beside_what_trains_the_base(rest: Any) -> None:
    run = rs.attach(tiny(), rs.GaLore(rank=2, rest=rest))
    with pytest.raises(AttachError, match=r"stands alone\. Use run\.shift") as caught:
        run.add("second", rs.LoRA(rank=2))
    assert "bias" not in str(caught.value), "which GaLore does not have"
    run = rs.attach(tiny(), rs.LoRA(rank=2))
    with pytest.raises(AttachError, match="stands alone"):
        run.add("second", rs.GaLore(rank=2, rest=rest))


def test_where_a_weight_learns_through_its_site_the_summary_counts_the_weight() -> None:
    """The tensors of the site are state: of X and Q, and the moments of X; the gradient is that of X."""
    runs = [rs.attach(tiny(), rs.GaLore(rank=4, gradient=gradient)) for gradient in ("full", "projected")]
    for run in runs:
        train(run, 2)
    full, projected = (run.summary() for run in runs)
    assert (full.rows, full.total, full.trainable) == (projected.rows, projected.total, projected.trainable)
    assert (full.bytes_trainable, full.bytes_adamw) == (projected.bytes_trainable, projected.bytes_adamw)
    assert (full.bytes_frozen, projected.bytes_frozen) == (0, 0)
    X = sum(4 * row.rank * max(row.shape) for row in runs[1].subspace_table().rows)
    assert projected.bytes_optimizer == full.bytes_optimizer + X
    W = sum(4 * row.shape[0] * row.shape[1] for row in runs[1].subspace_table().rows)
    assert projected.bytes_gradients == full.bytes_gradients - W + X
    for ours, theirs in zip(*(run.subspace_table().rows for run in runs), strict=True):
        assert (ours.name, ours.rank, ours.renewals) == (theirs.name, theirs.rank, theirs.renewals)
        assert ours.energy == pytest.approx(theirs.energy, rel=1e-4)


def test_who_asks_for_more_on_resume_is_not_told_of_saturation_before_a_renewal() -> None:
    optimizer = train(rs.attach(tiny(), rs.AdaRankGrad(rank=9, energy=0.3)), 1)
    run = rs.attach(tiny(), rs.AdaRankGrad(rank=9, energy=0.999))
    run.optimizer(lr=1e-2).load_state_dict(optimizer.state_dict())
    rows = run.subspace_table().rows
    assert all(row.energy < 0.999 and 0 < row.rank < 9 and row.renewals == 1 for row in rows)
    assert not any(row.saturated for row in rows)
