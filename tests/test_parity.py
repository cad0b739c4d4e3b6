"""run.parity: the merged model beside the one that acts, and what is left of the change of each layer."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankshift as rs
from laws.pool import Pool
from laws.world import batch, loss_of, tiny
from rankshift.core.errors import AttachError, ConfigError, WrongBase


def trained(method: rs.Method, base: Any = "nf4", lr: float = 1e-2) -> tuple[rs.Run, Tensor]:
    run = rs.attach(tiny(), method, base=base, seed=1, total_steps=9)
    optimizer = run.optimizer(lr=lr)
    for step in range(3):
        loss_of(run.model, batch(step)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return run, batch(7)[:, :-1]


@torch.no_grad()
def by_hand(acting: Tensor, merged: Tensor) -> tuple[float, float, float, float]:
    p, q = acting.double().flatten(0, -2), merged.double().flatten(0, -2)
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    same = sum(int(a.argmax()) == int(b.argmax()) for a, b in zip(p, q, strict=True)) / len(p)
    return float((p - q).abs().max()), float((p - q).abs().mean()), float(kl), same


@pytest.mark.parametrize("onto", ["dequantised", "requantised", "original"])
def test_the_numbers_are_those_of_the_two_models(onto: Any) -> None:
    run, ids = trained(rs.LoRA(rank=2))
    original = tiny() if onto == "original" else None
    before = {name: t.clone() for name, t in run.state_dict()["tensors"].items()}
    run.model.eval()
    run.model.blocks[0].train()  # type: ignore[union-attr,operator,index]
    with torch.no_grad():
        acting = run.model(ids)
        with run.merged(onto, original) as model:
            merged = model(ids)
    found = run.parity(ids, onto, original)
    largest, mean, kl, same = by_hand(acting, merged)
    assert found.tokens == ids.numel()
    assert (found.largest, found.mean, found.agreement) == pytest.approx((largest, mean, same), rel=1e-5)
    assert found.kl == pytest.approx(kl, rel=1e-3, abs=1e-7)
    assert torch.equal(run.model(ids), acting), "the base was not put back"
    assert [m.training for m in (run.model, run.model.blocks[0])] == [False, True]  # type: ignore[index]
    assert all(torch.equal(t, before[name]) for name, t in run.state_dict()["tensors"].items())
    assert found.errors.keys() == run.sites.keys()
    assert onto in str(found)
    assert f"{100 * found.median:.3g} %" in str(found)
    assert max(found.errors.values()) == found.errors[found.worst]
    run.optimizer(lr=1e-3)  # the run goes on
    loss_of(run.model, batch(8)).backward()


def test_onto_what_it_was_trained_on_nothing_is_lost_and_requantised_most_is() -> None:
    run, ids = trained(rs.LoRA(rank=2), lr=1e-3)
    kept, lost = run.parity(ids), run.parity(ids, "requantised")
    assert (kept.onto, kept.agreement, kept.lossy, lost.lossy) == ("dequantised", 1.0, False, True)
    assert max(kept.errors.values()) < 1e-3 < 0.5 < lost.median
    assert kept.kl < 1e-9 < lost.kl


@pytest.mark.parametrize(("ratio", "error"), [(0.005, 1.08), (0.05, 1.03), (0.10, 0.78), (0.26, 0.37)])
def test_what_4_bits_leave_of_a_change(ratio: float, error: float) -> None:
    """Gaussian weights, a change of rank 16: as it was measured for the method's card."""
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(512, 512, bias=False)
    W, A, B = (torch.randn(shape, generator=generator) for shape in ((512, 512), (16, 512), (512, 16)))
    with torch.no_grad():
        layer.weight.copy_(W)
    model = nn.Sequential(layer)
    run = rs.attach(model, rs.LoRA(rank=16, alpha=16, targets="0"), base="nf4")
    adapter: Any = run.adapter()["0"]
    with torch.no_grad():
        adapter.A.copy_(A)
        adapter.B.copy_(B * (ratio * torch.linalg.norm(W) / torch.linalg.norm(B @ A)))
    found = run.parity(torch.randn((4, 512), generator=generator), "requantised")
    assert found.errors["0"] == pytest.approx(error, abs=0.06)
    assert found.lossy is (ratio < 0.2)

    change = (adapter.B @ adapter.A).detach()
    wrong = run.parity(torch.randn((4, 512), generator=generator), "original", {"0.weight": W}).errors["0"]
    rounding = torch.linalg.norm(W - run.sites["0"].base.dense()) / torch.linalg.norm(change)
    assert wrong == pytest.approx(float(rounding), rel=1e-3)
    assert wrong == pytest.approx(0.092 / ratio, rel=0.03)  # 18 × the change at 0.5 %, 1.8 × at 5 %


def test_columns_that_were_trained_beside_are_rounded_too() -> None:
    """What merge("requantised") leaves is what parity and merged() show."""
    run, ids = trained(rs.PaCA(rank=3))
    with torch.no_grad(), run.merged("requantised") as model:
        shown = model(ids)
        assert all(site.base.columns_beside is None for site in run.sites.values())
    assert max(run.parity(ids).errors.values()) < 1e-6
    errors = run.parity(ids, "requantised").errors
    assert min(errors.values()) > 0.05
    with torch.no_grad():
        run.model.eval()
        acting = run.model(ids)
        merged = run.merge("requantised").train()  # in eval() bitsandbytes repacks, which small layers do not fit
        assert torch.allclose(merged(ids), shown, atol=0.02 * float(acting.abs().max()))  # bitsandbytes' own product


@pytest.mark.parametrize("base", [None, "int8", "fp8"])
def test_other_bases(base: Any) -> None:
    run, ids = trained(rs.LoRA(rank=2), base, lr=0.05)
    found = run.parity(ids)
    assert found.kl < 1e-2
    assert not found.lossy
    if base is None:
        assert found.largest < 1e-5
        with pytest.raises(ConfigError, match="fewer bits"):
            run.parity(ids, "requantised")


def test_a_change_of_nothing_is_not_lost() -> None:
    run = rs.attach(tiny(), rs.LoRA(rank=2), base="nf4")
    found = run.parity(batch(0)[:, :-1], "requantised")
    assert (found.errors, found.median, found.worst, found.lossy) == ({}, 0.0, "", False)
    assert math.isfinite(found.kl)
    assert "error of the change" not in str(found)


class Padded(nn.Module):
    """Logits of two rows, as transformers gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 5)

    def forward(self, x: Tensor, attention_mask: Tensor, spoil: float = 0.0) -> Any:
        return type("Output", (), {"logits": self.layer(x) + spoil * (1 - attention_mask[..., None])})


def test_padding_does_not_count() -> None:
    run = rs.attach(Padded(), rs.LoRA(rank=2, targets="layer"), base="nf4")
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = run.parity({"x": torch.randn(2, 3, 4), "attention_mask": mask, "spoil": 1e9})
    assert found.tokens == 3
    assert math.isfinite(found.largest)
    with pytest.raises(ConfigError, match="nothing to compare"):
        run.parity({"x": torch.randn(2, 3, 4), "attention_mask": 0 * mask})


def test_refusals() -> None:
    run, ids = trained(rs.LoRA(rank=2))
    with pytest.raises(WrongBase, match="another model"):
        run.parity(ids, "original", {})
    with pytest.raises(ConfigError, match="none of"):
        run.parity(ids, "elsewhere")  # type: ignore[arg-type]
    bare = rs.attach(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), rs.LoRA(rank=1, targets="0"))
    with pytest.raises(ConfigError, match="no logits"):
        bare.parity(torch.randn(2, 3))
    run.merge()
    with pytest.raises(AttachError, match="ended"):
        run.parity(ids)


def sharded_parity(base: Any, onto: Any, refused: bool = False) -> dict[str, Any]:
    """Of a run that is sharded if there are several processes."""
    run, ids = trained(rs.LoRA(rank=2), base)
    if torch.distributed.is_initialized():
        from torch.distributed.fsdp import fully_shard

        for block in run.model.blocks:  # type: ignore[union-attr]
            fully_shard(block)  # type: ignore[arg-type]
        fully_shard(run.model)
    if refused:
        with pytest.raises(AttachError, match="in one process"):
            run.parity(ids, onto)
        return {}
    found = run.parity(ids, onto)
    assert found == run.parity(ids, onto)
    return {"kl": found.kl, "largest": found.largest, **found.errors}


@pytest.fixture(name="two", scope="module")
def two_fixture() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize(("base", "onto"), [("nf4", "requantised"), (None, "dequantised")])
def test_sharded_over_two_processes_it_is_the_same(base: Any, onto: Any, two: Pool) -> None:
    want = sharded_parity(base, onto)
    for found in two.run(sharded_parity, base, onto):
        assert found == pytest.approx(want, rel=1e-3, abs=1e-6)


def test_sharded_it_is_not_merged_into_layers_that_the_engine_does_not_know(two: Pool) -> None:
    two.run(sharded_parity, "nf4", "dequantised", refused=True)
