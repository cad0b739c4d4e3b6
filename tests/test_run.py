"""Several adapters on one model; off, merged, taken off; the next phase. Oracles are explicit float64 formulas."""

from __future__ import annotations

import hashlib
import itertools

import pytest
import torch
from torch import nn

import rankshift as rs
from rankshift.core.random import Key, normal

LORA = rs.LoRA


class Net(nn.Module):
    """Three layers of odd sizes, a norm between them, one bias missing."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 10)
        self.first = nn.Linear(10, 14)
        self.norm = nn.LayerNorm(14)
        self.second = nn.Linear(14, 9, bias=False)
        self.head = nn.Linear(9, 5)

    def forward(self, ids):
        x = self.norm(self.first(self.embed(ids)).tanh())
        return self.head(self.second(x))


IDS = torch.arange(22).reshape(2, 11) % 11


def net(dtype=torch.float64, seed=0):
    model = Net().to(dtype)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(normal(Key(seed) / name, tuple(p.shape), 0.4, dtype=torch.float64))
    return model.eval()


def stir(run, seed=1):
    """Move everything that trains by keyed noise."""
    with torch.no_grad():
        for name, p in run.trainable():
            p.add_(normal(Key(seed) / name, tuple(p.shape), 0.3, dtype=torch.float64).to(p.dtype))


def out(model):
    with torch.no_grad():
        return model(IDS)


def bits(model):
    """A hash of every tensor of the model as it came, by its name there."""
    names = {name for name, _ in Net().named_parameters()}
    plain = {
        n.replace(".base.", ".").replace("base.", ""): p for n, p in model.named_parameters() if ".adapters." not in n
    }
    return {n: hashlib.sha256(plain[n].detach().contiguous().view(torch.uint8).numpy()).hexdigest() for n in names}


def two(dtype=torch.float64, first=None, second=None):
    """A model with two adapters on overlapping layers, both away from their start, "default" active."""
    model = net(dtype)
    run = rs.attach(model, first or LORA(rank=2, targets=("first", "second")))
    stir(run)
    run.add("french", second or LORA(rank=3, alpha=5, targets=("second", "head", "embed")))
    run.use("french")
    stir(run)
    run.use("default")
    return model, run


# ---- several adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora"])
def test_changes_add_up(init):
    """For layers in a row the sum holds exactly only where each is linear in the other: so on one layer."""
    model = net()
    base = out(model)
    run = rs.attach(model, LORA(rank=2, init=init, targets="head"))
    run.add("french", LORA(rank=3, alpha=5, targets="head"))
    run.use("default", "french")
    stir(run)
    ys = {}
    for names in (("default",), ("french",), ("default", "french"), ("french", "default"), ()):
        run.use(*names)
        assert run.active == names
        ys[names] = out(model)
    assert torch.equal(ys[()], base)
    sum_of_changes = (ys["default",] - base) + (ys["french",] - base)
    for names in (("default", "french"), ("french", "default")):
        torch.testing.assert_close(ys[names] - base, sum_of_changes, rtol=0, atol=1e-12)
    assert (ys["default",] - base).abs().max() > 0.1
    assert (ys["french",] - base).abs().max() > 0.1


def test_each_site_has_the_sum_of_the_acting_deltas():
    model, run = two()
    run.use("default", "french")
    plain = net()
    with torch.no_grad():
        for name in ("default", "french"):
            for site, adapter in run.adapter(name).items():
                A, B = adapter.A.double(), adapter.B.double()
                delta = adapter.scale * B @ A
                plain.get_submodule(site).weight += delta.t() if site == "embed" else delta
    torch.testing.assert_close(out(model), out(plain), rtol=0, atol=1e-12)


def test_the_second_is_not_active_until_used():
    model = net()
    run = rs.attach(model, LORA(rank=2, targets="first"))
    stir(run)
    before = out(model)
    run.add("french", LORA(rank=2, init="orthogonal", targets=("first", "head")))
    assert (run.adapters, run.active) == (("default", "french"), ("default",))
    assert torch.equal(out(model), before)
    assert not any(p.requires_grad for a in run.adapter("french").values() for p in a.parameters())


def test_training_one_leaves_the_other_and_the_base():
    model, run = two()
    for name, other in (("french", "default"), ("default", "french")):
        run.use(name)
        base = bits(model)
        still = {k: v.clone() for k, v in run.state_dict()["tensors"].items() if k.startswith(f"{other}/")}
        mine = {k: v.clone() for k, v in run.state_dict()["tensors"].items() if k.startswith(f"{name}/")}
        optimizer = run.optimizer(lr=0.1, weight_decay=0.1)
        model.train()
        for _ in range(3):
            model(IDS).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        now = run.state_dict()["tensors"]
        assert bits(model) == base == bits(net())
        assert all(torch.equal(now[k], v) for k, v in still.items())
        assert not any(torch.equal(now[k], v) for k, v in mine.items())
        assert all(k.startswith(f"{name}/") or k.startswith(f"{other}/") for k in now)


def test_both_train_when_both_act():
    model, run = two()
    run.use("default", "french")
    names = [name for name, _ in run.trainable()]
    assert any(name.startswith("french:") for name in names)
    optimizer = run.optimizer(lr=0.1)
    model.train()
    before = {k: v.clone() for k, v in run.state_dict()["tensors"].items()}
    model(IDS).square().mean().backward()
    optimizer.step()
    assert not any(torch.equal(run.state_dict()["tensors"][k], v) for k, v in before.items())


def test_switching_back_and_forth_keeps_every_bit():
    model, run = two()
    seen = {}
    for names in itertools.chain(*[[(), ("default",), ("french",), ("default", "french")]] * 3):
        run.use(*names)
        assert torch.equal(seen.setdefault(names, out(model)), out(model))
    assert bits(model) == bits(net())


def test_delete():
    model, run = two()
    run.use("default", "french")
    run.delete("french")
    assert (run.adapters, run.active) == (("default",), ("default",))
    assert set(run.sites) == {"first", "second"}
    assert type(model.head) is nn.Linear
    assert type(model.embed) is nn.Embedding
    alone = net()
    stir(rs.attach(alone, LORA(rank=2, targets=("first", "second"))))
    assert torch.equal(out(model), out(alone))
    assert bits(model) == bits(net())
    with pytest.raises(rs.errors.AttachError, match="only one"):
        run.delete("default")
    run.add("french", LORA(rank=2))  # the name is free again


def test_delete_the_first():
    model, run = two()
    run.use("french")
    wanted = out(model)
    run.use("default", "french")
    run.delete("default")
    assert run.active == ("french",)
    assert torch.equal(out(model), wanted)
    assert run.method == LORA(rank=3, alpha=5, targets=("second", "head", "embed"))


@pytest.mark.parametrize("weights", [None, [0.5, -2.0], [0.0, 1.0]])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_combine_is_the_weighted_sum(init, weights):
    model, run = two(first=LORA(rank=2, init=init, scaling="rslora", targets=("first", "second")))
    before = {k: v.clone() for k, v in run.state_dict()["tensors"].items()}
    run.combine(["default", "french"], "both", weights)
    assert run.active == ("default",)
    assert all(torch.equal(run.state_dict()["tensors"][k], v) for k, v in before.items())
    parts = [run.adapter(name) for name in ("default", "french")]
    for site, adapter in run.adapter("both").items():
        wanted = sum(
            w * part[site].delta().detach() for w, part in zip(weights or [1, 1], parts, strict=True) if site in part
        )
        torch.testing.assert_close(adapter.delta().detach(), wanted, rtol=0, atol=1e-12)
        assert adapter.rank == sum(part[site].factors()[0].shape[0] for part in parts if site in part)
    run.use("both")
    both = out(model)
    if weights is None:
        run.use("default", "french")
        torch.testing.assert_close(both, out(model), rtol=0, atol=1e-12)
    again = net()
    loaded = rs.restore(again, run.state_dict())
    loaded.use("both")
    assert torch.equal(out(again), both)
    assert bits(model) == bits(net())


def test_combine_takes_biases_along_and_trains_on():
    model, run = two(first=LORA(rank=2, lora_bias=True, targets=("first", "head")), second=LORA(rank=3, targets="head"))
    run.combine(["default", "french"], "both", [2.0, 1.0])
    run.use("both")
    plain = net()
    with torch.no_grad():
        for site, w in (("first", 2.0), ("head", 2.0)):
            adapter = run.adapter("default")[site]
            plain.get_submodule(site).weight += w * adapter.scale * adapter.B @ adapter.A
            plain.get_submodule(site).bias += w * adapter.scale * adapter.b
        plain.head.weight += run.adapter("french")["head"].delta()
    torch.testing.assert_close(out(model), out(plain), rtol=0, atol=1e-12)
    optimizer = run.optimizer(lr=0.1)
    model.train()
    model(IDS).square().mean().backward()
    optimizer.step()


def test_what_cannot_be_combined():
    model, run = two(first=LORA(rank=2, dora=True, targets=("first", "second")))
    before = [type(m) for m in model.modules()]
    with pytest.raises(rs.errors.ExportError, match="DoRA"):
        run.combine(["default", "french"], "both")
    _, copied = two(first=LORA(rank=2, targets="first", modules_to_save=("norm",)))
    with pytest.raises(rs.errors.ExportError, match="modules_to_save"):
        copied.combine(["default", "french"], "both")
    with pytest.raises(rs.errors.ConfigError, match="weights"):
        run.combine(["french"], "both", [1.0, 2.0])
    with pytest.raises(rs.errors.ConfigError, match="weights"):
        run.combine([], "both")
    with pytest.raises(rs.errors.AttachError, match="exists"):
        run.combine(["french"], "default")
    with pytest.raises(rs.errors.AttachError, match="'french'"):
        run.combine(["frensh"], "both")
    assert [type(m) for m in model.modules()] == before
    assert run.adapters == ("default", "french")


def test_whole_modules_belong_to_their_adapter():
    model = net()
    base = out(model)
    run = rs.attach(model, LORA(rank=2, targets="first", modules_to_save=("head",)))
    stir(run)
    one = out(model)
    run.add("french", LORA(rank=2, targets="first", modules_to_save=("head", "norm")))
    run.use("french")
    stir(run, seed=2)
    other = out(model)
    assert not torch.equal(one, other)
    run.use("default")
    assert torch.equal(out(model), one)
    with run.disabled():
        assert torch.equal(out(model), base)
    with pytest.raises(rs.errors.AttachError, match="head"):
        run.use("default", "french")
    assert run.active == ("default",)
    run.delete("french")
    assert torch.equal(out(model), one)


# ---- off -------------------------------------------------------------------------------------------------------------

METHODS = {
    "plain": LORA(rank=2, targets=("first", "head", "embed")),
    "pissa": LORA(rank=2, init="pissa", targets=("first", "head")),
    "dora": LORA(rank=2, dora=True, targets=("first", "head")),
    "biases": LORA(rank=2, bias="all", targets=("first", "head")),
    "lora_bias": LORA(rank=2, lora_bias=True, targets=("first", "head")),
    "whole": LORA(rank=2, targets="first", modules_to_save=("head",)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_disabled_is_the_base_bit_for_bit(name, dtype):
    model = net(dtype)
    base = out(model)
    run = rs.attach(model, METHODS[name])
    stir(run)
    acting = out(model)
    assert not torch.equal(acting, base)
    with run.disabled():
        assert torch.equal(out(model), base)
    assert torch.equal(out(model), acting)

    def fails():
        with run.disabled():
            assert torch.equal(out(model), base)
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert torch.equal(out(model), acting)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", METHODS)
def test_merged_for_a_while_restores_every_bit(name, dtype):
    model = net(dtype)
    run = rs.attach(model, METHODS[name])
    stir(run)
    before, acting, described = bits(model), out(model), run.describe()
    with run.merged() as merged:
        assert merged is model
        inside = out(model)
    assert bits(model) == before
    assert torch.equal(out(model), acting)
    assert run.describe() == described
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.2}[dtype]
    assert (inside - acting).abs().max() <= tolerance

    def fails():
        with run.merged():
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert bits(model) == before
    assert torch.equal(out(model), acting)
    assert torch.equal(out(run.merge()), inside)


@pytest.mark.parametrize("name", METHODS)
def test_detach_gives_the_model_back_as_it_came(name):
    model = net()
    model.norm.requires_grad_(False)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    base, modules = out(model), [(n, id(m)) for n, m in model.named_modules()]
    run = rs.attach(model, METHODS[name])
    stir(run)
    assert run.detach() is model
    assert torch.equal(out(model), base)
    assert [(n, id(m)) for n, m in model.named_modules()] == modules
    assert {n: p.requires_grad for n, p in model.named_parameters()} == wanted
    rs.attach(model, METHODS[name])  # free for another


# ---- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("init", ["kaiming", "pissa"])
def test_merge_is_the_sum_rounded_once(dtype, init):
    model = net(dtype)
    run = rs.attach(model, LORA(rank=3, alpha=5, init=init, targets=("first", "second", "head")))
    stir(run)
    run.add("french", LORA(rank=2, targets="second"))
    run.use("default", "french")
    stir(run, seed=3)
    wanted = {}
    for site in ("first", "second", "head"):
        adapters = [run.adapter(name)[site] for name in run.active if site in run.adapter(name)]
        W = model.get_submodule(site).base.weight.detach().clone()
        master = torch.promote_types(dtype, torch.float32)
        exact = W.double() + sum(
            a.scale * (a.B.double() @ a.A.double() - (0 if a.A0 is None else a.B0.double() @ a.A0.double()))
            for a in adapters
        )
        wanted[site] = exact.detach(), W, master
    merged = run.merge()
    for site, (exact, W, master) in wanted.items():
        got = merged.get_submodule(site).weight
        assert got.dtype == dtype
        half = torch.finfo(dtype).eps / 2 * exact.abs() + 1e-6 * (master == torch.float32)  # one rounding of the sum
        assert bool(((got.double() - exact).abs() <= half + 1e-14).all())
        assert not torch.equal(got, W)
    assert torch.equal(merged.norm.weight, net(dtype).norm.weight)


@pytest.mark.parametrize("name", METHODS)
def test_merge_leaves_plain_modules(name):
    model = net()
    model.norm.requires_grad_(False)
    wanted = {n: p.requires_grad for n, p in model.named_parameters()}
    keys, kinds = list(model.state_dict()), [(n, type(m)) for n, m in model.named_modules()]
    run = rs.attach(model, METHODS[name])
    stir(run)
    acting = out(model)
    merged = run.merge()
    assert merged is model
    torch.testing.assert_close(out(merged), acting, rtol=0, atol=1e-12)
    assert list(merged.state_dict()) == keys
    assert [(n, type(m)) for n, m in merged.named_modules()] == kinds
    assert {n: p.requires_grad for n, p in merged.named_parameters()} == wanted
    assert all(p.grad is None for p in merged.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in merged.modules())
    again = net(seed=4)
    again.load_state_dict(merged.state_dict())


def test_merge_is_of_the_active_ones():
    model, run = two()
    run.use("french")
    wanted = out(model)
    torch.testing.assert_close(out(run.merge()), wanted, rtol=0, atol=1e-12)
    model, run = two()
    run.use()
    assert torch.equal(out(run.merge()), out(net()))


def test_an_ended_run_says_how_it_ended():
    ends = {
        "merge": lambda run: run.merge(),
        "detach": lambda run: run.detach(),
        "shift": lambda run: run.shift(LORA(rank=2)),
    }
    for name, end in ends.items():
        run = rs.attach(net(), LORA(rank=2))
        optimizer = run.optimizer(lr=0.1)
        end(run)
        for call in (
            run.merge, run.detach, run.optimizer, run.state_dict, run.use, lambda run=run: run.add("b", LORA()),
            lambda run=run: run.delete("default"), lambda run=run: run.shift(LORA()), lambda run=run: run.save("x"),
            lambda run=run: run.export("x"), lambda run=run: run.disabled().__enter__(),
            lambda run=run: run.merged().__enter__(), lambda run=run: run.combine(["default"], "b"),
        ):  # fmt: skip
            with pytest.raises(rs.errors.AttachError, match=rf"{name}\(\)"):
                call()
        with pytest.raises(rs.errors.AttachError, match="no longer drives a run"):
            optimizer.step()


def test_a_bias_without_a_place_is_refused_before_anything_changes():
    model = net()
    run = rs.attach(model, LORA(rank=2, lora_bias=True, targets=("first", "second")))
    stir(run)
    before, acting = bits(model), out(model)
    with pytest.raises(rs.errors.AttachError, match="second has no bias"):
        run.merge()
    with pytest.raises(rs.errors.AttachError, match="second has no bias"), run.merged():
        pass
    assert bits(model) == before
    assert torch.equal(out(model), acting)


# ---- what stands in the way ------------------------------------------------------------------------------------------


def test_one_run_at_a_time():
    model = net()
    run = rs.attach(model, LORA(rank=2))
    with pytest.raises(rs.errors.AttachError, match=r"run\.add"):
        rs.attach(model, LORA(rank=2))
    outer = nn.Sequential(model)
    with pytest.raises(rs.errors.AttachError, match="attached"):
        rs.attach(outer, LORA(rank=2))
    state = run.state_dict()
    with pytest.raises(rs.errors.AttachError, match="fresh base"):
        rs.restore(model, state)
    run.merge()
    rs.attach(outer, LORA(rank=2))


@pytest.mark.parametrize("name", ["default", "not a name", "", "base", "buffer", "original", "a/b"])
def test_names_that_cannot_be(name):
    run = rs.attach(net(), LORA(rank=2))
    with pytest.raises(rs.errors.AttachError, match=repr(name)):
        run.add(name, LORA(rank=2))


def test_what_trains_in_place_stands_alone():
    run = rs.attach(net(), LORA(rank=2))
    with pytest.raises(rs.errors.AttachError, match="in place"):
        run.add("b", LORA(rank=2, bias="all"))
    with pytest.raises(rs.errors.AttachError, match="in place"):
        run.add("b", rs.Full())
    for method in (LORA(rank=2, bias="lora_only"), rs.Full()):
        run = rs.attach(net(), method)
        with pytest.raises(rs.errors.AttachError, match="in place"):
            run.add("b", LORA(rank=2))
    run = rs.attach(net(), LORA(rank=2, bias="all"))
    with pytest.raises(rs.errors.AttachError, match=r"run\.disabled\(\)"):
        run.use()


def test_what_changes_the_base_cannot_be_disabled():
    run = rs.attach(net(), rs.Full())
    with pytest.raises(rs.errors.AttachError, match="base itself"), run.disabled():
        pass
    with pytest.raises(rs.errors.AttachError, match="base itself"):
        run.detach()


def test_an_unknown_name_is_met_with_the_nearest():
    _, run = two()
    for call in (run.use, run.delete, run.adapter):
        with pytest.raises(rs.errors.AttachError, match="'french'"):
            call("frensh")


# ---- the next phase --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "then", [LORA(rank=3, targets="head"), LORA(rank=2, init="pissa", targets=("first", "head")), rs.Full()]
)
@pytest.mark.parametrize("name", METHODS)
def test_shift_keeps_the_function(name, then):
    model = net()
    run = rs.attach(model, METHODS[name], seed=3, total_steps=9)
    optimizer = run.optimizer(lr=0.05)
    model.train()
    for _ in range(2):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    before = out(model)
    run = run.shift(then)
    torch.testing.assert_close(out(model), before, rtol=0, atol=1e-12)
    assert (run.step, run.seed, run.total_steps) == (2, 3, 9)
    assert [(p.method["method"], p.start, p.stop) for p in run.phases] == [("lora", 0, 2), (then.name, 2, None)]
    fresh = dict(net().named_parameters())
    if then != rs.Full():  # what the new run calls changed is what is no longer the base that came
        base = dict(run.detach().named_parameters())
        moved = {n for n, p in base.items() if not torch.equal(p, fresh[n])}
        assert moved <= run.changed


def test_after_a_shift_and_an_end_the_model_trains_what_it_did() -> None:
    model = net()
    model.norm.requires_grad_(False)
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    run = rs.attach(model, rs.LoRA(rank=2)).shift(rs.Full())
    assert not any(name.startswith("norm") for name, _ in run.trainable())
    run.shift(rs.LoRA(rank=2)).merge()
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_shift_back_and_forth():
    model = net()
    run = rs.attach(model, rs.Full())
    for method in (LORA(rank=2), rs.Full(), LORA(rank=2, dora=True, targets="head"), rs.Full(targets="norm")):
        before = out(model)
        run = run.shift(method)
        torch.testing.assert_close(out(model), before, rtol=0, atol=1e-12)
        stir(run)
    assert [p.method["method"] for p in run.phases] == ["full", "lora", "full", "lora", "full"]
    merged = run.merge()
    assert [type(m) for m in merged.modules()] == [type(m) for m in Net().modules()]


def test_a_shift_that_cannot_begin_ends_nothing():
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 3)).double()
    run = rs.attach(model, rs.LoRA(rank=2))
    optimizer = run.optimizer(lr=0.1)
    x = torch.randn(5, 6, dtype=torch.float64)
    model(x).square().sum().backward()
    optimizer.step()
    before = model(x)
    for impossible in (rs.LoRA(rank=50), rs.LoRA(targets="nowhere")):
        with pytest.raises(rs.errors.TargetError):
            run.shift(impossible)
    assert torch.equal(model(x), before)
    assert run.step == 1
    model(x).square().sum().backward()
    optimizer.step()
    assert run.step == 2


def two_layers(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5, bias=bias), nn.Linear(5, 3, bias=bias)).double()


def train(model, optimizer, x, steps=1):
    for _ in range(steps):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


X = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(4, 6)


def test_the_bias_of_a_whole_copy_trains_beside_trained_biases():
    model = two_layers()
    run = rs.attach(model, rs.LoRA(rank=2, targets="0", bias="all", modules_to_save=("1",)))
    names = [name for name, _ in run.trainable()]
    assert len(names) == len(set(names)) == 5
    before = {name: p.detach().clone() for name, p in run.trainable()}
    train(model, run.optimizer(lr=0.1), X, 3)
    assert not any(torch.equal(p, before[name]) for name, p in run.trainable())


@pytest.mark.parametrize("verb", ["merge", "merged"])
def test_an_interrupted_fold_can_be_repeated(verb, monkeypatch):
    model = two_layers()
    run = rs.attach(model, rs.LoRA(rank=2))
    train(model, run.optimizer(lr=0.1), X, 2)
    wanted, bits = model(X), [site.base.weight.clone() for site in run.sites.values()]
    second = list(run.sites.values())[1].base
    monkeypatch.setattr(second, "add_", lambda delta: (_ for _ in ()).throw(MemoryError()))

    def fold():
        if verb == "merge":
            return run.merge()
        with run.merged() as merged:
            return merged(X)

    with pytest.raises(MemoryError):
        fold()
    monkeypatch.undo()
    assert (model(X) - wanted).abs().max() <= 1e-12
    if verb == "merged":
        assert all(torch.equal(s.base.weight, b) for s, b in zip(run.sites.values(), bits, strict=True))
    fold()
    assert (model(X) - wanted).abs().max() <= 1e-12


def test_blocks_do_not_mix(tmp_path):
    model = two_layers()
    base = model(X).detach()
    run = rs.attach(model, rs.LoRA(rank=2, bias="lora_only"))
    optimizer = run.optimizer(lr=0.1)
    train(model, optimizer, X, 2)
    trained = model(X).detach()
    with run.disabled():
        with run.disabled():
            assert torch.equal(model(X), base)
        assert torch.equal(model(X), base)
        verbs = (run.merge, run.state_dict, lambda: run.save(tmp_path / "a"), lambda: run.export(tmp_path / "b"))
        for verb in (*verbs, lambda: run.use("default"), lambda: run.shift(rs.Full()), run.merged().__enter__):
            with pytest.raises(rs.errors.AttachError, match=r"inside run.disabled"):
                verb()
    with run.merged():
        for verb in (*verbs, run.disabled().__enter__):
            with pytest.raises(rs.errors.AttachError, match=r"inside run.merged"):
                verb()
        assert (model(X) - trained).abs().max() <= 1e-12
    assert torch.equal(model(X), trained)
    train(model, optimizer, X)
    assert run.step == 3


def test_an_update_while_nothing_acts_is_refused():
    model = nn.Sequential(two_layers(), nn.LayerNorm(3).double())
    run = rs.attach(model, rs.LoRA(rank=2))
    optimizer = run.optimizer(lr=0.1)
    train(model, optimizer, X)
    model(X).square().sum().backward()
    with run.disabled(), pytest.raises(rs.errors.AttachError, match="not acting"):
        optimizer.step()


def test_an_optimizer_made_for_other_adapters_is_refused():
    model = two_layers()
    run = rs.attach(model, rs.LoRA(rank=2))
    optimizer = run.optimizer(lr=0.1)
    run.add("second", rs.LoRA(rank=2, lr_ratio=16))
    run.use("second")
    model(X).square().sum().backward()
    with pytest.raises(rs.errors.AttachError, match=r"second:0\.\w trains now"):
        optimizer.step()
    ratios = {name: group["lr"] for group in run.optimizer(lr=0.1).param_groups for name in group["param_names"]}
    assert ratios["second:0.B"] == pytest.approx(1.6)
    assert ratios["second:0.A"] == pytest.approx(0.1)


def test_running_statistics_go_back_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()
    start = model.eval()(X).detach()
    run = rs.attach(model.train(), rs.LoRA(rank=2))
    train(model, run.optimizer(lr=0.1), X, 3)
    model.eval()
    trained = model(X).detach()
    with run.disabled():
        assert torch.equal(model(X), start)
    assert torch.equal(model(X), trained)
    run.use()
    run.use("default")
    assert torch.equal(run.detach()(X), start)


def test_a_refused_state_changes_nothing():
    model = two_layers()
    run = rs.attach(model, rs.LoRA(rank=2))
    other = rs.attach(two_layers(), rs.LoRA(rank=2))
    other.add("extra", rs.LoRA(rank=2))
    state = other.state_dict()
    del state["tensors"]["extra/0.A"]
    before = model(X)
    with pytest.raises(rs.errors.WrongBase, match=r"lacks extra/0\.A"):
        run.load_state_dict(state)
    assert run.adapters == ("default",)
    assert torch.equal(model(X), before)


def test_a_state_from_before_the_base_changed_is_refused():
    run = rs.attach(two_layers(), rs.LoRA(rank=2))
    state = run.state_dict()
    next(iter(run.sites.values())).base.add_(lambda rows: torch.ones(5, 6, dtype=torch.float64)[rows])
    with pytest.raises(rs.errors.WrongBase, match="was changed since"):
        run.load_state_dict(state)


def test_merging_says_which_adapters_it_leaves_out():
    run = rs.attach(two_layers(), rs.LoRA(rank=2))
    run.add("idle", rs.LoRA(rank=2))
    with pytest.warns(UserWarning, match="idle"):
        run.merge()


def test_skipped_updates_are_part_of_the_state():
    model = two_layers()
    run = rs.attach(model, rs.LoRA(rank=2))
    optimizer = run.optimizer(lr=0.1)
    train(model, optimizer, X * float("nan"))
    assert (run.step, run.skipped) == (0, 1)
    again = rs.restore(two_layers(), run.state_dict())
    assert again.skipped == 1
    again.optimizer(lr=0.1)
    assert again.skipped == 1


@pytest.mark.parametrize("method", [rs.LoRA(rank=2), rs.Full()], ids=lambda m: m.name)
def test_the_learning_rate_is_the_methods_own_unless_one_is_given(method):
    run = rs.attach(nn.Sequential(nn.Linear(4, 4)), method)
    assert run.optimizer().param_groups[0]["lr"] == {"lora": 2e-4, "full": 2e-5}[method.name]
    assert run.optimizer(lr=1e-3).param_groups[0]["lr"] == 1e-3
