"""GaLore: galore-torch's trajectory, AdamW for what is not projected, state by the formula, what a fake would do."""

from __future__ import annotations

import copy
import io
import logging
from dataclasses import replace

import pytest
import torch
import transformers as tf
from galore_torch import GaLoreAdamW
from galore_torch.galore_projector import GaLoreProjector
from torch import Tensor, nn

import rankshift as rs
from rankshift.core.errors import ConfigError, TargetError, TiedWeights, UnmatchedTarget, UnsupportedLayer, WrongBase
from rankshift.optim import Optimizer
from rankshift.optim.project import Clock, Project

D = torch.float64


class Net(nn.Module):
    """A tall, a wide and a square layer with a bias, an embedding and a norm."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.tall = nn.Linear(8, 20)
        self.norm = nn.LayerNorm(20)
        self.wide = nn.Linear(20, 8, bias=False)
        self.square = nn.Linear(8, 8)
        g = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=g) * 0.3 + (p.dim() == 1) * 0.5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.table(x)
        return self.square(self.wide(torch.tanh(self.norm(self.tall(h)))) + h)


def batch(step: int) -> Tensor:
    return torch.randint(0, 11, (6, 5), generator=torch.Generator().manual_seed(step))


def loss_of(model: nn.Module, step: int) -> Tensor:
    return (model(batch(step)) - 1).square().mean()


def trained(method: rs.GaLore, steps: int, model: nn.Module | None = None, see=None, **numbers):
    model = Net() if model is None else model
    run = rs.attach(model, method)
    optimizer = run.optimizer(**{"lr": 1e-2, **numbers})
    for step in range(steps):
        loss_of(model, step).backward()
        if see is not None:
            see(step, model)
        optimizer.step()
        optimizer.zero_grad()
    return model, run, optimizer


# ---- against galore-torch


class Signed(GaLoreProjector):
    """galore-torch's projector, of the two signs of a singular vector the one with its largest entry positive."""

    def get_orthogonal_matrix(self, weights, rank, type):
        found = super().get_orthogonal_matrix(weights, rank, type)
        axis = 1 if type == "right" else 0
        return found * found.gather(axis, found.abs().argmax(axis, keepdim=True)).sign()


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("finder", ["svd", "eigh"])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_the_trajectory_of_galore_torch(shape, finder, decay):
    """30 updates with five bases. galore-torch decays after its step, and puts ε beside √v before v is corrected: so
    decay is done here by hand, before the step, and ε is next to nothing."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    mine, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    numbers = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-12}
    rule = Project(4, clock=Clock(7, stagger=False), finder=finder, scale=0.25)
    a = Optimizer([{"params": [mine]}], [rule], weight_decay=decay, **numbers)
    group = {"params": [theirs], "rank": 4, "update_proj_gap": 7, "scale": 0.25, "proj_type": "std"}
    b = GaLoreAdamW([group], no_deprecation_warning=True, **numbers)
    b.state[theirs] |= {"step": 0, "projector": Signed(4, update_proj_gap=7, scale=0.25)}
    for step in range(30):
        mine.grad = torch.randn(shape, generator=torch.Generator().manual_seed(100 + step))
        theirs.grad = mine.grad.clone()
        a.step()
        with torch.no_grad():
            theirs.mul_(1 - 1e-2 * decay)
        b.step()
    assert (mine - start).abs().max() > 0.01
    torch.testing.assert_close(mine, theirs, rtol=0, atol=3e-6)  # fp32 over 30 updates


def test_the_method_is_galore_torch_on_a_model():
    """The same gradients, recorded on the run's own trajectory, through GaLoreAdamW with its two kinds of groups."""
    method = rs.GaLore(rank=3, every=4, stagger=False, finder="svd", scale=0.5, targets=("tall", "wide", "square"))
    twin = Net()
    projected = [twin.tall.weight, twin.wide.weight, twin.square.weight]
    rest = [p for p in twin.parameters() if not any(p is q for q in projected)]
    galore = {"params": projected, "rank": 3, "update_proj_gap": 4, "scale": 0.5, "proj_type": "std"}
    reference = GaLoreAdamW([{"params": rest}, galore], lr=1e-2, eps=1e-12, no_deprecation_warning=True)
    for p in projected:
        reference.state[p] |= {"step": 0, "projector": Signed(3, update_proj_gap=4, scale=0.5)}

    def see(step: int, model: nn.Module) -> None:
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        reference.step()

    model, _, _ = trained(method, 10, see=see, eps=1e-12)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=5e-6, msg=lambda text, name=name: f"{name}: {text}")


# ---- what is not projected


@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_embeddings_norms_and_biases_take_adamw_to_the_bit(decay):
    twin = Net()
    adamw = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=decay, betas=(0.8, 0.95), eps=1e-7)

    def see(step: int, model: nn.Module) -> None:
        for p, q in zip(twin.parameters(), model.parameters(), strict=True):
            p.grad = q.grad.clone()
        adamw.step()

    model, run, _ = trained(rs.GaLore(rank=3, every=3), 8, see=see, weight_decay=decay, betas=(0.8, 0.95), eps=1e-7)
    projected = {"tall.weight", "wide.weight", "square.weight"}
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q) == (name not in projected), name
    assert set(run.subspaces) == projected


def test_what_is_not_projected_can_be_frozen():
    before = {name: p.detach().clone() for name, p in Net().named_parameters()}
    model, run, _ = trained(rs.GaLore(rank=3, rest="freeze"), 3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"tall.weight", "wide.weight", "square.weight"} == {name for name, _ in run.trainable()}


@pytest.mark.parametrize("gradient", ["full", "projected"])
def test_what_was_frozen_before_stays_so_and_is_told(gradient, caplog):
    model = Net()
    for p in (model.wide.weight, model.table.weight):
        p.requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with caplog.at_level(logging.WARNING, "rankshift"):
        model, run, _ = trained(rs.GaLore(rank=3, gradient=gradient), 3, model)
    assert "GaLore leaves frozen what was so before attach() (requires_grad=False): table.weight, wide.weight." in (
        caplog.text
    )
    assert "wide.weight" not in run.subspaces
    run.merge()
    assert {name for name, p in model.named_parameters() if torch.equal(p, before[name])} == {
        "wide.weight", "table.weight"
    } == {name for name, p in model.named_parameters() if not p.requires_grad}  # fmt: skip


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (rs.GaLore(rank=3, targets=("tall", "wide")), "wide.weight is frozen .*targets of GaLore name it"),
        (rs.GaLore(rank=3, targets="wide", gradient="projected"), "wide.weight is frozen"),
        (rs.Full(targets=("table", "wide")), "wide.weight is frozen .*targets of Full name it"),
    ],
)
def test_a_target_that_was_frozen_before_is_refused_where_it_is_named(method, says):
    model = Net()
    model.wide.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(TargetError, match=says):
        rs.attach(model, method)
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    run = rs.attach(model, rs.LoRA(rank=2))  # which trains no weight of the base
    assert run.sites.keys() >= {"wide"}
    with pytest.raises(TargetError, match=says):
        run.shift(method)
    assert run.method == rs.LoRA(rank=2)  # and has not ended
    run.model.train()


@pytest.mark.parametrize("method", [rs.GaLore(rank=3), rs.GaLore(rank=3, gradient="projected"), rs.Full()])
def test_a_model_that_is_frozen_whole_is_refused(method):
    with pytest.raises(TargetError, match=r"all that it would train are frozen .*model\.requires_grad_\(True\)"):
        rs.attach(Net().requires_grad_(False), method)
    with pytest.raises(TargetError, match="all that it would train"):
        rs.attach(Net().requires_grad_(False), rs.LoRA(rank=2)).shift(method)


@pytest.mark.parametrize("method", [rs.GaLore(rank=3), rs.GaLore(rank=3, gradient="projected"), rs.Full()])
def test_what_was_frozen_is_so_again_in_a_run_that_is_restored(method):
    def frozen():
        model = Net()
        model.wide.weight.requires_grad_(False)
        return model

    _, run, optimizer = trained(method, 2, frozen())
    state = run.state_dict()
    assert state["frozen"] == ["wide.weight"]
    run = rs.restore(Net(), state)  # of a base that nobody froze
    assert "wide.weight" not in dict(run.trainable())
    assert "wide.weight" not in run.subspaces
    run.optimizer(lr=1e-2).load_state_dict(optimizer.state_dict())
    assert not run.merge().wide.weight.requires_grad
    rs.attach(frozen(), method).load_state_dict(state)
    with pytest.raises(WrongBase, match=r"wide\.weight was frozen in the saved run, and here it trains"):
        rs.attach(Net(), method).load_state_dict(state)
    other = rs.attach(Net(), method).state_dict()
    with pytest.raises(WrongBase, match=r"wide\.weight trained in the saved run, and here it is frozen"):
        rs.attach(frozen(), method).load_state_dict(other)


# ---- state


def test_state_bytes_are_the_formula():
    """4 (s·r + 2·l·r + r) bytes a projected weight, 8 a number of the rest; and counters."""
    _, _, optimizer = trained(rs.GaLore(rank=3), 2)
    groups = optimizer.param_groups
    names = {p: n for g in groups for n, p in zip(g["param_names"], g["params"], strict=True)}
    for p, state in optimizer.state.items():
        size = sum(t.untyped_storage().nbytes() for t in state.values() if t.dim())
        if "basis" in state:
            short, long = sorted(p.shape)
            assert size == 4 * (short * 3 + 2 * long * 3 + 3), names[p]
            assert sum(t.untyped_storage().nbytes() for t in state.values()) - size <= 8 * 8
        else:
            assert size == 8 * p.numel(), names[p]


def test_state_loads_without_pickle_and_the_rank_of_each_weight_is_known():
    _, run, optimizer = trained(rs.GaLore(rank=3), 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    twin = rs.attach(Net(), rs.GaLore(rank=3))
    other = twin.optimizer(lr=1e-2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert run.subspaces == twin.subspaces == {"tall.weight": 3, "wide.weight": 3, "square.weight": 3}
    for (name, p), (_, q) in zip(run.trainable(), twin.trainable(), strict=True):
        mine, theirs = optimizer.state[p], other.state[q]
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine), name


def test_larger_sides_hold_less_state():
    """The card's 6dr for 9dr of a d × 4d matrix."""
    sizes = {}
    for side in ("smaller", "larger"):
        layer = nn.Sequential(nn.Linear(8, 32, bias=False))
        optimizer = rs.attach(layer, rs.GaLore(rank=2, side=side)).optimizer()
        layer(torch.ones(3, 8)).square().sum().backward()
        optimizer.step()
        (state,) = optimizer.state.values()
        sizes[side] = sum(state[k].numel() for k in ("basis", "exp_avg", "exp_avg_sq"))
    assert sizes == {"smaller": 9 * 8 * 2, "larger": 6 * 8 * 2}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("when", [0, 2, 3])
def test_a_gradient_that_is_not_finite_leaves_everything(bad, when):
    """At the first update, between renewals and at one."""
    model = Net()
    run = rs.attach(model, rs.GaLore(rank=3, every=3, stagger=False))
    optimizer = run.optimizer(lr=1e-2)
    for step in range(when + 1):
        loss_of(model, step).backward()
        if step == when:
            model.wide.weight.grad[0, 0] = bad
            weights = copy.deepcopy(model.state_dict())
            states = {p: {k: t.clone() for k, t in s.items()} for p, s in optimizer.state.items()}
        optimizer.step()
        optimizer.zero_grad()
    assert run.skipped == 1
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert {p: s.keys() for p, s in optimizer.state.items() if s} == {p: s.keys() for p, s in states.items() if s}
    assert all(torch.equal(t, states[p][k]) for p, s in optimizer.state.items() for k, t in s.items())
    loss_of(model, 9).backward()
    optimizer.step()
    assert all(bool(torch.isfinite(p).all()) for p in model.parameters())


# ---- other layers


def test_a_convolution_is_projected_as_its_matrix():
    g = torch.Generator().manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, bias=False)
    start = torch.randn(conv.weight.shape, generator=g) / 5
    with torch.no_grad():
        conv.weight.copy_(start)
    x = torch.randn(2, 3, 6, 6, generator=g)
    flat = nn.Parameter(conv.weight.detach().flatten(1).clone())  # (8, 27)
    rule = Project(4, clock=Clock(2, stagger=False), finder="svd", scale=0.25)
    by_hand = Optimizer([{"params": [flat]}], [rule], lr=1e-2)
    model = nn.Sequential(conv)
    optimizer = rs.attach(model, rs.GaLore(rank=4, every=2, finder="svd", targets="0")).optimizer(lr=1e-2)
    for _ in range(5):
        model(x).square().mean().backward()
        flat.grad = conv.weight.grad.flatten(1).clone()
        optimizer.step()
        by_hand.step()
        optimizer.zero_grad()
    torch.testing.assert_close(conv.weight.flatten(1), flat, rtol=1e-6, atol=1e-7)
    assert (conv.weight - start).abs().max() > 1e-3
    assert optimizer.state[conv.weight]["basis"].shape == (8, 4)


def test_a_convolution_with_its_channels_last_takes_the_same_steps():
    weights = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3)).to(memory_format=layout)
        optimizer = rs.attach(model, rs.GaLore(rank=4, every=2, finder="svd", targets="0")).optimizer(lr=1e-2)
        x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))
        start = model[0].weight.detach().clone()
        for _ in range(4):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model[0].weight.detach())
        assert (weights[-1] - start).abs().max() > 1e-3
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_gpt2_trains_through_conv1d_as_through_a_linear_layer():
    from transformers.pytorch_utils import Conv1D

    g = torch.Generator().manual_seed(0)
    linear, conv = nn.Linear(6, 10), Conv1D(10, 6)
    start = torch.randn(10, 6, generator=g) / 2
    with torch.no_grad():
        linear.weight.copy_(start)
        conv.weight.copy_(start.mT)
        conv.bias.copy_(linear.bias.zero_())
    x = torch.randn(7, 6, generator=g)
    for layer in (linear, conv):
        model = nn.Sequential(layer)
        optimizer = rs.attach(model, rs.GaLore(rank=2, every=2, finder="svd", targets="0")).optimizer(lr=1e-2)
        for _ in range(5):
            (model(x) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(linear.weight.mT, conv.weight, rtol=1e-5, atol=1e-6)
    assert (linear.weight - start).abs().max() > 1e-3


def test_fused_experts_have_a_basis_each():
    torch.manual_seed(0)
    config = tf.MixtralConfig(
        vocab_size=20, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=3, num_experts_per_tok=1, max_position_embeddings=16,
    )  # fmt: skip
    model = tf.MixtralForCausalLM(config)
    name, stack = next((n, p) for n, p in model.named_parameters() if p.dim() == 3)
    run = rs.attach(model, rs.GaLore(rank=2, every=2, targets=name.rpartition(".")[2]))
    optimizer = run.optimizer(lr=1e-2)
    before = stack.detach().clone()
    for step in range(3):
        tokens = torch.randint(0, 20, (2, 3), generator=torch.Generator().manual_seed(step))
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    state = optimizer.state[stack]
    assert state["basis"].shape[0] == 3
    assert state["basis"].shape[2] == 2
    ranks = []
    for e in range(3):
        ranks.append(int(torch.linalg.matrix_rank(stack[e].detach() - before[e], rtol=1e-4)))
    assert 2 <= max(ranks) <= 4  # two directions in each of two bases; who got no token stands still


# ---- 8 bits


def test_small_layers_move_with_8_bit_moments():
    """Below a block, where galore-torch's 8-bit optimizer moves nothing at all."""
    before = Net()
    model, _, _ = trained(rs.GaLore(rank=3, moments="8bit"), 2)
    for p, q in zip(model.parameters(), before.parameters(), strict=True):
        assert not torch.equal(p, q)


# ---- a gradient that is not there yet


@pytest.mark.parametrize("gradient", ["full", "projected"])
@pytest.mark.parametrize("finder", ["svd", "range"])
def test_a_layer_behind_one_of_zeros_trains_from_its_first_gradient(gradient, finder):
    """Its first gradient is zero, which says nothing of a subspace: the basis is found in the second update."""
    g = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10, bias=False, dtype=D), nn.Tanh(), nn.Linear(10, 4, bias=False, dtype=D))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(10, 6, generator=g, dtype=D))
        model[2].weight.zero_()
    start = model[0].weight.detach().clone()
    x, y = torch.randn(8, 6, generator=g, dtype=D), torch.randn(8, 4, generator=g, dtype=D)
    method = rs.GaLore(rank=2, every=0, finder=finder, gradient=gradient, targets=("0", "2"), scale=1.0)
    optimizer = rs.attach(model, method).optimizer(lr=1e-2, check_gradients=False)
    for step in range(4):
        W = [layer.weight.detach().clone() for layer in (model[0], model[2])]
        h = torch.tanh(x @ W[0].mT)
        back = 2 / y.numel() * (h @ W[1].mT - y) @ W[1] * (1 - h**2)
        G = back.mT @ x  # ∂/∂W of the mean square, written out
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            assert torch.equal(model[0].weight, start)
        if step == 1:  # the first step of an Adam, along the leading directions of this gradient
            Q = torch.linalg.svd(G)[2][:2].mT
            wanted = W[0] - 1e-2 * (G @ Q) / ((G @ Q).abs() + 1e-8) @ Q.mT
            if finder == "svd":
                torch.testing.assert_close(model[0].weight.detach(), wanted, rtol=1e-9, atol=1e-11)
    assert int(torch.linalg.matrix_rank(model[0].weight.detach() - start, rtol=1e-6)) == 2


# ---- controls


def test_a_product_of_two_small_matrices_learns_far_less():
    """W = BA from scratch cannot leave rank r; GaLore at the same rank can."""
    g = torch.Generator().manual_seed(0)
    target = torch.randn(24, 24, generator=g)
    x = torch.randn(64, 24, generator=g)

    def fit(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
        for _ in range(300):
            loss = (model(x) - x @ target.mT).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    full = nn.Sequential(nn.Linear(24, 24, bias=False))
    galore = rs.attach(full, rs.GaLore(rank=4, every=5, scale=1.0, transport="square")).optimizer(lr=0.1)
    low = nn.Sequential(nn.Linear(24, 4, bias=False), nn.Linear(4, 24, bias=False))
    with torch.no_grad():
        for p in (*full.parameters(), *low.parameters()):
            p.copy_(torch.randn(p.shape, generator=g) / p.shape[1] ** 0.5)
    assert fit(full, galore) < 0.2 * fit(low, torch.optim.Adam(low.parameters(), lr=3e-2))


def test_a_closure_is_the_same_as_none():
    plain, _, _ = trained(rs.GaLore(rank=3, every=2), 5)
    model = Net()
    optimizer = rs.attach(model, rs.GaLore(rank=3, every=2)).optimizer(lr=1e-2)
    for step in range(5):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        assert optimizer.step(closure).item() > 0
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), model.parameters(), strict=True))


# ---- bad input


def test_a_rank_over_a_side_is_told_once(caplog):
    with caplog.at_level(logging.WARNING, "rankshift"):
        _, run, _ = trained(rs.GaLore(rank=100, every=2), 3)
    (said,) = [record.getMessage() for record in caplog.records]
    assert (
        said == "GaLore(rank=100): 3 of 3 layers have a smaller side; there the rank is that side, at most 8 at tall."
    )
    assert set(run.subspaces.values()) == {8}
    caplog.clear()
    with caplog.at_level(logging.WARNING, "rankshift"):
        trained(rs.GaLore(rank=8), 1)
    assert not caplog.records


def test_targets_that_match_nothing():
    with pytest.raises(UnmatchedTarget, match="'nowhere' matches no layer"):
        rs.attach(Net(), rs.GaLore(targets="nowhere"))


@pytest.mark.parametrize("targets", ["table", ("table", "wide")])
@pytest.mark.parametrize("rest", ["train", "freeze"])
def test_an_embedding_in_targets_is_refused(targets, rest):
    model = Net()
    flags = [p.requires_grad for p in model.parameters()]
    with pytest.raises(UnsupportedLayer, match="table is an Embedding"):
        rs.attach(model, rs.GaLore(targets=targets, rest=rest))
    assert [p.requires_grad for p in model.parameters()] == flags
    rs.attach(model, rs.GaLore(rank=2))  # the model is free


def test_complex_weights_are_refused():
    model = nn.Sequential(nn.Linear(4, 4, dtype=torch.complex64))
    with pytest.raises(UnsupportedLayer, match="weights in complex64: only real ones train"):
        rs.attach(model, rs.GaLore(rank=2, targets="0"))


def test_a_sparse_gradient_is_refused_by_name_before_anything_moves():
    model = Net()
    model.table.sparse = True
    run = rs.attach(model, rs.GaLore(rank=3))
    optimizer = run.optimizer(lr=1e-2, check_gradients=False)
    before = copy.deepcopy(model.state_dict())
    loss_of(model, 0).backward()
    with pytest.raises(ConfigError, match=r"gradient of table\.weight \(11, 8\) is sparse"):
        optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_state_of_another_method_is_told_apart():
    _, _, full = trained(rs.Full(), 2)
    other = rs.attach(Net(), rs.GaLore(rank=3)).optimizer()
    with pytest.raises(ConfigError, match="The saved optimizer has groups of"):
        other.load_state_dict(copy.deepcopy(full.state_dict()))


def test_a_run_goes_on_under_another_rank(caplog):
    model, _, optimizer = trained(rs.GaLore(rank=3, every=4, transport="square"), 3)
    saved = copy.deepcopy(optimizer.state_dict())
    twin = Net()
    twin.load_state_dict(model.state_dict())
    run = rs.attach(twin, rs.GaLore(rank=5, every=4, transport="square"))
    other = run.optimizer(lr=1e-2)
    with caplog.at_level(logging.WARNING, "rankshift"):
        other.load_state_dict(saved)
    said = [record.getMessage() for record in caplog.records]
    assert any("rank 3 until the next renewal, then 5: tall.weight and 2 more" in text for text in said)
    for step in range(3, 9):
        loss_of(twin, step).backward()
        other.step()
        other.zero_grad()
    assert set(run.subspaces.values()) == {5}
    assert run.step == 9


@pytest.mark.parametrize(
    ("field", "value"), [("rank", 0), ("every", -1), ("scale", 0.0), ("modules_to_save", ("norm",))]
)
def test_wrong_fields(field, value):
    with pytest.raises(ConfigError, match=field):
        rs.GaLore(**{field: value})


# ---- what others may have done to the model --------------------------------------------------------------------------


def tied_llama() -> nn.Module:
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=31,
        tie_word_embeddings=True,
    )  # fmt: skip
    return tf.AutoModelForCausalLM.from_config(config)


def test_a_tied_head_is_refused_or_gets_a_weight_of_its_own() -> None:
    method = rs.GaLore(rank=4, targets=("q_proj", "lm_head"))
    with pytest.raises(TiedWeights, match=r"lm_head\.weight"):
        rs.attach(tied_llama(), method)
    model = tied_llama()
    run = rs.attach(model, replace(method, tied="untie"))
    ids = torch.arange(12).view(2, 6)
    optimizer = run.optimizer(lr=1e-3)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    assert model.lm_head.weight is not model.get_input_embeddings().weight
    assert "basis" in optimizer.state[model.lm_head.weight]
    assert "lm_head.weight" in str(run.subspace_table())


def test_a_target_frozen_after_attach_is_refused() -> None:
    model = Net()
    run = rs.attach(model, rs.GaLore(rank=2))
    model.wide.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"wide\.weight was frozen"):
        run.optimizer(lr=1e-2)


def test_the_mean_energy_is_of_those_that_have_a_subspace() -> None:
    model = Net()
    run = rs.attach(model, rs.GaLore(rank=2))
    run.optimizer(lr=1e-2)
    assert run.metrics()["subspace_energy"] == 0
    run.optimizer(lr=1e-2)
    optimizer = run._driver._optimizer
    model.wide.requires_grad_(False)
    loss_of(model.train(), 0).backward()
    optimizer.step()
    energies = [optimizer.state[layer.weight]["energy"].item() for layer in (model.tall, model.square)]
    assert run.metrics()["subspace_energy"] == pytest.approx(sum(energies) / 2)
