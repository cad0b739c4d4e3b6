"""Projected gradients on several ranks: one basis for all, decided once; state that follows a rank through files."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import rankshift as rs
from laws import laws
from laws.pool import Pool
from laws.world import VOCAB, Engine, Session, batch, begin, gap, loss_of, rank, same, scramble, tiny, world, wrap
from rankshift.core import shard
from rankshift.core.form import ExpertsForm, Form
from rankshift.core.method import Method
from rankshift.methods import AdaRankGrad, GaLore
from rankshift.optim import Optimizer, project, subspace

F64 = torch.float64
FALLS = AdaRankGrad(rank=6, every=2, earliest=1)  # ranks of 2 to 5 that rise and fall in every update


# ---- every kind of layer ---------------------------------------------------------------------------------------------


class Kinds(nn.Module):
    """A layer of each kind, none of which two or four ranks share evenly; of one of them some hold nothing."""

    def __init__(self) -> None:
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.blocks = nn.ModuleList()
        self.embed = nn.Embedding(VOCAB, 6)
        self.linear = nn.Linear(6, 7)
        self.conv = nn.Conv1d(7, 5, 3, padding=1)
        self.transposed = Conv1D(30, 5)  # 5 → 30
        self.experts = laws.Experts(3, 30, 24)  # sides of which a sketch of 2 + 8 directions knows not all
        self.row = nn.Linear(24, 1)
        self.head = nn.Linear(24, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        x = torch.tanh(self.linear(self.embed(ids)))
        x = torch.tanh(self.conv(x.mT).mT.contiguous())
        x = torch.tanh(self.transposed(x))
        x = torch.tanh(self.experts(x.flatten(0, 1).expand(3, -1, -1)).sum(0).view(*ids.shape, 24) / 5)
        return self.head(x + self.row(x))


TARGETS = ("linear", "conv", "transposed", "experts.weight", "row")
SETTINGS: list[Method] = [
    GaLore(rank=2, every=2, targets=TARGETS),
    GaLore(rank=3, every=1, targets=TARGETS, side="in", finder="eigh", transport="centred", residual="fira"),
    GaLore(rank=2, every=2, targets=TARGETS, side="larger", finder="svd", stagger=False),
    GaLore(rank=2, every=1, targets=TARGETS, finder="warm", transport="square"),
    AdaRankGrad(rank=6, every=1, earliest=1, targets=TARGETS),
    AdaRankGrad(rank=6, every=1, earliest=1, targets=TARGETS, side="in", finder="svd", transport="reset"),
    GaLore(rank=2, every=1, targets=TARGETS, transport="centred", gradient="projected"),
    AdaRankGrad(rank=6, every=1, earliest=1, targets=TARGETS, side="larger", gradient="projected"),
]


def kinds(engine: Engine, method: Method, steps: int, accumulate: int = 1) -> dict[str, Tensor]:
    """The whole state after some updates, equal on all ranks."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = Kinds().to(F64)
    scramble()
    session = Session(engine, rs.attach(model, method, total_steps=steps), accumulate, check=engine != "one")
    state = session.steps(steps).state(whole=True)
    assert len(session.run.subspaces) == len(TARGETS)
    if dist.is_initialized():
        laws.agree(state)
    return state


@pytest.mark.parametrize("method", SETTINGS, ids=lambda m: f"{m.name}-{m.side}-{m.finder}-{m.gradient}")
def test_every_kind_of_layer_in_uneven_shards(method: Method, pool: Pool, pool_of_four: Pool) -> None:
    alone = kinds("one", method, 3)
    same(pool.run(kinds, "fsdp2", method, 3, 2)[1], alone, laws.RANKS, "two ranks, two passes an update")
    same(pool_of_four.run(kinds, "fsdp2", method, 3)[3], alone, laws.RANKS, "four ranks")


@pytest.mark.parametrize("method", [SETTINGS[0], SETTINGS[4], *SETTINGS[6:]], ids=lambda m: f"{m.name}-{m.gradient}")
def test_copies_of_shards(method: Method, pool_of_four: Pool) -> None:
    same(pool_of_four.run(kinds, "hsdp", method, 3)[3], kinds("one", method, 3), laws.RANKS, "two copies of two parts")


@pytest.mark.parametrize("method", [SETTINGS[0], SETTINGS[4], *SETTINGS[6:]], ids=lambda m: f"{m.name}-{m.gradient}")
def test_every_kind_of_layer_under_ddp(method: Method, pool: Pool) -> None:
    same(pool.run(kinds, "ddp", method, 3, 2)[1], kinds("one", method, 3), laws.RANKS, "under DDP")


def stepped(
    transform: project.Project, shape: tuple[int, ...], split: bool, loudness: Tensor | None = None
) -> dict[str, Tensor]:
    """A weight and its state, whole, after updates on noise, which has no direction that every sketch would find.

    ``loudness``: (updates, axis 0), what the gradient of each row is multiplied by. Beside the last state there is
    what those numbers of it were after every update that tell what was decided.
    """
    generator = torch.Generator().manual_seed(0)

    def noise(loudness: Tensor | None = None) -> Tensor:
        tensor = torch.randn(*shape, generator=generator, dtype=F64)
        if loudness is not None:
            tensor = tensor * loudness.view(-1, *(1 for _ in shape[1:]))
        return distribute_tensor(tensor, init_device_mesh("cpu", (world(),)), [Shard(0)]) if split else tensor

    p = nn.Parameter(noise())
    optimizer = Optimizer([{"params": [p]}], [transform], lr=1e-2)
    course: dict[str, list[Tensor]] = {"limit": [], "pace": [], "renewals": []}
    for loud in [None] * 3 if loudness is None else loudness:
        p.grad = noise(loud)
        optimizer.step()
        for key in course.keys() & optimizer.state[p].keys():
            course[key].append(optimizer.state[p][key].clone())
    found = {name: shard.whole(value).clone() for name, value in {"weight": p, **optimizer.state[p]}.items()}
    return found | {f"course of {key}": torch.stack(values) for key, values in course.items() if values}


PARTS = pytest.mark.parametrize(
    ("form", "shape"),
    [(Form(), (25, 30)), (Form(), (30, 25)), (ExpertsForm(3), (3, 30, 24))],
    ids=["columns", "rows", "matrices"],
)


@pytest.mark.parametrize("finder", ["range", "warm"])
@PARTS
def test_a_sketch_is_that_of_the_whole(form: Form, shape: tuple[int, ...], finder: str, pool_of_four: Pool) -> None:
    transform = project.Project(rank=3, clock=project.Clock(1), finder=finder, transport="square", form=form)  # type: ignore[arg-type]
    alone = stepped(transform, shape, False)
    assert 0 < float(alone["energy"]) < 0.6
    for states in pool_of_four.run(stepped, transform, shape, True):
        same(states, alone, laws.RANKS, "on four ranks")


@PARTS
def test_what_limits_a_residual_is_the_norm_over_all_ranks(
    form: Form, shape: tuple[int, ...], pool: Pool, pool_of_four: Pool
) -> None:
    """In updates where it binds and in others; every part's norm takes a course of its own."""
    transform = project.Project(rank=3, clock=project.Clock(0), residual=True, form=form)
    loudness = torch.ones(8, shape[0], dtype=F64)
    alone = stepped(transform, shape, False, loudness)
    grown = alone["course of limit"][1:] / alone["course of limit"][:-1]
    bound = (grown - 1.01).abs() < 1e-9
    assert 2 <= bound.sum() < 7
    for ranks in (pool, pool_of_four):
        for states in ranks.run(stepped, transform, shape, True, loudness):
            same(states, alone, laws.RANKS, f"on {ranks.size} ranks")


# ---- one decision ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def another_library() -> Iterator[None]:
    """On every rank but the first a factorisation that gives other directions, other energies and so other ranks."""
    found = subspace.find

    def find(*args: Any, **options: Any) -> subspace.Basis:
        basis = found(*args, **options)
        if rank() == 0:
            return basis
        energies = None if basis.energies is None else basis.energies * 0.9
        return subspace.Basis(-basis.vectors.roll(1, -1), energies, basis.total)

    with mock.patch.object(subspace, "find", find):
        yield


def decided_apart(engine: Engine, shared: bool) -> str:
    """What is said of four updates on ranks whose libraries differ; "" if they agree to the bit."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(another_library())
        if not shared:
            stack.enter_context(mock.patch.object(shard, "from_rank_zero", lambda tensor, *args: tensor))
            method: Method = GaLore(rank=3, every=2)  # of one rank, so that no collective meets another of its shape
        else:
            method = FALLS
        try:
            laws.agree(begin(engine, method, F64).steps(4).state(whole=True))
        except AssertionError as error:
            return str(error)
    return ""


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_the_first_rank_decides(engine: Engine, pool: Pool) -> None:
    assert pool.run(decided_apart, engine, True) == ["", ""]
    assert "different bits" in pool.run(decided_apart, engine, False)[0], "a library that differs was not noticed"


def in_parts(method: Method, averaged: tuple[bool, ...] | None) -> dict[str, Tensor]:
    """The plain weights after updates of two passes each, of which DDP averages those that are to be; None: alone."""
    run = rs.attach(tiny(F64), method)
    model = run.model.train() if averaged is None else wrap("ddp", run.model.train())
    optimizer = run.optimizer(lr=1e-2, eps=1e-6, check_gradients=False)
    for update, average in enumerate(averaged or [False] * 5):
        for part in (0, 1):
            last = average and part == 1
            with contextlib.nullcontext() if averaged is None or last else model.no_sync():  # type: ignore[operator]
                loss_of(model, batch(100 * update + 10 * part + rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in run.merge().named_parameters()}


@pytest.mark.parametrize("averaged", [(False,) * 5, (True, False, True, False, False)], ids=["never", "at times"])
def test_ranks_that_train_apart_do_so_alike_in_both_forms(averaged: tuple[bool, ...], pool: Pool) -> None:
    """What a renewal hears is averaged where gradients are, and not where DDP was kept out of the whole window."""
    full = GaLore(rank=3, every=1, stagger=False, transport="square")
    ordinary = pool.run(in_parts, full, averaged)
    projected = pool.run(in_parts, replace(full, gradient="projected"), averaged)
    for mine, theirs in zip(projected, ordinary, strict=True):
        same(mine, theirs, laws.RANKS)
    assert min(gap(ordinary[0][name], ordinary[1][name]) for name in ordinary[0] if "weight" in name) > 1e-4
    if not any(averaged):  # bases are the first rank's
        same(projected[0], in_parts(full, None), laws.RANKS)


# ---- what is sent ----------------------------------------------------------------------------------------------------


def sent(method: Method, updates: int) -> list[dict[str, list[int]]]:
    """For each update, how many numbers went into every reduction, broadcast and gathering beside FSDP2's own."""
    session = begin("fsdp2", method, F64)
    found: list[dict[str, list[int]]] = []

    def counted(name: str, plain: Any) -> Any:
        def call(tensor: Tensor, *args: Any, **options: Any) -> Any:
            found[-1].setdefault(name, []).append(tensor.numel())
            return plain(tensor, *args, **options)

        return call

    with (
        mock.patch.object(dist, "all_reduce", counted("reduced", dist.all_reduce)),
        mock.patch.object(dist, "broadcast", counted("shared", dist.broadcast)),
        mock.patch.object(DTensor, "full_tensor", counted("gathered", DTensor.full_tensor)),
    ):
        for _ in range(updates):
            found.append({})
            session.step()
    return found


def test_small_matrices_are_reduced_and_no_gradient_is_gathered(pool: Pool) -> None:
    method = GaLore(rank=2, every=2, side="in", finder="eigh", stagger=False, rest="freeze", targets=("up",))
    gram = pool.run(sent, method, 4)[0]
    between = {"reduced": [1]}  # whether all gradients are finite
    assert gram[1] == gram[3] == between
    # up is 18 × 12: its norm, its Gram and how much of the norm X has; a basis of two directions, energies, the norm
    assert gram[2] == {"reduced": [1, 1, 144, 1], "shared": [12 * 2, 2, 1]}
    sketch = pool.run(sent, replace(method, finder="range"), 3)[0]
    assert sketch[1] == between
    assert sketch[0]["reduced"][-4:] == [1, 12 * 10, 10 * 10, 1]
    assert sketch[0]["shared"] == [12 * 10, 10, 1]
    assert sketch[2] == {"reduced": [1, 1, 12 * 10, 10 * 10, 1], "shared": [12 * 10, 10, 1]}


def test_a_split_projected_side_sends_what_is_projected(pool: Pool) -> None:
    method = GaLore(rank=2, every=2, stagger=False, rest="freeze", targets=("down",))
    first, second, *_ = pool.run(sent, method, 2)[0]
    assert first["gathered"] == [12 * 18], "a basis for what is split takes the whole gradient, once"
    assert second == {"reduced": [1, 18 * 2]}, "between renewals X alone"


# ---- a rehearsal -----------------------------------------------------------------------------------------------------


def rehearse(method: Method) -> None:
    """What torch.distributed.checkpoint does to make state: as init made it, nothing decomposed, nothing decided."""
    session = begin("fsdp2", method)
    with mock.patch.object(subspace, "find", side_effect=AssertionError("a subspace was sought")):
        dcp.get_optimizer_state_dict(session.model, session.optimizer)
    assert session.run.step == 0
    for _, p in session.run.trainable():
        state, wanted = session.optimizer.state[p], session.optimizer.initial(p)
        assert state.keys() == wanted.keys()
        assert all(torch.equal(shard.held(state[key]), shard.held(wanted[key])) for key in wanted)
    again = begin("fsdp2", method).steps(3)
    same(session.steps(3).state(), again.state(), what="after a rehearsal")


def test_a_rehearsal_seeks_no_subspace(pool: Pool) -> None:
    pool.run(rehearse, FALLS)


# ---- through files ---------------------------------------------------------------------------------------------------


def save_shards(session: Session, folder: str) -> bytes:
    """Optimizer shards in a directory, as torch.distributed.checkpoint writes them; the rest as bytes."""
    optimizer = dcp.get_optimizer_state_dict(session.model, session.optimizer)
    torch.distributed.checkpoint.save({"optimizer": optimizer}, checkpoint_id=folder)
    buffer = io.BytesIO()
    torch.save({"run": session.run.state_dict(), "scheduler": session.scheduler.state_dict()}, buffer)
    return buffer.getvalue()


def load_shards(saved: bytes, folder: str, model: nn.Module) -> Session:
    state = torch.load(io.BytesIO(saved), weights_only=True)
    session = Session("fsdp2", rs.restore(model, state["run"]))
    optimizer = dcp.get_optimizer_state_dict(session.model, session.optimizer)  # a rehearsal makes it, in saved ranks
    torch.distributed.checkpoint.load({"optimizer": optimizer}, checkpoint_id=folder)
    dcp.set_optimizer_state_dict(session.model, session.optimizer, optimizer)
    session.scheduler.load_state_dict(state["scheduler"])
    return session


def resume_shards(method: Method, folder: str) -> None:
    straight, session = begin("fsdp2", method), begin("fsdp2", method)
    ranks, saved = [], []
    for k in range(5):
        saved.append(save_shards(session, f"{folder}/{k}"))
        straight.step()
        session.step()
        ranks.append(straight.run.subspaces)
    assert ranks[0] != ranks[1] != ranks[2], "the case changes no rank"
    same(straight.state(), session.state(), what="saving changed the training")
    for k in range(5):
        scramble()
        resumed = load_shards(saved[k], f"{folder}/{k}", tiny())
        assert resumed.run.subspaces == (ranks[k - 1] if k else {}) or k == 0
        same(straight.state(), resumed.steps(5 - k).state(), what=f"resumed at {k} of 5")


def test_resume_from_a_directory_of_shards(pool: Pool, tmp_path: Path) -> None:
    pool.run(resume_shards, FALLS, str(tmp_path))


def broadcast_from_the_first(method: Method) -> None:
    """As accelerate loads: the first rank has read the whole state, the others get it from there."""
    straight = begin("fsdp2", method).steps(4)
    session = begin("fsdp2", method).steps(2)
    options = dcp.StateDictOptions(full_state_dict=True, cpu_offload=True)
    optimizer = dcp.get_optimizer_state_dict(session.model, session.optimizer, options=options)
    assert bool(optimizer) == (rank() == 0)
    state, scheduler = session.run.state_dict(), session.scheduler.state_dict()
    late = begin("fsdp2", method)  # its optimizer is made before the run knows ranks
    late.run.load_state_dict(state)
    options = dcp.StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    for resumed in (Session("fsdp2", rs.restore(tiny(), state)), late):
        dcp.set_optimizer_state_dict(resumed.model, resumed.optimizer, optimizer, options=options)
        resumed.scheduler.load_state_dict(scheduler)
        same(straight.state(), resumed.steps(2).state(), what="resumed from the first rank's state")


def test_resume_from_what_one_rank_has_read(pool: Pool) -> None:
    pool.run(broadcast_from_the_first, FALLS)


def save_two(method: Method, folder: str) -> bytes:
    return save_shards(begin("fsdp2", method, F64, blocks=2).steps(2), folder)


def resume_four(method: Method, saved: bytes, folder: str) -> dict[str, Tensor]:
    state = load_shards(saved, folder, tiny(F64, blocks=2)).steps(2).state(whole=True)
    laws.agree(state)
    return state


@pytest.mark.parametrize("method", [FALLS, GaLore(rank=3, every=2, residual="fira")], ids=lambda m: m.name)
def test_shards_of_two_ranks_resume_on_four(method: Method, pool: Pool, pool_of_four: Pool, tmp_path: Path) -> None:
    straight = begin("one", method, F64, blocks=2).steps(4).state(whole=True)
    saved = pool.run(save_two, method, str(tmp_path))[0]
    four = pool_of_four.run(resume_four, method, saved, str(tmp_path))
    same(four[3], straight, laws.RANKS, "resumed on four")


# ---- convergence -----------------------------------------------------------------------------------------------------

CALMS = AdaRankGrad(rank=6, every=0, earliest=3, kappa=0.99)


def converged(engine: Engine, k: int, method: Method) -> tuple[dict[str, Tensor], list[int]]:
    """26 updates, through a file at ``k``; and how often each basis was renewed."""
    session = begin(engine, method, F64, total=26, lr=1e-3).steps(k)
    session = Session.load(session.save(), engine, tiny(F64), lr=1e-3).steps(26 - k)
    states = [session.optimizer.state[p] for _, p in session.run.trainable()]
    return session.state(whole=True), [int(state["renewals"]) for state in states if "renewals" in state]


@pytest.mark.parametrize("gradient", ["full", "projected"])
def test_convergence_renews_alike_on_all_ranks_and_after_a_resume(
    gradient: str, pool: Pool, pool_of_four: Pool
) -> None:
    method = replace(CALMS, gradient=gradient)
    alone, renewals = converged("one", 0, method)
    assert max(renewals) > 1, "no subspace has converged"
    assert min(renewals) < max(renewals), "all have, at once"
    ways = [converged("one", 9, method), pool.run(converged, "ddp", 8, method)[1]]
    ways.append(pool_of_four.run(converged, "fsdp2", 11, method)[3])  # 18 rows: 5, 5, 5 and 3
    for found in ways:
        assert found[1] == renewals
        same(found[0], alone, laws.RANKS)


@PARTS
@pytest.mark.parametrize("energy", [None, 0.5])
def test_convergence_is_that_of_the_whole_in_uneven_parts(
    form: Form, shape: tuple[int, ...], energy: float | None, pool_of_four: Pool
) -> None:
    """Rows die down one after the other, so that every rank by itself would renew in another update."""
    loudness = torch.ones(32, shape[0], dtype=F64)
    for row in range(shape[0]):
        loudness[5 + 12 * row // shape[0] :, row] = 0.02
    clock = project.Clock(0, earliest=6, kappa=0.5, look=2)
    transform = project.Project(rank=4, energy=energy, clock=clock, transport="square", form=form)
    alone = stepped(transform, shape, False, loudness)
    renewed = (alone["course of renewals"].diff() > 0).nonzero()[:, 0] + 1
    assert len(renewed) == 1
    assert renewed[0] > 20, "it is not the first rows alone that decide"
    for states in pool_of_four.run(stepped, transform, shape, True, loudness):
        same(states, alone, laws.RANKS, "on four ranks")


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def mixed(method: Method) -> dict[str, Tensor]:
    """fp32 shards, a bf16 compute copy, gradients reduced in fp32."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    session = begin("fsdp2", method, total=6, policy=policy).steps(6)
    states = [session.optimizer.state[p] for _, p in session.run.trainable()]
    assert {v.dtype for s in states for v in s.values() if v.is_floating_point()} == {torch.float32}
    state = session.state(whole=True)
    laws.agree(state)
    return state


def test_a_compute_copy_in_bf16(pool: Pool) -> None:
    method = GaLore(rank=3, every=2, transport="square")
    before = tiny().state_dict()
    alone = begin("one", method, total=6).steps(6).state(whole=True)
    sharded = pool.run(mixed, method)[0]
    moved = [torch.cat([(s[n] - before[n]).flatten() for n in before if n + "/basis" in s]) for s in (alone, sharded)]
    # bf16 products carry 2⁻⁸, and Adam's first steps are of the size of lr whatever the gradient's: directions agree
    assert torch.nn.functional.cosine_similarity(*moved, dim=0) > 0.95
