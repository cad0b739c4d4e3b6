"""8-bit moments and random rounding on several ranks: replicas agree to the bit, a shard draws its own rows."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import rankshift as rs
from laws import laws
from laws.pool import Pool
from laws.world import VOCAB, Engine, Session, same, scramble, world
from rankshift.core import shard
from rankshift.core.errors import ConfigError
from rankshift.core.method import Method
from rankshift.optim import Adam, Clock, Optimizer, Project
from rankshift.optim.moments import Blocks
from rankshift.optim.transform import Transform

BF16 = torch.bfloat16


class Broad(nn.Module):
    """A language model of 13 words whose matrices are large enough for 8 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, 64)
        self.blocks = nn.ModuleList([nn.Linear(64, 128), nn.Linear(128, 64)])
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(self.norm(x + self.blocks[1](torch.tanh(self.blocks[0](x)))))


def broad(dtype: torch.dtype) -> Broad:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Broad().to(dtype)


def fields(how: str) -> dict[str, object]:
    return {"rank": 32, "moments": "8bit", "rounding": how, "side": "in", "targets": ("blocks.0", "blocks.1")}


def adaptive(how: str) -> rs.AdaRankGrad:
    return rs.AdaRankGrad(**fields(how), energy=0.97, every=2, earliest=1, multiple=8, stagger=False)  # type: ignore[arg-type]


# ---- one tensor


def stepped(transform: Transform, split: bool, dtype: torch.dtype, steps: int = 4) -> dict[str, Tensor]:
    """A weight and its state, whole, after updates on known gradients."""
    g = torch.Generator().manual_seed(0)
    start, gradients = torch.randn(71, 64, generator=g), [torch.randn(71, 64, generator=g) for _ in range(steps)]

    def placed(tensor: Tensor) -> Tensor:
        tensor = tensor.to(dtype)
        return distribute_tensor(tensor, init_device_mesh("cpu", (world(),)), [Shard(0)]) if split else tensor

    p = nn.Parameter(placed(start))
    optimizer = Optimizer([{"params": [p]}], [transform], lr=1e-3, weight_decay=0.1)
    for gradient in gradients:
        p.grad = placed(gradient)
        optimizer.step()
    found = {"weight": p, **optimizer.state[p]}
    return {name: shard.whole(value).clone() for name, value in found.items()}


@pytest.mark.parametrize("size", [40, 64, 256])  # two blocks a row, one, and four rows a block
@pytest.mark.parametrize("how", ["nearest", "stochastic", "master"])
def test_adam_on_shards_is_adam_on_the_whole_to_the_bit(how: str, size: int, pool: Pool) -> None:
    adam = Adam(store=Blocks(size=size), rounding=how)  # type: ignore[arg-type]
    alone = stepped(adam, False, BF16)
    assert alone["exp_avg"].dtype == torch.uint8
    for states in pool.run(stepped, adam, True, BF16):
        same(states, alone, what=how)


@pytest.mark.parametrize("side", ["in", "larger", "smaller"])
def test_projected_rows_on_shards_are_those_of_the_whole(side: str, pool: Pool) -> None:
    """The Gram of two halves is rounded otherwise than that of the whole: nearly all codes are equal, and no more."""
    project = Project(
        rank=32, clock=Clock(2), transport="square", side=side, store=Blocks(size=128), rounding="stochastic"
    )
    alone = stepped(project, False, BF16)
    first, second = pool.run(stepped, project, True, BF16)
    same(first, second)
    assert (first["weight"] == alone["weight"]).double().mean() > 0.99
    assert (first["exp_avg"] == alone["exp_avg"]).double().mean() > 0.99
    assert first["exp_avg"].dtype == torch.uint8


def refused() -> None:
    """A rank of 16 has blocks of 16 rows, and of 71 rows the first rank holds 36."""
    with pytest.raises(ConfigError, match="blocks of 16 rows, and a rank holds 36 of the 71"):
        stepped(Project(rank=16, side="in", store=Blocks()), True, BF16)
    with pytest.raises(ConfigError, match="multiple"):  # at the largest rank it fits, at the smallest it would not
        stepped(Project(rank=64, energy=0.5, side="in", store=Blocks(size=64)), True, BF16)


def unharmed() -> None:
    """Another group's tensors are as they were when one is refused."""
    mesh = init_device_mesh("cpu", (world(),))
    ps = [nn.Parameter(distribute_tensor(torch.ones(71, 64), mesh, [Shard(0)])) for _ in range(2)]
    groups = [{"params": [p]} for p in ps]
    optimizer = Optimizer(groups, [Adam(), Project(rank=16, side="in", store=Blocks())], lr=1e-3)
    for p in ps:
        p.grad = torch.ones_like(p)
    with pytest.raises(ConfigError, match="blocks of 16 rows"):
        optimizer.step()
    assert (shard.whole(ps[0]) == 1).all()


def test_rows_that_do_not_split_into_blocks_are_refused_before_training(pool: Pool) -> None:
    pool.run(refused)
    pool.run(unharmed)


# ---- a model


def trained(engine: Engine, method: Method, steps: int) -> tuple[dict[str, Tensor], bytes, list[tuple[int, ...]]]:
    scramble()
    session = Session(engine, rs.attach(broad(BF16), method))
    ranks = []
    for _ in range(steps):
        session.step()
        ranks.append(tuple(session.run.subspaces.values()))
    state = session.state(whole=True)
    laws.agree(state)
    return state, session.save(), ranks


def resumed(engine: Engine, saved: bytes, steps: int) -> dict[str, Tensor]:
    scramble()
    session = Session.load(saved, engine, broad(BF16)).steps(steps)
    state = session.state(whole=True)
    laws.agree(state)
    return state


@pytest.mark.parametrize("how", ["stochastic", "master"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_ranks_agree_and_resume_exactly(engine: Engine, how: str, pool: Pool) -> None:
    (straight, _, ranks), _ = pool.run(trained, engine, adaptive(how), 6)
    assert len(set(ranks)) > 1
    names = {name for name, value in straight.items() if value.dtype == torch.uint8}
    assert {"blocks.0.weight/exp_avg", "blocks.1.weight/exp_avg_sq"} <= names
    assert not any("norm" in name for name in names)
    (_, saved, _), _ = pool.run(trained, engine, adaptive(how), 3)
    kept = torch.load(io.BytesIO(saved), weights_only=True)
    assert kept
    for state in pool.run(resumed, engine, saved, 3):
        same(state, straight, what=f"{engine}, {how}")


def test_moments_of_two_ranks_are_read_by_four(pool: Pool, pool_of_four: Pool) -> None:
    method = rs.GaLore(**{**fields("master"), "rank": 16})  # type: ignore[arg-type]
    (state, saved, _), _ = pool.run(trained, "fsdp2", method, 3)
    for four in pool_of_four.run(resumed, "fsdp2", saved, 0):
        same(four, state, what="on four")
    assert pool_of_four.run(resumed, "fsdp2", saved, 2)
