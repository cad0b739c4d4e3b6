"""With Adam, the optimizer is torch.optim.AdamW to the bit; with any transform, an ordinary torch optimizer."""

import copy
import io
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from rankshift.core.errors import ConfigError
from rankshift.optim import Adam, Hyper, Optimizer
from rankshift.optim.moments import Wide

SHAPES = [(7, 5), (3,), (), (0, 4), (2, 3, 4)]


def parameters(dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=g).to(dtype)) for shape in SHAPES]


def give_gradients(ps, seed, scale=1.0):
    g = torch.Generator().manual_seed(seed)
    for p in ps:
        p.grad = (torch.randn(p.shape, generator=g) * scale).to(p.dtype)


def groups(ps):
    return [
        {"params": ps[:2], "lr": 3e-3, "weight_decay": 0.1},
        {"params": ps[2:], "weight_decay": 0.0, "betas": (0.8, 0.99), "eps": 1e-6},
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_bits_of_torch_adamw_over_50_updates(dtype, decay):
    mine, theirs = parameters(dtype), parameters(dtype)
    a = Optimizer([{"params": mine}], [Adam()], lr=1e-2, weight_decay=decay)
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=decay)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 50) for o in (a, b)]
    for step in range(50):
        for ps, optimizer, schedule in ((mine, a, schedules[0]), (theirs, b, schedules[1])):
            give_gradients(ps, step)
            optimizer.step()
            schedule.step()
    for p, q in zip(mine, theirs, strict=True):
        assert torch.equal(p, q)
        assert a.state[p].keys() == b.state[q].keys()
        assert all(torch.equal(a.state[p][k], b.state[q][k]) and a.state[p][k].dtype == b.state[q][k].dtype
                   for k in a.state[p])  # fmt: skip


def test_groups_have_their_own_numbers_as_in_torch():
    mine, theirs = parameters(), parameters()
    a = Optimizer(groups(mine), [Adam(), Adam()], lr=1e-2)
    b = torch.optim.AdamW(groups(theirs), lr=1e-2)
    for step in range(10):
        for ps, optimizer in ((mine, a), (theirs, b)):
            give_gradients(ps, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


def test_mixed_dtypes_in_one_group():
    mine = [*parameters(), *parameters(torch.bfloat16)]
    theirs = copy.deepcopy(mine)
    a, b = Optimizer([{"params": mine}], [Adam()], lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0)
    for step in range(5):
        for ps, optimizer in ((mine, a), (theirs, b)):
            give_gradients(ps, step)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


def formula(p, g, m, v, t, lr, beta1, beta2, eps, decay):
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    direction = (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + eps)
    return p * (1 - lr * decay) - lr * direction, direction, m, v


def test_step_is_the_papers_formula():
    g = torch.Generator().manual_seed(3)
    p = torch.randn(6, 4, generator=g, dtype=torch.float64)
    hyper = Hyper(1e-2, (0.9, 0.95), 1e-8, 0.1)
    stepped, exact, state = p.clone(), p.clone(), Adam().init(p)
    m = v = torch.zeros_like(p)
    for t in range(1, 21):
        gradient = torch.randn(6, 4, generator=g, dtype=torch.float64)
        Adam().step([stepped], [gradient], [state], hyper)
        exact, _, m, v = formula(exact, gradient, m, v, t, 1e-2, 0.9, 0.95, 1e-8, 0.1)
        # float64: the same formula in another order of roundings
        torch.testing.assert_close(stepped, exact, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(state["exp_avg_sq"], v, rtol=1e-12, atol=1e-12)


def test_state_keys_come_from_init_only():
    ps = parameters()
    optimizer = Optimizer([{"params": ps}], [Adam()], lr=1e-2)
    for step in range(4):
        give_gradients(ps, step)
        optimizer.step()
    assert all(optimizer.state[p].keys() == Adam().init(p).keys() for p in ps)
    assert all(optimizer.state[p][k].shape == Adam().init(p)[k].shape for p in ps for k in Adam().init(p))


def test_saved_state_loads_without_pickle_and_goes_on_to_the_bit():
    def run(cut):
        ps = parameters()
        optimizer = Optimizer(groups(ps), [Adam(), Adam()], lr=1e-2)
        for step in range(8):
            if step == cut:
                file = io.BytesIO()
                torch.save(optimizer.state_dict(), file)
                file.seek(0)
                optimizer = Optimizer(groups(ps), [Adam(), Adam()], lr=9.0)
                optimizer.load_state_dict(torch.load(file, weights_only=True))
            give_gradients(ps, step)
            optimizer.step()
        return ps

    whole = run(None)
    for cut in range(1, 8):
        assert all(torch.equal(p, q) for p, q in zip(whole, run(cut), strict=True))


@dataclass(frozen=True)
class Momentum:
    """State of another dtype than its parameter, and an integer beside it."""

    def init(self, p, key=None, rank=None, place=(1, 1)):
        return {"m": torch.zeros(p.shape, dtype=torch.float64), "count": torch.zeros((), dtype=torch.int64)}

    def adopt(self, p, saved, fresh):
        for key, value in fresh.items():
            value.copy_(saved[key])
        return []

    def step(self, parameters, gradients, states, hyper):
        for p, g, state in zip(parameters, gradients, states, strict=True):
            state["count"] += 1
            p.sub_(state["m"].mul_(0.9).add_(g).to(p.dtype), alpha=hyper.lr)


def test_loading_keeps_the_dtypes_of_the_state():
    ps = parameters(torch.bfloat16)
    optimizer = Optimizer([{"params": ps}], [Momentum()], lr=1e-2)
    give_gradients(ps, 0)
    optimizer.step()
    state = optimizer.state_dict()
    other = Optimizer([{"params": ps}], [Momentum()], lr=1e-2)
    other.load_state_dict(copy.deepcopy(state))
    for p in ps:
        for key, value in optimizer.state[p].items():
            assert other.state[p][key].dtype == value.dtype
            assert torch.equal(other.state[p][key], value)
            assert other.state[p][key] is not value


def test_a_copied_optimizer_still_steps():
    ps = parameters()
    optimizer = Optimizer([{"params": ps}], [Adam()], lr=1e-2)
    twin = copy.deepcopy(optimizer)
    for o in (optimizer, twin):
        held = [p for group in o.param_groups for p in group["params"]]
        give_gradients(held, 0)
        o.step()
    twins = [p for group in twin.param_groups for p in group["params"]]
    assert all(torch.equal(p, q) and p is not q for p, q in zip(ps, twins, strict=True))


def test_learning_rate_as_a_tensor_and_closure():
    mine, theirs = parameters(torch.float64), parameters(torch.float64)
    a = Optimizer([{"params": mine}], [Adam()], lr=torch.tensor(1e-2, dtype=torch.float64))
    b = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0)

    def loss(ps):
        total = sum(p.square().sum() for p in ps)
        total.backward()
        return total

    for _ in range(3):
        for ps, optimizer in ((mine, a), (theirs, b)):
            optimizer.zero_grad()
            value = optimizer.step(lambda ps=ps: loss(ps))
            assert value.requires_grad  # gradients were enabled inside
    assert all(torch.equal(p, q) for p, q in zip(mine, theirs, strict=True))


def test_no_gradient_no_change():
    ps = parameters()
    before = [p.detach().clone() for p in ps]
    optimizer = Optimizer([{"params": ps}], [Adam()], lr=1e-2, weight_decay=0.5)
    optimizer.step()
    ps[0].grad = torch.ones_like(ps[0])
    optimizer.step()
    assert not torch.equal(ps[0], before[0])
    assert all(torch.equal(p, q) for p, q in zip(ps[1:], before[1:], strict=True))
    assert list(optimizer.state) == [ps[0]]


def test_sparse_and_complex_gradients_are_refused():
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(ConfigError, match=r"is (sparse|complex)"):
        Optimizer([{"params": [table.weight]}], [Adam()], lr=1e-2).step()
    wave = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    wave.grad = torch.ones_like(wave)
    with pytest.raises(ConfigError, match=r"is (sparse|complex)"):
        Optimizer([{"params": [wave]}], [Adam()], lr=1e-2).step()


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"lr": -1.0}, "lr"), ({"betas": (0.9, 1.0)}, "betas"), ({"eps": -1.0}, "eps"), ({"weight_decay": -0.1}, "decay")],
)
def test_wrong_numbers_are_refused(wrong, text):
    with pytest.raises(ConfigError, match=text):
        Optimizer([{"params": parameters()}], [Adam()], **{"lr": 1e-3, **wrong})


def test_one_transform_for_each_group():
    with pytest.raises(ConfigError, match="1 transforms for 2"):
        Optimizer(groups(parameters()), [Adam()], lr=1e-3)


def test_layers_of_one_role_stand_in_a_row() -> None:
    """Of all groups whose transform is of that kind, in the order in which roles come first."""
    names = [f"layers.{block}.{role}.weight" for block in (0, 1, 10) for role in ("q", "up")]
    ps = {name: nn.Parameter(torch.zeros(2)) for name in names}
    optimizer = Optimizer(
        [{"params": [(name, ps[name]) for name in some]} for some in (names[:3], names[3:])], [Adam(), Adam()], lr=1.0
    )
    order = sorted(names, key=lambda name: optimizer.place(ps[name]))
    assert order == [f"layers.{block}.{role}.weight" for role in ("q", "up") for block in (0, 1, 10)]
    assert [optimizer.place(ps[name]) for name in order] == [(i, 6) for i in range(1, 7)]


def test_many_tensors_are_found_by_one_list_of_them(monkeypatch):
    """Thousands of layers: what is asked of every tensor must not walk over all of them."""
    ps = [(f"blocks.{i}.w", nn.Parameter(torch.zeros(2, 2))) for i in range(300)]
    o = Optimizer([{"params": ps[:200]}, {"params": ps[200:]}], [Adam(), Adam()], lr=0.1)
    asked, listed = [], Optimizer._listed
    monkeypatch.setattr(Optimizer, "_listed", lambda self: asked.append(1) or listed(self))
    for _, p in ps:
        p.grad = torch.ones_like(p)
    o.step()
    state = o.state_dict()
    o.load_state_dict(state)
    assert len(asked) == 1
    assert [o.place(p)[0] for _, p in ps] == list(range(1, 301))
    again = copy.deepcopy(o)
    new = nn.Parameter(torch.zeros(3))
    again.initial(again.param_groups[0]["params"][3])
    with pytest.raises(ConfigError, match="not one that this optimizer steps"):
        o.initial(new)


def test_counts_are_made_on_the_device_of_each_parameter():
    from rankshift.optim.adam import _counts

    meta, cpu = torch.device("meta"), torch.device("cpu")
    found = _counts([3.0, 3.0, 5.0, 3.0], [cpu, meta, cpu, meta])
    assert [t.device for t in found] == [cpu, meta, cpu, meta]
    assert [float(found[0]), float(found[2])] == [3.0, 5.0]
    assert found[0].data_ptr() != found[2].data_ptr()


def test_moments_of_a_weight_with_channels_last_lie_as_it_does():
    p = nn.Parameter(torch.randn(8, 4, 3, 3).bfloat16().to(memory_format=torch.channels_last))
    state = Adam(Wide(), "nearest").init(p)
    assert state["exp_avg"].stride() == p.stride()
    assert state["exp_avg"].dtype == torch.float32
