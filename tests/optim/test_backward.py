"""Fused backward: the numbers of the ordinary way, one gradient alive at a time, and no misuse that goes unseen."""

import copy
import gc
import io
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rankshift as rs
from laws.pool import Pool
from laws.world import batch, loss_of, tiny
from rankshift.core.errors import AttachError, ConfigError, NoGradient, NonFinite, StepWithoutForward, TrainingError
from rankshift.optim.backward import FusedOptimizer

METHODS = {
    "galore": rs.GaLore(rank=4, every=3, transport="square"),
    "galore-svd": rs.GaLore(rank=4, every=3, finder="svd"),
    "galore-fira": rs.GaLore(rank=4, every=2, finder="warm", residual="fira", stagger=False),
    "galore-8bit": rs.GaLore(rank=4, every=3, moments="8bit"),
    "adarankgrad": rs.AdaRankGrad(rank=6, every=3, earliest=1, energy=0.6),
    "full": rs.Full(),
    "lora": rs.LoRA(rank=2),
    "relora": rs.ReLoRA(rank=2, every=3),
    "sora": rs.SoRA(rank=3),
    "flat-lora": rs.FlatLoRA(rank=2),
}
NARROW = {how: rs.GaLore(rank=4, every=3, rounding=how) for how in ("nearest", "stochastic", "master")}


def begin(method, fused, dtype=torch.float32, **more):
    run = rs.attach(tiny(dtype, blocks=2), method, seed=5, total_steps=20)
    return run, run.optimizer(lr=1e-2, weight_decay=0.1, fused_backward=fused, **more)


def steps(run, optimizer, first, last):
    for i in range(first, last):
        loss_of(run.model, batch(i)).backward()
        optimizer.step()
        optimizer.zero_grad()


def state(run, optimizer):
    found = {name: t.detach().clone() for name, t in run.model.state_dict().items()}
    for name, p in run.trainable():
        found |= {f"{name}/{key}": t.clone() for key, t in optimizer.state.get(p, {}).items()}
    return found | {"clock": torch.tensor([run.step, run.skipped])}


def same(a, b):
    assert a.keys() == b.keys()
    assert [key for key in a if a[key].dtype != b[key].dtype or not torch.equal(a[key], b[key])] == []


# ---- the numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_same_bits_as_the_ordinary_way_across_renewals(name):
    (a, one), (b, two) = begin(METHODS[name], False), begin(METHODS[name], True)
    steps(a, one, 0, 8)
    steps(b, two, 0, 8)
    same(state(a, one), state(b, two))
    assert b.step == 8
    assert a.subspaces == b.subspaces
    if name == "adarankgrad":
        assert len(set(b.subspaces.values())) > 1  # ranks went their own ways


@pytest.mark.parametrize("rounding", NARROW)
def test_same_bits_in_bf16(rounding):
    (a, one), (b, two) = (begin(NARROW[rounding], fused, torch.bfloat16) for fused in (False, True))
    steps(a, one, 0, 5)
    steps(b, two, 0, 5)
    same(state(a, one), state(b, two))


def test_renewals_are_spread_as_in_the_ordinary_way():
    run, optimizer = begin(METHODS["galore"], True)
    steps(run, optimizer, 0, 1)
    places = [int(optimizer.state[p]["next"]) for _, p in run.trainable() if "next" in optimizer.state[p]]
    n = len(places)
    moments = min(n, 3, 5)
    assert sorted(places) == [-(-3 * -(-(i + 1) * moments // n) // moments) for i in range(n)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    def train(fused):
        run, optimizer = begin(METHODS["galore"], fused)
        for block in run.model.blocks:
            inner = block.forward
            block.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=reentrant)
        steps(run, optimizer, 0, 4)
        return state(run, optimizer)

    same(train(False), train(True))


class Loop(nn.Module):
    """One weight that three products share, two of them inside what may be checkpointed."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        self.up, self.down, self.last = nn.Linear(6, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 6, bias=False)
        self.last.weight = self.down.weight

    def forward(self, x):
        h = self.up(x)
        for _ in range(2):
            h = self.inner(h) if self.how is None else checkpoint(self.inner, h, use_reentrant=self.how)
        return self.last(h).square().sum()

    def inner(self, h):
        return self.down(h.tanh())


def looped(how, method, fused):
    """A run on it after three updates."""
    run = rs.attach(Loop(how), method)
    optimizer = run.optimizer(lr=1e-2, fused_backward=fused)
    for i in range(3):
        run.model(torch.full((2, 6), i + 1.0)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return run, optimizer


@pytest.mark.parametrize("how", [None, False], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("method", [rs.Full(), rs.GaLore(rank=2, every=2, targets=("up",))], ids=lambda m: m.name)
def test_a_weight_that_is_used_three_times_is_updated_once(method, how):
    ordinary, fused = looped(how, method, False), looped(how, method, True)
    same(state(*ordinary), state(*fused))
    assert {int(s["step"]) for s in fused[1].state.values()} == {3}
    assert len(fused[1].state) == 3


def test_a_gradient_that_comes_in_pieces_is_refused():
    """Reentrant checkpointing runs a backward pass of its own for every region: of each a shared weight gets a part."""
    with pytest.raises(TrainingError, match="cannot be accumulated"):
        looped(True, rs.Full(), True)


def test_tensors_that_come_into_the_optimizer_later_are_updated_once_as_the_others():
    """As an engine does that puts its own in the place of the model's."""

    def train(fused):
        run = rs.attach(Two(), rs.Full())
        optimizer = run.optimizer(lr=1e-2, fused_backward=fused)
        model, group = run.model, optimizer.param_groups[0]
        for i in range(4):
            if i == 2:
                old = model.second.weight
                model.second.weight = nn.Parameter(old.detach().clone())
                group["params"] = [model.second.weight if p is old else p for p in group["params"]]
            model(torch.full((2, 4), i + 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        found = {name: p.detach().clone() for name, p in model.named_parameters()}
        return found | {f"{name}/step": optimizer.state[p]["step"] for name, p in model.named_parameters()}

    found = train(True)
    same(train(False), found)
    assert {name: int(n) for name, n in found.items() if name.endswith("/step")} == {
        "first.weight/step": 4, "first.bias/step": 4, "second.weight/step": 2, "second.bias/step": 4
    }  # fmt: skip


@pytest.mark.parametrize("norm", [1e-3, 0.2, 100.0])
def test_clip_each_is_torchs_clipping_of_every_tensor_by_itself(norm):
    (a, one), (b, two) = begin(rs.Full(), False), begin(rs.Full(), True, clip_each=norm)
    for i in range(4):
        loss_of(a.model, batch(i)).backward()
        for _, p in a.trainable():
            nn.utils.clip_grad_norm_([p], norm)
        one.step()
        one.zero_grad()
    steps(b, two, 0, 4)
    same(state(a, one), state(b, two))


# ---- memory ----------------------------------------------------------------------------------------------------------


class Alive:
    """Sees the gradients that are alive whenever one is complete, before it is used."""

    def __init__(self, model):
        self.model, self.refs, self.counts, self.bytes = model, [], [], []
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(self)

    def __call__(self, p):
        self.refs.append(weakref.ref(p.grad))
        alive = [g for g in (ref() for ref in self.refs) if g is not None]
        self.counts.append(sum(q.grad is not None for q in self.model.parameters()))
        self.bytes.append(sum(g.untyped_storage().nbytes() for g in alive))


@pytest.mark.parametrize("fused", [False, True])
def test_of_all_gradients_the_largest_is_alive_at_a_time(fused):
    run = rs.attach(tiny(blocks=2), METHODS["galore"])
    seen = Alive(run.model)
    steps(run, run.optimizer(lr=1e-2, fused_backward=fused), 0, 3)
    sizes = [p.numel() * p.element_size() for p in run.model.parameters()]
    assert len(seen.counts) == 3 * len(sizes)
    assert max(seen.counts) == (1 if fused else len(sizes))
    assert max(seen.bytes) == (max(sizes) if fused else sum(sizes))


def test_nothing_keeps_a_model_alive():
    run, optimizer = begin(METHODS["galore"], True)
    steps(run, optimizer, 0, 2)
    gone = weakref.ref(run.model)
    del run, optimizer
    gc.collect()
    assert gone() is None


# ---- saving ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [True, False], ids=["fused", "ordinary"])
@pytest.mark.parametrize("name", ["galore", "adarankgrad"])
def test_resume_at_every_update(name, again):
    whole = begin(METHODS[name], True)
    saved = []
    for k in range(6):
        file = io.BytesIO()
        torch.save([whole[0].state_dict(), whole[1].state_dict()], file)
        saved.append(file.getvalue())
        steps(*whole, k, k + 1)
    for k, file in enumerate(saved):
        of_run, of_optimizer = torch.load(io.BytesIO(file), weights_only=True)
        run = rs.restore(tiny(blocks=2), of_run)
        optimizer = run.optimizer(lr=1e-2, weight_decay=0.1, fused_backward=again)
        optimizer.load_state_dict(of_optimizer)
        steps(run, optimizer, k, 6)
        same(state(run, optimizer), state(*whole))


def test_a_rehearsal_of_distributed_checkpoint_is_no_update():
    run, optimizer = begin(METHODS["galore"], True)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    dcp.get_optimizer_state_dict(run.model, optimizer)
    assert run.step == 0
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    other = begin(METHODS["galore"], True)
    steps(run, optimizer, 0, 4)
    steps(*other, 0, 4)
    same(state(run, optimizer), state(*other))


# ---- bad gradients ---------------------------------------------------------------------------------------------------


def test_a_gradient_that_is_not_finite_leaves_its_tensor_alone():
    run, optimizer = begin(METHODS["galore"], True)
    steps(run, optimizer, 0, 1)
    bad = run.model.blocks[0].q.weight
    hook = bad.register_hook(lambda g: g.index_fill(0, torch.tensor(1), float("nan")))
    before = state(run, optimizer)
    steps(run, optimizer, 1, 2)
    after = state(run, optimizer)
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    mine = {name for name in after if name.startswith("blocks.0.q.weight")}
    assert mine
    assert not moved & mine
    assert {name for name, _ in run.model.named_parameters()} - moved == {"blocks.0.q.weight"}
    assert (run.step, run.skipped) == (2, 1)
    hook.remove()
    steps(run, optimizer, 2, 3)
    assert (run.step, run.skipped) == (3, 1)


def test_a_loss_that_is_not_finite_skips_the_update_as_in_the_ordinary_way():
    found = []
    for fused in (False, True):
        run, optimizer = begin(METHODS["galore"], fused)
        steps(run, optimizer, 0, 2)
        (loss_of(run.model, batch(2)) * float("nan")).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert (run.step, run.skipped) == (2, 1)
        steps(run, optimizer, 3, 5)
        found.append(state(run, optimizer))
    same(*found)


def test_training_stops_where_a_tensor_never_gets_a_finite_gradient():
    run, optimizer = begin(rs.Full(), True)
    run.model.head.weight.register_hook(lambda g: g * float("inf"))
    with pytest.raises(NonFinite, match=r"20 updates in a row.*others were"):
        steps(run, optimizer, 0, 30)
    assert run.skipped == 20


class Two(nn.Module):
    """Layers that take part as they are told."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x, which="both"):
        h = self.first(x) if which != "second" else x
        h = self.second(h) if which != "first" else h
        return h.square().sum()


def test_a_layer_without_gradient_is_named():
    run = rs.attach(Two(), rs.LoRA(rank=2, targets=("first", "second")))
    optimizer = run.optimizer(lr=1e-2, fused_backward=True)
    run.model(torch.ones(2, 4), "second").backward()
    with pytest.raises(NoGradient, match=r"first.A received no gradient"):
        optimizer.step()


def test_a_layer_whose_gradient_is_zero_is_named():
    run = rs.attach(Two(), rs.LoRA(rank=2, targets=("first", "second")))
    optimizer = run.optimizer(lr=1e-2, fused_backward=True)
    (run.model(torch.ones(2, 4), "first") + run.model(torch.zeros(2, 4), "second")).backward()
    with pytest.raises(NoGradient, match=r"second.B is exactly zero"):
        optimizer.step()


# ---- refusals --------------------------------------------------------------------------------------------------------


def refused(run, optimizer, error, match, act):
    """``act`` raises, and nothing has moved."""
    before = state(run, optimizer)
    with pytest.raises(error, match=match):
        act()
    same(before, state(run, optimizer))


def test_accumulation_is_refused_at_the_first_gradient_of_the_second_backward():
    run, optimizer = begin(rs.Full(), True)
    loss_of(run.model, batch(0)).backward()
    loss = loss_of(run.model, batch(1))
    refused(run, optimizer, TrainingError, "cannot be accumulated", loss.backward)


def test_accumulation_is_refused_where_the_second_backward_begins_with_another_layer():
    run = rs.attach(Two(), rs.Full())
    optimizer = run.optimizer(lr=1e-2, fused_backward=True)
    run.model(torch.ones(2, 4), "first").backward()
    loss = run.model(torch.ones(2, 4), "second")
    refused(run, optimizer, TrainingError, "cannot be accumulated", loss.backward)


def test_a_second_backward_through_one_forward_is_refused():
    run, optimizer = begin(rs.Full(), True)
    model = nn.Linear(3, 3)
    run = rs.attach(model, rs.Full())
    optimizer = run.optimizer(lr=1e-2, fused_backward=True)
    loss = model(torch.ones(2, 3)).sum()
    loss.backward(retain_graph=True)
    refused(run, optimizer, TrainingError, "cannot be accumulated", loss.backward)


def test_two_forwards_of_one_backward_are_one_update():
    run, optimizer = begin(rs.Full(), True)
    (loss_of(run.model, batch(0)) + loss_of(run.model, batch(1))).backward()
    optimizer.step()
    other, ordinary = begin(rs.Full(), False)
    (loss_of(other.model, batch(0)) + loss_of(other.model, batch(1))).backward()
    ordinary.step()
    same(state(run, optimizer), state(other, ordinary))


def test_a_scaler_is_refused():
    run, optimizer = begin(rs.Full(), True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(loss_of(run.model, batch(0))).backward()
    refused(run, optimizer, TrainingError, "GradScaler unscales gradients after", lambda: scaler.step(optimizer))


def test_a_closure_is_refused():
    run, optimizer = begin(rs.Full(), True)
    refused(run, optimizer, TrainingError, "closure", lambda: optimizer.step(lambda: loss_of(run.model, batch(0))))


def test_a_learning_rate_that_changes_after_the_backward_is_refused():
    run, optimizer = begin(rs.Full(), True)
    loss_of(run.model, batch(0)).backward()
    optimizer.param_groups[0]["lr"] = 1e-3
    refused(run, optimizer, TrainingError, "Change it before", optimizer.step)


def test_gradients_that_no_backward_made_are_refused():
    run, optimizer = begin(rs.Full(), True)
    for with_others in (False, True):
        loss = loss_of(run.model, batch(0))
        if with_others:
            loss.backward()
        p = run.model.head.weight
        p.grad = torch.ones_like(p)
        refused(run, optimizer, TrainingError, "1 of .* gradients are there at optimizer.step", optimizer.step)
        p.grad = None


def test_a_backward_without_a_training_forward_is_refused():
    run, optimizer = begin(rs.Full(), True)
    loss = loss_of(run.model.eval(), batch(0))
    refused(run, optimizer, StepWithoutForward, "not called in training mode", loss.backward)


def test_a_backward_where_no_update_may_be_taken_is_refused():
    run, optimizer = begin(rs.LoRA(rank=2), True)
    with run.merged():
        run._on.link(run.active)  # as if something in there trained
        loss = loss_of(run.model, batch(0))
        with pytest.raises(AttachError, match="Step after the with block"):
            loss.backward()
    assert not optimizer.state


def test_a_loss_that_lacks_what_the_method_adds_is_refused():
    run, optimizer = begin(rs.PCLoRA(rank=3), True)
    loss = loss_of(run.model, batch(0))
    refused(run, optimizer, TrainingError, "run.loss", loss.backward)


def test_a_method_that_changes_gradients_is_refused():
    run = rs.attach(tiny(), rs.LoRA(rank=2, train="B", precondition=True))
    with pytest.raises(ConfigError, match=r"LoRA as configured changes gradients"):
        run.optimizer(fused_backward=True)
    assert run.optimizer() is not None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"clip_each": 1.0}, "belongs to fused_backward"),
        ({"fused_backward": True, "clip_each": 0.0}, "above 0"),
        ({"fused_backward": True, "clip_each": float("nan")}, "above 0"),
    ],
)
def test_bad_settings(options, text):
    run = rs.attach(tiny(), rs.Full())
    with pytest.raises(ConfigError, match=text):
        run.optimizer(**options)


def test_hooks_go_with_the_optimizer():
    run, optimizer = begin(rs.LoRA(rank=2), True)
    tensors = [p for _, p in run.trainable()]
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in tensors)
    run.optimizer(lr=1e-2, fused_backward=True)
    assert all(len(p._post_accumulate_grad_hooks) == 1 for p in tensors)
    run.optimizer(lr=1e-2)
    assert not any(p._post_accumulate_grad_hooks for p in tensors)
    with pytest.raises(AttachError, match="no longer drives"):
        optimizer.step()
    run.optimizer(lr=1e-2, fused_backward=True)
    after = run.shift(rs.Full())
    assert not any(p._post_accumulate_grad_hooks for p in [*tensors, *after.model.parameters()])
    assert isinstance(after.optimizer(fused_backward=True), FusedOptimizer)


# ---- several processes -----------------------------------------------------------------------------------------------


def sharded(method, fused, clip=None):
    """Whole weights and moments after updates on two ranks."""
    model = tiny(torch.float32 if clip is None else torch.float64, blocks=2)
    run = rs.attach(model, method, seed=5)
    mesh = init_device_mesh("cpu", (2,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = run.optimizer(lr=1e-2, weight_decay=0.1, fused_backward=fused, clip_each=clip if fused else None)
    for i in range(6):
        loss_of(model, batch(i, 8)[dist.get_rank() :: 2]).backward()
        left = sum(p.grad is not None for p in model.parameters())
        assert left == (0 if fused else len(list(model.parameters())))
        for p in model.parameters() if clip and not fused else ():
            nn.utils.clip_grad_norm_([p], clip)
        optimizer.step()
        optimizer.zero_grad()
    rs.core.shard.settle(model)
    found = dict(model.named_parameters())
    for name, p in run.trainable():
        found |= {f"{name}/{key}": t for key, t in optimizer.state[p].items()}
    return {name: rs.core.shard.whole(t) for name, t in found.items()}, run.step


def spoiled():
    """What has not moved where one rank's part of one gradient is not finite."""
    run = rs.attach(Two(), rs.Full())
    model = fully_shard(run.model, mesh=init_device_mesh("cpu", (2,)))
    if dist.get_rank() == 1:  # which holds the last rows
        model.second.weight.register_post_accumulate_grad_hook(_spoil)
    optimizer = run.optimizer(lr=1e-2, fused_backward=True)
    before = {name: rs.core.shard.whole(p) for name, p in model.named_parameters()}
    model(torch.ones(2, 4)).backward()
    optimizer.step()
    after = {name: rs.core.shard.whole(p) for name, p in model.named_parameters()}
    return [name for name in before if torch.equal(before[name], after[name])], run.skipped


def _spoil(p):
    p.grad.to_local()[0] = float("nan")


def ddp(when):
    """What is said where nothing is sharded."""
    run = rs.attach(tiny(), rs.Full())
    model = DistributedDataParallel(run.model, broadcast_buffers=False) if when == "wrapped" else run.model
    optimizer = run.optimizer(lr=1e-2, fused_backward=True)
    loss, before = loss_of(model, batch(0)), state(run, optimizer)
    try:
        loss.backward()
    except ConfigError as error:
        same(before, state(run, optimizer))
        return str(error)
    return "nothing"


@pytest.fixture(scope="module")
def pool():
    """Two ranks."""
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize("name", ["galore", "adarankgrad", "full"])
def test_same_bits_under_fsdp2(name, pool):
    one, two = (pool.run(sharded, METHODS[name], fused) for fused in (False, True))
    for (a, _), (b, count) in zip(one, two, strict=True):
        same(a, b)
        assert count == 6


def test_clip_each_takes_the_norm_over_all_ranks(pool):
    (one, _), (two, _) = (pool.run(sharded, METHODS["full"], fused, 0.01)[0] for fused in (False, True))
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-9, atol=1e-12)


def test_a_part_that_is_not_finite_leaves_the_tensor_alone_on_every_rank(pool):
    assert pool.run(spoiled) == [(["second.weight"], 1)] * 2


@pytest.mark.parametrize("when", ["plain", "wrapped"])
def test_ddp_is_refused(when, pool):
    assert all("DDP averages gradients after" in said for said in pool.run(ddp, when))


def test_a_copy_of_the_model_has_none_of_its_updates() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    run = rs.attach(model, rs.Full())
    run.optimizer(lr=1e-2, fused_backward=True)
    twin = copy.deepcopy(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    for other in (twin, torch.load(stored, weights_only=False)):
        before = [p.detach().clone() for p in other.parameters()]
        other(torch.ones(3, 4)).sum().backward()
        assert all(torch.equal(p, q) and p.grad is not None for p, q in zip(other.parameters(), before, strict=True))
