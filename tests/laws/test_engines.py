"""What DDP and FSDP2 demand beyond the laws: uneven shards, mixed dtypes, switching, refusals, other worlds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

import rankshift as rs
from laws import laws
from laws.faults import Do
from laws.pool import Pool
from laws.pulse import Pulse, registered
from laws.world import Engine, Session, batch, begin, evaluate, gap, loss_of, rank, same, tiny, world, wrap
from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Dense
from rankshift.core.event import Event, Moment, Tick
from rankshift.core.method import Method
from rankshift.core.site import form_of
from rankshift.methods import AdaRankGrad, FlatLoRA, Full, LoRA, MELoRA

# ---- core/shard.py ---------------------------------------------------------------------------------------------------


def sharded(value: Tensor) -> DTensor:
    return distribute_tensor(value, init_device_mesh("cpu", (world(),)), [Shard(0)])


def shard_file(sizes: tuple[int, ...]) -> list[tuple[int, int]]:
    """whole, local, assign_, spread, pick, any_rank, any_part on tensors of these many rows."""
    parts = []
    for n in sizes:
        value = torch.arange(3.0 * n).reshape(n, 3)
        tensor = sharded(value.clone())
        part, rows = shard.local(tensor)
        parts.append((rows.start, rows.stop))
        assert torch.equal(part, value[rows])
        assert part.untyped_storage().data_ptr() == tensor.to_local().untyped_storage().data_ptr()
        assert torch.equal(shard.whole(tensor), value)
        assert shard.is_sharded(tensor)
        assert not shard.is_sharded(value)
        shard.assign_(tensor, value + 1)
        assert torch.equal(shard.whole(tensor), value + 1)
        again = shard.spread(value * 2, tensor)
        assert again.placements == tensor.placements
        assert torch.equal(shard.whole(again), value * 2)
        at = torch.tensor([0, value.numel() - 1, value.numel() // 2])
        assert torch.equal(shard.pick(again, at), (value * 2).flatten()[at])
        assert shard.any_part(torch.tensor(rank() == 0), tensor) is True
        assert shard.any_part(torch.tensor(False), tensor) is False
    assert shard.local(torch.tensor(2.0))[1] == slice(0, 1)
    assert shard.any_rank(rank() == world() - 1, torch.device("cpu"))
    assert not shard.any_rank(False, torch.device("cpu"))
    assert shard.from_first(rank()) == 0
    assert shard.first_apart([torch.ones(2), tensor]) is None
    assert shard.first_apart([torch.ones(2), tensor, torch.full((2,), float(rank()))]) == 2
    column = distribute_tensor(torch.zeros(4, 4), init_device_mesh("cpu", (world(),)), [Shard(1)])
    with pytest.raises(NotImplementedError, match="axis 0"):
        shard.local(column)
    strided = DTensor.from_local(torch.zeros(2, 4), column.device_mesh, [_StridedShard(0, split_factor=2)])
    with pytest.raises(NotImplementedError, match="axis 0"):  # tensor parallelism below FSDP2
        shard.local(strided)
    return parts


def test_shard_on_uneven_and_empty_parts(pool: Pool) -> None:
    first, second = pool.run(shard_file, (4, 5, 1))
    assert first == [(0, 2), (0, 3), (0, 1)]
    assert second == [(2, 4), (3, 5), (1, 1)], "the second rank holds nothing of a tensor with one row"


def test_shard_on_four_ranks(pool_of_four: Pool) -> None:
    parts = pool_of_four.run(shard_file, (6, 3))
    assert [p[0] for p in parts] == [(0, 2), (2, 4), (4, 6), (6, 6)]


def add_to_shards() -> None:
    """Base.add_ asks each rank for its own rows, for every way a weight is stored."""
    for layer in (nn.Linear(4, 5), nn.Linear(4, 1), nn.Embedding(5, 4), nn.Conv2d(2, 3, 3)):
        torch.manual_seed(0)
        for parameter in layer.parameters():
            nn.init.normal_(parameter)
        form = form_of(layer)
        assert form is not None
        base = Dense(layer, form)
        before = base.rows()
        change = torch.randn(before.shape, generator=torch.Generator().manual_seed(1))
        asked: list[slice] = []

        def delta(rows: slice, change: Tensor = change, asked: list[slice] = asked) -> Tensor:
            asked.append(rows)
            return change[rows]

        fully_shard(base, mesh=init_device_mesh("cpu", (world(),)))
        assert shard.is_sharded(base.weight)
        assert not base.changed
        base.add_(delta)
        assert base.changed
        assert torch.equal(base.rows(), before + change)
        if isinstance(layer, nn.Linear):
            mine = shard.local(base.weight)[1]
            assert asked == ([mine] if mine.stop > mine.start else []), "only the rows held here are asked for"


def test_adding_to_a_sharded_weight(pool: Pool) -> None:
    pool.run(add_to_shards)


# ---- verbs under FSDP2 -----------------------------------------------------------------------------------------------


def verbs() -> None:
    """Rank-1 factors over two ranks, after an evaluation that leaves the root's parameters gathered."""
    plain = tiny()
    session = begin("fsdp2", LoRA(rank=1, alpha=2, bias="lora_only")).steps(3)
    run, model = session.run, session.model
    trained = evaluate(model)
    with run.disabled():
        assert torch.equal(evaluate(model), evaluate(plain))
    assert torch.equal(evaluate(model), trained)
    with run.merged():
        assert gap(evaluate(model), trained) < 1e-5
        model.reshard()  # type: ignore[operator]
        assert gap(evaluate(model), trained) < 1e-5
    model.reshard()  # type: ignore[operator]
    assert torch.equal(evaluate(model), trained)
    alone = begin("one", LoRA(rank=1, alpha=2, bias="lora_only"), check=False).run
    assert str(run.summary()) == str(alone.summary()), "counts are those of whole tensors"
    a, b = run.state_dict()["tensors"], alone.state_dict()["tensors"]
    assert {n: t.shape for n, t in a.items()} == {n: t.shape for n, t in b.items()}, "state_dict is whole"
    assert not any(isinstance(t, DTensor) for t in a.values())
    other = begin("fsdp2", LoRA(rank=1, alpha=2, bias="lora_only"))
    evaluate(other.model)
    other.run.load_state_dict(run.state_dict())
    other.model.reshard()  # type: ignore[operator]  # what was written to a gathered copy would be lost now
    assert torch.equal(evaluate(other.model), trained), "after an evaluation values load into shards"
    merged = run.merge()
    assert gap(evaluate(merged), trained) < 1e-5
    loss_of(merged.train(), batch(0)).backward()


def test_verbs_on_a_sharded_model(pool: Pool) -> None:
    pool.run(verbs)


def _ones(adapter: Adapter, tick: Tick) -> None:
    shard.local(adapter.B)[0].fill_(1)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Setting(LoRA):
    """B is one at the beginning of every update."""

    def events(self) -> tuple[Event, ...]:
        return (Do(_ones, Moment.WINDOW),)


def event_after_evaluation() -> None:
    session = begin("fsdp2", Setting(rank=2))
    with torch.no_grad():
        for adapter in session.run.adapter().values():
            shard.local(adapter.B)[0].zero_()  # type: ignore[arg-type]
    evaluate(session.model)  # leaves the root's parameters gathered
    session.optimizer.load_state_dict(session.optimizer.state_dict())  # opens the window
    session.model.reshard()  # type: ignore[operator]
    for name, tensor in session.run.state_dict()["tensors"].items():
        assert not name.endswith(".B") or bool((tensor == 1).all()), name


def test_an_event_after_an_evaluation_writes_to_shards(pool: Pool) -> None:
    pool.run(event_after_evaluation)


def switching() -> None:
    """A second adapter added before sharding: use() switches what acts and what trains, on shards."""
    model = tiny()
    run = rs.attach(model, LoRA(rank=2))
    run.add("second", LoRA(rank=3, init="pissa"))
    run.use("default", "second")
    session = Session("fsdp2", run).steps(2)
    both = evaluate(model)
    run.use("second")
    assert not torch.equal(evaluate(model), both)
    assert {name.split(":")[0] for name, _ in run.trainable()} == {"second"}
    session.optimizer = run.optimizer(lr=1e-2)
    before = run.state_dict()["tensors"]
    session.scheduler = torch.optim.lr_scheduler.LambdaLR(session.optimizer, lambda n: 1.0)
    session.step()
    after = run.state_dict()["tensors"]
    moved = {name.split("/")[0] for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"second"}


def test_two_adapters_on_a_sharded_model(pool: Pool) -> None:
    pool.run(switching)


def clipping() -> float:
    session = begin("fsdp2", LoRA(rank=3), torch.float64)
    loss_of(session.wrapped, batch(0).chunk(world())[rank()]).backward()
    parameters = [p for _, p in session.run.trainable()]
    norm = torch.nn.utils.clip_grad_norm_(parameters, 0.01)
    whole = torch.stack([shard.whole(p.grad).norm() for p in parameters]).norm()
    assert abs(whole.item() - 0.01) < 1e-8
    return norm.full_tensor().item()


def test_clipping_sees_the_whole_norm(pool: Pool) -> None:
    session = begin("one", LoRA(rank=3), torch.float64)
    loss_of(session.wrapped, batch(0)).backward()
    norm = torch.nn.utils.clip_grad_norm_([p for _, p in session.run.trainable()], 1e9).item()
    for other in pool.run(clipping):
        assert abs(other - norm) < 1e-12


def poisoned(engine: Engine) -> None:
    """A NaN in the data of one rank: every rank skips that update, counts it and goes on as if it had not been."""
    session = begin(engine, LoRA(rank=1)).steps(1)
    before, clock = session.state(), session.run.step
    loss = loss_of(session.wrapped, batch(9).chunk(world())[rank()])
    (loss * (float("nan") if rank() == 1 else 1.0)).backward()
    session.optimizer.step()
    after = session.state()
    assert (session.run.step, session.run.skipped) == (clock, 1)
    for state in (before, after):
        state.pop("clock")
    same(before, after, what="a skipped update")
    session.optimizer.zero_grad()
    session.step()
    assert session.run.step == clock + 1
    laws.agree(session.state(whole=True))


def poisoned_in_one_shard() -> None:
    """A NaN in a gradient that only rank 0 holds: the other must skip too."""
    session = begin("fsdp2", LoRA(rank=1)).steps(1)
    loss_of(session.wrapped, batch(9).chunk(world())[rank()]).backward()
    parameter = session.run.adapter()["blocks.0.q"].A
    assert parameter.grad is not None
    part = parameter.grad.to_local()
    assert part.numel() == (12 if rank() == 0 else 0)
    part.fill_(float("inf"))
    session.optimizer.step()
    assert (session.run.step, session.run.skipped) == (1, 1)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_nan_on_one_rank_is_skipped_on_all(engine: Engine, pool: Pool) -> None:
    pool.run(poisoned, engine)


def test_an_inf_in_one_shard_is_skipped_on_all(pool: Pool) -> None:
    pool.run(poisoned_in_one_shard)


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def mixed(method: Method, policy: MixedPrecisionPolicy | None) -> Tensor:
    """A bf16 base with fp32 factors in one FSDP2 group; every B after 6 updates, flat."""
    session = begin("fsdp2", method, torch.bfloat16, total=6, policy=policy)
    assert {p.dtype for p in session.model.parameters()} == {torch.bfloat16, torch.float32}
    session.steps(6)
    for name, parameter in session.run.trainable():
        assert parameter.dtype == torch.float32, name
        assert all(v.dtype == torch.float32 for v in session.optimizer.state[parameter].values()), name
    state = session.state(whole=True)
    laws.agree(state)
    return learnt(state)


def learnt(state: dict[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for name, tensor in sorted(state.items()) if name.endswith("default.B")])


@pytest.mark.parametrize("low", [False, True], ids=["as stored", "MixedPrecisionPolicy"])
@pytest.mark.parametrize(
    "method",
    [
        LoRA(rank=4, alpha=8),
        MELoRA(rank=2, blocks=2, alpha=4, exclude=("head",)),
        FlatLoRA(rank=4, alpha=8, sigma=0.3),
    ],
    ids=lambda method: method.name,
)
def test_a_bf16_base_with_fp32_factors(method: Method, low: bool, pool: Pool) -> None:
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if low else None
    alone = learnt(begin("one", method, torch.bfloat16, total=6).steps(6).state(whole=True))
    sharded = pool.run(mixed, method, policy)[0]
    # bf16 products carry 2⁻⁸, and Adam's first steps are of the size of lr whatever the gradient's: directions agree
    assert torch.nn.functional.cosine_similarity(sharded, alone, dim=0) > 0.98
    assert alone.norm() > 0.1


def mixed_biases() -> str:
    run = rs.attach(tiny(torch.bfloat16), LoRA(rank=2, bias="lora_only"))
    wrap("fsdp2", run.model)
    with pytest.raises(rs.errors.ConfigError) as error:
        run.optimizer()
    return str(error.value)


def test_two_dtypes_in_one_site_are_refused_before_the_first_forward(pool: Pool) -> None:
    for text in pool.run(mixed_biases):
        assert text.startswith("blocks.0.q trains tensors in bfloat16 and float32, and FSDP2 takes one dtype")


# ---- DDP -------------------------------------------------------------------------------------------------------------


def ddp_options(**options: Any) -> dict[str, Tensor]:
    with registered(Pulse()):
        run = rs.attach(tiny(torch.float64), Pulse(rank=2))
        session = Session("one", run, check=False)
        session.wrapped, session.engine = DistributedDataParallel(session.model, **options), "ddp"
        return session.steps(4).state(whole=True)


def test_ddp_options_change_nothing(pool: Pool) -> None:
    plain = pool.run(ddp_options, broadcast_buffers=False)
    same(plain[0], plain[1], what="ranks")
    same(plain[0], pool.run(ddp_options, broadcast_buffers=True)[1], what="broadcast_buffers")
    same(plain[0], pool.run(ddp_options, broadcast_buffers=False, static_graph=True)[1], what="static_graph")
    same(plain[0], pool.run(ddp_options, broadcast_buffers=False, find_unused_parameters=True)[1], what="find_unused")


def wrapped_too_early() -> tuple[str, str]:
    """A wrapper from before a change of phase averages nothing of what is new; no wrapper at all averages nothing."""
    found = []
    session = begin("ddp", Full(targets=("head",))).steps(1)
    run = session.run.shift(LoRA(rank=2))
    stale = Session("one", run)
    stale.wrapped, stale.engine = session.wrapped, "ddp"
    bare = begin("one", LoRA(rank=2))
    bare.engine = "ddp"
    for wrong in (stale, bare):
        with pytest.raises(rs.errors.TrainingError) as error:
            wrong.step()
        found.append(str(error.value))
    return found[0], found[1]


def test_gradients_that_nothing_averages_are_found(pool: Pool) -> None:
    for text in (t for texts in pool.run(wrapped_too_early) for t in texts):
        assert "differs between ranks" in text
        assert "Wrap the model" in text


# ---- other worlds ----------------------------------------------------------------------------------------------------

METHODS: list[Method] = [
    LoRA(rank=3, alpha=6, bias="lora_only", modules_to_save=("head",)),
    Full(),
    Pulse(rank=3),
    AdaRankGrad(rank=6, every=2, earliest=1),
]


def save_after(engine: Engine, method: Method, steps: int) -> bytes:
    with registered(method):
        return begin(engine, method, torch.float64, blocks=2).steps(steps).save()


def resume_from(saved: bytes, engine: Engine, method: Method, steps: int) -> dict[str, Tensor]:
    with registered(method):
        session = Session.load(saved, engine, tiny(torch.float64, blocks=2)).steps(steps)
        assert session.run.step == 2 + steps
        state = session.state(whole=True)
        if dist.is_initialized():
            laws.agree(state)
        return state


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_save_on_two_resume_on_four(engine: Engine, method: Method, pool: Pool, pool_of_four: Pool) -> None:
    saved = pool.run(save_after, engine, method, 2)[0]
    with registered(method):
        straight = begin("one", method, torch.float64, blocks=2).steps(4).state(whole=True)
    four = pool_of_four.run(resume_from, saved, engine, method, 2)
    same(four[3], straight, laws.RANKS, "resumed on four")


def test_a_save_of_two_ranks_under_ddp_resumes_alone(pool: Pool) -> None:
    for method in METHODS:
        saved = pool.run(save_after, "ddp", method, 2)[0]
        with registered(method):
            straight = begin("one", method, torch.float64, blocks=2).steps(4).state(whole=True)
        same(resume_from(saved, "one", method, 2), straight, laws.RANKS, f"{method.name} resumed on one")


def rehearse() -> None:
    """torch.distributed.checkpoint makes optimizer state by a step on zero gradients: no event, no count, no trace."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    method = Pulse(rank=2, every=1)
    with registered(method):
        session = begin("fsdp2", method)
        before = session.run.state_dict()["tensors"]
        get_optimizer_state_dict(session.model, session.optimizer)
        same(before, session.run.state_dict()["tensors"], what="a rehearsal")
        assert session.run.step == 0
        states = session.optimizer.state
        assert states, "it did make state"
        assert all(not shard.whole(v).any() for state in states.values() for v in state.values()), "which is untouched"


def test_a_rehearsal_fires_nothing(pool: Pool) -> None:
    pool.run(rehearse)


# ---- refusals --------------------------------------------------------------------------------------------------------


def refusals() -> None:
    model = wrap("fsdp2", tiny())
    names = [name for name, _ in model.named_parameters()]
    with pytest.raises(rs.errors.AttachError, match="Attach first, then fully_shard"):
        rs.attach(model, LoRA(rank=2))
    assert [name for name, _ in model.named_parameters()] == names
    ddp = DistributedDataParallel(tiny())
    with pytest.raises(rs.errors.AttachError, match=r"\.module"):
        rs.attach(ddp, LoRA(rank=2))


def test_attach_after_wrapping_is_refused(pool: Pool) -> None:
    pool.run(refusals)
