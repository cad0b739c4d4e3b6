"""Under DDP and FSDP2 every rank reads one and the same table of subspaces, that of one process."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import rankshift as rs
from laws.laws import Experts
from laws.pool import Pool
from laws.world import Engine, begin, rank, world
from rankshift.core.method import Method
from rankshift.methods import AdaRankGrad, GaLore
from rankshift.summary import Projections


def everywhere(table: Projections) -> Projections:
    """This table, which all ranks must have."""
    tables: list[Projections] = [table] * world()
    dist.all_gather_object(tables, table)
    assert all(other == table for other in tables)
    return table


def read(engine: Engine, method: Method) -> tuple[Projections, str]:
    session = begin(engine, method).steps(4)
    table = everywhere(session.run.subspace_table())
    assert session.run.metrics() == table.means()
    return table, str(session.run.summary())


METHODS = {
    "galore": GaLore(rank=4, every=2),
    "larger side": GaLore(rank=4, every=2, side="larger"),
    "8 bits": GaLore(rank=8, every=2, moments="8bit"),
    "adarankgrad": AdaRankGrad(rank=8, every=2, earliest=1, energy=0.95),
    "projected": AdaRankGrad(rank=8, every=2, earliest=1, energy=0.95, gradient="projected"),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_ranks_read_the_table_of_one_process(engine: Engine, method: Method, pool: Pool) -> None:
    wanted, summary = pool.run(read, "one", method)[0]
    found, said = pool.run(read, engine, method)[0]
    assert [replace(row, energy=0.0) for row in found.rows] == [replace(row, energy=0.0) for row in wanted.rows]
    for row, other in zip(found.rows, wanted.rows, strict=True):
        assert row.energy == pytest.approx(other.energy, rel=1e-4), row.name
    assert said == summary, "bytes are those of whole tensors"


class Mixture(nn.Module):
    """Three experts, of which ranks hold two and one."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layer = Experts(3, 8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def stacked(engine: Engine) -> Projections:
    run = rs.attach(Mixture(), rs.GaLore(rank=2, targets=("layer.weight",)))
    if engine == "fsdp2":
        fully_shard(run.model, mesh=init_device_mesh("cpu", (world(),)))
    optimizer = run.optimizer(lr=1e-3)
    x = torch.arange(96.0).reshape(3, 4, 8).sin() * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    run.model(x).pow(2).sum().backward()
    optimizer.step()
    return everywhere(run.subspace_table())


def test_experts_that_ranks_share_out_have_one_energy(pool: Pool) -> None:
    (wanted,), (found,) = (pool.run(stacked, engine)[0].rows for engine in ("one", "fsdp2"))
    assert found.energy == pytest.approx(wanted.energy, rel=1e-4)
    assert replace(found, energy=0.0) == replace(wanted, energy=0.0)


def differing() -> None:
    table = rs.attach(Mixture(), rs.GaLore(rank=2, targets=("layer.weight",))).subspace_table()
    everywhere(replace(table, step=rank()))


def test_tables_that_differ_are_found(pool: Pool) -> None:
    with pytest.raises(AssertionError):
        pool.run(differing)
