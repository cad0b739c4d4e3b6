"""Columns kept in a weight that DDP replicates and FSDP2 shards: where they stand, who writes them, and who agrees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import rankshift as rs
from laws import laws
from laws.pool import Pool
from laws.test_engines import resume_from, save_after
from laws.world import Engine, Session, begin, evaluate, gap, rank, same, scramble, tiny, world
from rankshift.core import shard
from rankshift.core.site import Site
from rankshift.methods import PaCA
from rankshift.methods.paca import PaCALayer

F64 = torch.float64


def layers_of(site: Site) -> PaCALayer:
    adapter = site["default"]
    assert isinstance(adapter, PaCALayer)
    return adapter


def columns_of(layer: nn.Module, W: Tensor) -> Tensor:
    """A stored weight as (out, in), by hand."""
    return W.t() if type(layer).__name__ == "Conv1D" else W.flatten(1)


def tenancy() -> None:
    """On shards of every kind of weight: enter, write, leave; one row for two ranks; a weight sharded along in."""
    from transformers.pytorch_utils import Conv1D

    kinds = (
        lambda: nn.Linear(6, 5),
        lambda: nn.Linear(6, 1),
        lambda: Conv1D(5, 7),
        lambda: Conv1D(6, 6),  # its shard and that of D are the same slice, of inputs and of outputs
        lambda: nn.Conv2d(6, 5, 2),
    )
    for make in kinds:
        torch.manual_seed(0)
        layer = make()
        W = layer.weight.detach().clone()
        model = nn.Sequential(layer)
        run = rs.attach(model, PaCA(rank=3, alpha=6, targets="0"), seed=2)
        fully_shard(model, mesh=init_device_mesh("cpu", (world(),)))
        (site,) = run.sites.values()
        adapter, base = layers_of(site), site.base
        assert shard.is_sharded(base.weight)
        assert shard.is_sharded(adapter.D)
        assert shard.is_sharded(adapter.origin)
        rows = [shard.local(t)[1] for t in (adapter.D, adapter.origin)]
        assert rows[0] == rows[1]
        values = torch.randn(adapter.D.shape, generator=torch.Generator().manual_seed(1))
        shard.assign_(adapter.D, values)
        adapter.enter()
        want = columns_of(layer, W).clone()
        want[:, adapter.occupied] += 2 * values
        assert torch.equal(columns_of(layer, shard.whole(base.weight)), want), make
        assert torch.equal(base.rows(), columns_of(layer, W)), make
        assert torch.equal(adapter.rows(), want), make
        with run._on.returned():
            assert torch.equal(shard.whole(base.weight), W), make
            shard.assign_(base.weight, W + 1)
        assert torch.equal(shard.whole(adapter.origin), columns_of(layer, W + 1)[:, adapter.occupied]), make
        adapter.leave()
        assert torch.equal(shard.whole(base.weight), W + 1), make


def test_columns_in_shards(pool: Pool) -> None:
    pool.run(tenancy)


def no_stray_writes() -> None:
    """Under FSDP2 no forward writes into what it gathered, from the first on; an evaluation in between is no matter."""
    session = begin("fsdp2", PaCA(rank=2, alpha=3))
    written: list[str] = []
    plain = PaCALayer.write

    def write(self: PaCALayer) -> None:
        written.append("shard" if shard.is_sharded(self.base.weight) else "gathered")
        plain(self)

    PaCALayer.write = write  # type: ignore[method-assign]
    try:
        for _ in range(3):
            session.step()
            evaluate(session.model)
    finally:
        PaCALayer.write = plain  # type: ignore[method-assign]
    assert written == ["shard"] * 3 * len(session.run.sites)
    evaluate(session.model)  # leaves the root's parameters gathered
    trained = evaluate(session.model)
    with session.run.disabled():
        assert torch.equal(evaluate(session.model), evaluate(tiny()))
    assert torch.equal(evaluate(session.model), trained)
    session.model.reshard()  # type: ignore[operator]
    assert torch.equal(evaluate(session.model), trained)


def test_only_shards_are_written(pool: Pool) -> None:
    pool.run(no_stray_writes)


def mixed_precision() -> None:
    """A bf16 compute copy of fp32 shards: columns are written into the shards in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    session = begin("fsdp2", PaCA(rank=2, alpha=3), policy=policy).steps(2)
    shard.settle(session.model)
    for site in session.run.sites.values():
        adapter = layers_of(site)
        want = site.base.rows()
        want[:, adapter.channels] += 1.5 * shard.whole(adapter.D)
        assert torch.equal(columns_of(site, shard.whole(site.base.weight)), want)
        assert adapter.D.dtype is torch.float32


def test_mixed_precision(pool: Pool) -> None:
    pool.run(mixed_precision)


def chosen(select: str) -> dict[str, list[int]]:
    scramble()
    data = [{"ids": torch.randint(13, (4, 5), generator=torch.Generator().manual_seed(rank()))}]
    run = rs.attach(tiny(), PaCA(rank=3, select=select), data=data)  # type: ignore[arg-type]
    return {name: layers_of(site).channels.tolist() for name, site in run.sites.items()}


@pytest.mark.parametrize("select", ["random", "weight_norm", "activation"])
def test_ranks_choose_alike_whatever_data_they_saw(select: str, pool: Pool) -> None:
    first, second = pool.run(chosen, select)
    assert first == second
    assert first == chosen(select), "one process, with the first rank's data"


@pytest.mark.parametrize(
    ("engine", "method"),
    [
        pytest.param("fsdp2", PaCA(rank=2, redraw_every=3), id="fsdp2-redraw"),
        pytest.param("ddp", PaCA(rank=2, redraw_every=3), id="ddp-redraw"),
    ],
)
def test_save_on_two_resume_on_four(engine: Engine, method: PaCA, pool: Pool, pool_of_four: Pool) -> None:
    saved = pool.run(save_after, engine, method, 2)[0]
    straight = begin("one", method, F64, blocks=2).steps(4).state(whole=True)
    four = pool_of_four.run(resume_from, saved, engine, method, 2)
    same(four[3], straight, laws.RANKS, "resumed on four")


def two_at_once() -> None:
    """Both act: the one below is resident, the one above a branch; switching is a matter of shards."""
    model = tiny(F64)
    run = rs.attach(model, PaCA(rank=2))
    run.add("second", PaCA(rank=3))
    run.use("default", "second")
    session = Session("fsdp2", run).steps(2)
    whole = {name: adapter.rows() for name, adapter in run.adapter("second").items()}
    for name, adapter in run.adapter("second").items():
        site = run.sites[name]
        first = site["default"]
        assert site.base.tenant is first
        assert gap(whole[name], site.base.rows() + first.whole_delta() + adapter.whole_delta()) < 1e-12
    run.use("second")
    assert all(site.base.tenant is site["second"] for site in run.sites.values())
    run.use()
    assert torch.equal(evaluate(session.model), evaluate(tiny(F64)))


def test_two_adapters_in_shards(pool: Pool) -> None:
    pool.run(two_at_once)
