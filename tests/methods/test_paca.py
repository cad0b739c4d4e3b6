"""PaCA: what the paper promises, against dense formulas, torch.optim and PEFT; numbered as the list of its fakes."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import rankshift as rs
from rankshift.core.errors import (
    AttachError,
    ConfigError,
    DataError,
    RankTooLarge,
    TiedWeights,
    UnsupportedLayer,
    WrongBase,
)
from rankshift.methods.paca import PaCALayer

F64 = torch.float64
BF16 = torch.bfloat16


def mlp(dtype: torch.dtype = F64, bias: bool = True) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(10, 12, bias), nn.Tanh(), nn.Linear(12, 6, bias)).to(dtype)


def noise(*shape: int, seed: int = 1, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def noise_generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def layer(run: rs.Run, site: str = "0", name: str = "default") -> PaCALayer:
    found = run.adapter(name)[site]
    assert isinstance(found, PaCALayer)
    return found


def stir(run: rs.Run, name: str = "default", size: float = 0.3) -> None:
    """Values of its own for every D, as training would give it."""
    with torch.no_grad():
        for i, adapter in enumerate(run.adapter(name).values()):
            adapter.D += size * noise(*adapter.D.shape, seed=5 + i, dtype=adapter.D.dtype)  # type: ignore[arg-type]


def now(W0: Tensor, adapter: PaCALayer) -> Tensor:
    """The (out, in) weight as the paper has it: W₀ with its columns replaced, rounded once."""
    W = W0.clone()
    at = adapter.channels
    W[:, at] = (W0[:, at].to(adapter.D.dtype) + adapter.scale * adapter.D.detach()).to(W.dtype)
    return W


def train(run: rs.Run, x: Tensor, steps: int, **options: Any) -> torch.optim.Optimizer:
    optimizer = run.optimizer(**{"lr": 1e-2, **options})
    for _ in range(steps):
        run.model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


# ---- 1, 2: gradients, and what moves


def test_1_gradients_are_columns_of_the_full_gradient():
    model, x = mlp(), noise(3, 5, 10)
    full = copy.deepcopy(model)
    run = rs.attach(model, rs.PaCA(rank=4, alpha=6))
    model(x).square().sum().backward()
    full(x).square().sum().backward()
    for site in ("0", "2"):
        adapter = layer(run, site)
        want = 1.5 * full.get_submodule(site).weight.grad[:, adapter.channels]  # type: ignore[index, union-attr]
        torch.testing.assert_close(adapter.D.grad, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_2_only_the_chosen_columns_move(dtype: torch.dtype):
    model, x = mlp(dtype), noise(8, 10, dtype=dtype)
    before = model[0].weight.detach().clone()
    run = rs.attach(model, rs.PaCA(rank=3))
    optimizer = train(run, x, 5)
    adapter, W = layer(run), run.sites["0"].base.weight
    others = torch.ones(10, dtype=torch.bool).index_fill(0, adapter.channels, False)
    assert torch.equal(W[:, others], before[:, others])
    assert (W[:, adapter.channels] != before[:, adapter.channels]).float().mean() > 0.9
    assert torch.equal(W, now(before, adapter))
    assert W.grad is None
    assert not W.requires_grad
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert [p.shape for p in held] == [(12, 3), (6, 3)]
    assert all(p.dtype is torch.float32 for p in held)
    state = [t for p in held for t in optimizer.state[p].values()]
    assert max(t.numel() for t in state) == 36, "no optimizer state of the size of W"
    assert torch.linalg.matrix_rank(adapter.delta().detach()) <= 3


def test_3_bytes_kept_in_a_model():
    """Of each layer's input b·r values and nothing else: the frozen model keeps only what tanh wants."""
    model, x = mlp(torch.float32), noise(40, 10, dtype=torch.float32)
    run = rs.attach(model, rs.PaCA(rank=3))
    mine = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def keep(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in mine:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = model(x)
    assert sorted(found.values()) == [40 * 3 * 4, 40 * 3 * 4, 40 * 12 * 4]
    assert x.untyped_storage().data_ptr() not in found
    assert y.requires_grad
    assert run.summary().trainable == 3 * (12 + 6)


# ---- 4: never stale, and written once an update


class Recomputed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for part in self:
            x = checkpoint(part, x, use_reentrant=False)
        return x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2, 3])
def test_4_every_forward_uses_the_columns_of_its_step(accumulate: int, recompute: bool):
    """At every micro-batch, recomputed or not, and in evaluation: a fresh Linear with the columns of now."""
    model = Recomputed(*mlp(torch.float32)) if recompute else mlp(torch.float32)
    before = {site: model.get_submodule(site).weight.detach().clone() for site in ("0", "2")}
    run = rs.attach(model, rs.PaCA(rank=4, alpha=12))
    seen: list[bool] = []

    def look(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        site = module.spec.name  # type: ignore[union-attr]
        fresh = F.linear(args[0], now(before[site], layer(run, site)), module.bias)  # type: ignore[arg-type]
        seen.append(torch.equal(out, fresh))

    for site in run.sites.values():
        site.register_forward_hook(look)
    optimizer = run.optimizer(lr=1e-2)
    weight = run.sites["0"].base.weight
    for step in range(4):
        version = weight._version
        for part in range(accumulate):
            model(noise(6, 10, seed=10 * step + part, dtype=torch.float32)).square().mean().backward()
            with torch.no_grad():
                model(noise(2, 10, dtype=torch.float32))
        assert weight._version == version, "a write within an update"
        optimizer.step()
        optimizer.zero_grad()
        assert weight._version == version + 1, "one write for an update"
        model.eval()
        model(noise(2, 10, dtype=torch.float32))
        model.train()
    assert all(seen)
    assert len(seen) == 4 * 2 * (2 * accumulate + 1)


def test_4_accumulated_gradients_are_those_of_the_whole_batch():
    ends = []
    for parts in (1, 3):
        model, x = mlp(), noise(6, 10)
        run = rs.attach(model, rs.PaCA(rank=4))
        optimizer = run.optimizer(lr=1e-2)
        for _ in range(3):
            for part in x.chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append(layer(run).D.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-10)


def test_4_an_update_that_is_skipped_writes_nothing():
    model = mlp(torch.float32)
    run = rs.attach(model, rs.PaCA(rank=4))
    optimizer = train(run, noise(4, 10, dtype=torch.float32), 2)
    weight = run.sites["0"].base.weight.detach().clone()
    (model(noise(4, 10, dtype=torch.float32)).sum() * float("nan")).backward()
    optimizer.step()
    assert run.skipped == 1
    assert torch.equal(run.sites["0"].base.weight, weight)


def test_a_change_of_d_by_hand_is_seen_by_the_next_forward():
    """An average swapped in and out, and torch's own load_state_dict."""
    model, x = mlp(), noise(3, 10)
    W0 = model[0].weight.detach().clone()
    run = rs.attach(model, rs.PaCA(rank=4))
    adapter = layer(run)
    first = model(x)
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    with torch.no_grad():
        adapter.D.copy_(noise(12, 4))
    changed = model(x)
    assert torch.equal(run.sites["0"].base.weight, now(W0, adapter))
    assert not torch.equal(changed, first)
    optimizer = torch.optim.SGD([adapter.D], lr=0.1)  # another's, which carries no events
    changed.sum().backward()
    optimizer.step()
    model(x)
    assert torch.equal(run.sites["0"].base.weight, now(W0, adapter))
    model.load_state_dict(kept)
    assert torch.equal(model(x), first)
    model.load_state_dict({"0.adapters.default.D": noise(12, 4)}, strict=False)
    assert torch.equal(model(x), changed)
    swapped = torch.func.functional_call(model, {"0.adapters.default.D": torch.zeros(12, 4, dtype=F64)}, (x,))
    assert torch.equal(swapped, first)
    assert torch.equal(model(x), changed)


def test_a_write_between_forward_and_backward_raises():
    model, x = mlp(), noise(3, 10)
    run = rs.attach(model, rs.PaCA(rank=4))
    loss = model(x).sum()
    with torch.no_grad():
        layer(run, "2").D.add_(1)
    model(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ---- 5: the base, loaded, merged, exported


@pytest.mark.parametrize("dtype", [F64, torch.float32, BF16])
def test_5_load_merge_disable_and_lora_are_one_function(dtype: torch.dtype, tmp_path):
    x = noise(3, 10, dtype=dtype)
    model = mlp(dtype)
    plain, W0 = model(x), {n: p.detach().clone() for n, p in model.named_parameters()}
    run = rs.attach(model, rs.PaCA(rank=4, alpha=6))
    train(run, x, 4)
    model.eval()
    trained = model(x)
    assert not torch.equal(trained, plain)

    run.save(tmp_path / "saved")
    again = mlp(dtype).eval()
    rs.load(again, tmp_path / "saved")
    assert torch.equal(again(x), trained), "loaded and not merged it acts"

    for _ in range(3):
        with run.disabled():
            assert torch.equal(model(x), plain)
            assert torch.equal(run.sites["0"].base.weight, W0["0.weight"])
        assert torch.equal(model(x), trained)
    with run.merged():
        assert torch.equal(model(x), trained), "what is merged is what acted, to the bit"
    assert torch.equal(model(x), trained)

    low = mlp(F64)
    with torch.no_grad():
        for site, adapter in run.adapter().items():
            A, B = adapter.low_rank()  # type: ignore[misc]
            assert torch.equal(A.sum(1), torch.ones(4, dtype=A.dtype))
            assert torch.equal(A.nonzero()[:, 1], layer(run, site).channels)
            assert torch.equal((B @ A), adapter.delta())
            low.get_submodule(site).weight.copy_(W0[f"{site}.weight"] + B.double() @ A.double())
            low.get_submodule(site).bias.copy_(W0[f"{site}.bias"])
    wide = {F64: 1e-12, torch.float32: 1e-5, BF16: 0.05}[dtype]
    assert (low(x.double()) - trained.double()).abs().max() < wide

    run.export(tmp_path / "merged", format="merged")
    from safetensors.torch import load_file

    stored = load_file(tmp_path / "merged" / "model.safetensors")
    merged = run.merge()
    assert torch.equal(merged(x), trained)
    assert {n: tuple(p.shape) for n, p in merged.named_parameters()} == {n: tuple(p.shape) for n, p in W0.items()}
    assert all(torch.equal(stored[n], p) for n, p in merged.named_parameters())


def test_5_detach_is_the_base():
    model, x = mlp(BF16), noise(3, 10, dtype=BF16)
    bits = {n: p.detach().clone() for n, p in model.named_parameters()}
    run = rs.attach(model, rs.PaCA(rank=4))
    train(run, x, 3)
    run.detach()
    assert all(torch.equal(p.view(torch.int16), bits[n].view(torch.int16)) for n, p in model.named_parameters())


def test_5_columns_come_back_with_the_signs_of_their_zeros():
    model = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.fill_(-0.0)
    run = rs.attach(model, rs.PaCA(rank=2))
    stir(run)
    model(torch.ones(1, 4))
    run.detach()
    assert bool(torch.signbit(model[0].weight).all())


# ---- 6: the choice


def test_6_the_choice_is_keyed_sorted_and_saved(tmp_path):
    torch.manual_seed(1)
    one = rs.attach(mlp(), rs.PaCA(rank=6), seed=3)
    torch.manual_seed(2)
    two = rs.attach(mlp(), rs.PaCA(rank=6), seed=3)
    other = rs.attach(mlp(), rs.PaCA(rank=6), seed=4)
    twins = nn.Sequential(*(nn.Linear(30, 5) for _ in range(3)))
    apart = rs.attach(twins, rs.PaCA(rank=6))
    for run in (one, two, other, apart):
        for adapter in run.adapter().values():
            chosen = adapter.channels.tolist()  # type: ignore[operator, union-attr]
            assert chosen == sorted(set(chosen))
            assert 0 <= chosen[0] <= chosen[-1] < adapter.in_features
            assert adapter.channels.dtype is torch.int64
    assert torch.equal(layer(one).channels, layer(two).channels)
    assert not torch.equal(layer(one).channels, layer(other).channels)
    assert len({tuple(layer(apart, site).channels.tolist()) for site in "012"}) == 3, "each layer has its own"
    other.save(tmp_path / "saved")
    loaded = rs.load(mlp(), tmp_path / "saved", seed=77)
    assert torch.equal(layer(loaded).channels, layer(other).channels)


def test_6_every_channel_is_as_likely():
    counts = torch.zeros(8)
    for seed in range(400):
        run = rs.attach(nn.Sequential(nn.Linear(8, 1)), rs.PaCA(rank=2), seed=seed)
        counts[layer(run).channels] += 1
    assert ((counts - 100).abs() < 40).all(), counts  # σ = 8.7


def test_6_blocks():
    model = nn.Sequential(nn.Linear(64, 3))
    run = rs.attach(model, rs.PaCA(rank=24, select="blocks", block=8), seed=1)
    chosen = layer(run).channels.reshape(3, 8)
    assert bool((chosen[:, 0] % 8 == 0).all())
    assert torch.equal(chosen - chosen[:, :1], torch.arange(8).expand(3, 8))
    assert len(set(chosen[:, 0].tolist())) == 3
    assert bool((layer(run).channels.diff() > 0).all())
    with pytest.raises(ConfigError, match="rank 24 at 'rank' is no multiple of block = 16"):
        rs.PaCA(rank=24, select="blocks")
    with pytest.raises(ConfigError, match="at 'q'"):
        rs.PaCA(rank=32, rank_pattern={"q": 8}, select="blocks")
    with pytest.raises(UnsupportedLayer, match=r"0 has 60 input channels, which are no whole blocks of 8"):
        rs.attach(nn.Sequential(nn.Linear(60, 3)), rs.PaCA(rank=8, select="blocks", block=8))


def test_6_largest_columns():
    model = mlp()
    norms = model[0].weight.detach().norm(dim=0)
    run = rs.attach(model, rs.PaCA(rank=4, select="weight_norm"))
    assert layer(run).channels.tolist() == sorted(norms.topk(4).indices.tolist())
    tied = nn.Sequential(nn.Linear(5, 2, bias=False))
    with torch.no_grad():
        tied[0].weight.copy_(torch.tensor([[1.0, 2, 1, 2, 1], [0, 0, 0, 0, 0]]))
    run = rs.attach(tied, rs.PaCA(rank=3, select="weight_norm"))
    assert layer(run).channels.tolist() == [0, 1, 3], "of equals the lower index"


def llama() -> Any:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=30
    )
    return tf.LlamaForCausalLM(config)


def batches(count: int = 2) -> list[dict[str, Tensor]]:
    gen = torch.Generator().manual_seed(0)
    found = []
    for i in range(count):
        ids = torch.randint(0, 30, (2, 7), generator=gen)
        mask = torch.ones_like(ids)
        mask[1, 5 - i :] = 0
        found.append({"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100), "attention_mask": mask})
    return found


def test_6_the_most_active_channels():
    """Mean x² over the tokens that are not padding, from hooks of the test's own."""
    model = llama().train()
    seen: dict[str, list[Tensor]] = {}
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    for batch in batches():
        mask = batch["attention_mask"].bool()
        hooks = [
            model.get_submodule(n).register_forward_hook(
                lambda m, a, o, n=n, mask=mask: seen.setdefault(n, []).append(a[0].detach()[mask])
            )
            for n in names
        ]
        model(**batch)
        for hook in hooks:
            hook.remove()
    state = torch.random.get_rng_state()
    run = rs.attach(model, rs.PaCA(rank=3, select="activation"), data=iter(batches()))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert model.training
    assert set(run.sites) == set(names)
    for name in names:
        score = torch.cat(seen[name]).double().square().mean(0)
        assert layer(run, name).channels.tolist() == sorted(score.topk(3).indices.tolist()), name


@pytest.mark.parametrize("count", [1, 2])
def test_6_the_channels_of_the_largest_gradient(count: int):
    """Σ over batches of ‖(dYᵀX)_j‖², from the full gradients that autograd gives the weights."""
    model = llama().train()
    full = copy.deepcopy(model).eval()
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    score = {name: torch.zeros(full.get_submodule(name).in_features, dtype=F64) for name in names}
    for batch in batches(count):
        full.zero_grad()
        full(**batch).loss.backward()
        for name in names:
            score[name] += full.get_submodule(name).weight.grad.double().square().sum(0)  # type: ignore[union-attr]
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    method = rs.PaCA(rank=3, select="gradient")
    run = rs.attach(model, method, data=batches(count))
    for name in names:
        assert layer(run, name).channels.tolist() == sorted(score[name].topk(3).indices.tolist()), name
    assert all(p.grad is None for p in model.parameters()), "the pass leaves no gradient behind"
    run.detach()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not any(m._forward_hooks for m in model.modules())


def test_6_one_full_gradient_at_a_time():
    """The streamed pass never holds the gradients of two layers, nor asks a parameter for one."""
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.mm.default and out.shape in ((64, 48), (48, 64)):
                alive.append(weakref.ref(out))
                sizes.append(sum(ref() is not None for ref in alive))
            return out

    alive: list[Any] = []
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(48, 64), nn.Linear(64, 48)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            for _ in range(3):  # one layer, called more than once: its gradient is the sum
                x = self.down(self.up(x).tanh())
            return {"loss": x.square().sum()}

    net, x = Net(), torch.randn(5, 48)
    full = copy.deepcopy(net)
    full(x)["loss"].backward()
    with Watch():
        run = rs.attach(net, rs.PaCA(rank=4, select="gradient"), data=[{"x": x}])
    for name in ("up", "down"):
        norms = full.get_submodule(name).weight.grad.norm(dim=0)  # type: ignore[union-attr]
        assert layer(run, name).channels.tolist() == sorted(norms.topk(4).indices.tolist())
    assert 0 < max(sizes) <= 4, "two layers in a loop: a sum and a term each"


def test_6_data_that_cannot_serve():
    for select in ("activation", "gradient"):
        method = rs.PaCA(rank=2, select=select)  # type: ignore[arg-type]
        model = llama()
        with pytest.raises(ConfigError, match=r"PaCA as configured looks at data before it starts: pass batches"):
            rs.attach(model, method)
        with pytest.raises(DataError, match=r"saw nothing of model\.layers\.0"):
            rs.attach(model, method, data=[])
        with torch.no_grad():
            model.model.embed_tokens.weight[0] = float("nan")
        with pytest.raises(DataError, match="NaN or Inf at model"):
            rs.attach(model, method, data=[{k: v * 0 if k == "input_ids" else v for k, v in batches(1)[0].items()}])
        assert all(p.requires_grad for p in model.parameters())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(DataError, match=r'needs the loss of each batch.*"labels"'):
        rs.attach(llama(), rs.PaCA(rank=2, select="gradient"), data=[{"input_ids": batches(1)[0]["input_ids"]}])
    with pytest.raises(DataError, match="needs the loss"):
        rs.attach(mlp(), rs.PaCA(rank=2, select="gradient"), data=[noise(3, 10)])


def test_6_convolutions_by_data():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(5, 4, 3, padding=1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": self.conv(x).square().sum()}

    net, x = Net(), torch.randn(2, 5, 6, 6) * torch.tensor([1.0, 3, 1, 2, 1])[:, None, None]
    full = copy.deepcopy(net)
    full(x)["loss"].backward()
    norms = full.conv.weight.grad.square().sum((0, 2, 3))  # type: ignore[union-attr]
    for select, wanted in (("gradient", norms.topk(2).indices), ("activation", torch.tensor([1, 3]))):
        run = rs.attach(copy.deepcopy(net), rs.PaCA(rank=2, select=select, targets="conv"), data=[{"x": x}])  # type: ignore[arg-type]
        assert layer(run, "conv").channels.tolist() == sorted(wanted.tolist()), select


# ---- 7, 8, 9: against full fine-tuning, the scale, bf16


def test_7_all_columns_are_full_fine_tuning():
    """r = n, s = 1, AdamW: step for step W is what torch trains."""
    model, x = mlp(), noise(8, 10)
    full = copy.deepcopy(model)
    run = rs.attach(model, rs.PaCA(rank=10, alpha=10, rank_pattern={"2": 12}, alpha_pattern={"2": 12.0}))
    mine = run.optimizer(lr=1e-2)
    full.requires_grad_(False)
    weights = [full[0].weight.requires_grad_(), full[2].weight.requires_grad_()]
    theirs = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0)
    for _ in range(10):
        for net, optimizer in ((model, mine), (full, theirs)):
            net(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        for site, W in zip(("0", "2"), weights, strict=True):
            torch.testing.assert_close(run.sites[site].base.weight, W, rtol=0, atol=1e-12)


def test_7_more_columns_than_there_are():
    with pytest.raises(RankTooLarge, match=r"rank 11 at 0 exceeds its 10 input channels.*Lower rank"):
        rs.attach(mlp(), rs.PaCA(rank=11))
    rs.attach(nn.Sequential(nn.Linear(9, 2)), rs.PaCA(rank=9))  # of r and out neither need be the smaller


def test_8_the_scale_is_a_learning_rate():
    ends = []
    for alpha, lr in ((4.0, 4e-3), (16.0, 1e-3)):
        model = mlp()
        run = rs.attach(model, rs.PaCA(rank=4, alpha=alpha))
        train(run, noise(8, 10), 6, lr=lr, eps=1e-30)
        ends.append(run.sites["0"].base.weight.detach())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


def test_8_decay_shrinks_the_change_and_not_the_base():
    model, x = mlp(), noise(3, 10)
    W0 = model[0].weight.detach().clone()
    run = rs.attach(model, rs.PaCA(rank=4, alpha=4))
    stir(run)
    model(x)
    start = layer(run).D.detach().clone()
    optimizer = run.optimizer(lr=0.1, weight_decay=0.1)
    for _ in range(50):
        (0 * model(x)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(layer(run).D.detach(), start * 0.99**50)
    W = W0.clone()
    W[:, layer(run).channels] += start * 0.99**50
    torch.testing.assert_close(run.sites["0"].base.weight.detach(), W)


def test_9_small_steps_are_not_lost_in_bf16():
    """lr 1e-5: 0.02 minus 1e-5 is 0.02 in bf16; the fp32 master moves, and W after it."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False)).bfloat16()
    with torch.no_grad():
        model[0].weight.fill_(0.02)
    run = rs.attach(model, rs.PaCA(rank=2, alpha=2))
    x = torch.ones(1, 4, dtype=BF16)
    optimizer = run.optimizer(lr=1e-5)
    for _ in range(1000):
        model(x).float().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.allclose(layer(run).D, torch.tensor(-1e-2), rtol=1e-2)
    W = run.sites["0"].base.weight
    assert torch.allclose(W[:, layer(run).channels].float(), torch.tensor(0.01), rtol=0.02)
    assert bool((W.float() == torch.tensor(0.02).bfloat16().float()).sum() == 6)


# ---- together with others, and moved about


def test_switching_with_overlapping_columns():
    model, x = mlp(BF16), noise(3, 10, dtype=BF16)
    plain = model(x)
    run = rs.attach(model, rs.PaCA(rank=9))
    run.add("second", rs.PaCA(rank=9))
    assert set(layer(run).channels.tolist()) & set(layer(run, name="second").channels.tolist())
    train(run, x, 3)
    one = model(x)
    run.use("second")
    assert torch.equal(model(x), plain)
    train(run, x, 3, lr=3e-2)
    two = model(x)
    for name, want in (("default", one), ("second", two), ("default", one)):
        run.use(name)
        assert torch.equal(model(x), want)
    run.use("default", "second")
    assert run.sites["0"].base.tenant is layer(run)
    both = model(x)
    run.use("second", "default")
    assert run.sites["0"].base.tenant is layer(run, name="second")
    assert (model(x) - both).abs().max() < 0.05
    with run.disabled():
        assert torch.equal(model(x), plain)
    run.use("default", "second")
    run.delete("default")
    assert torch.equal(model(x), two)
    run.use()
    assert torch.equal(model(x), plain)


@pytest.mark.parametrize("first", ["paca", "lora"])
def test_standing_on_another_method(first: str):
    """Below it is resident, above a branch: the same function and gradients, and only chosen channels are kept."""
    model, x = mlp(), noise(4, 10).requires_grad_()
    W0 = model[0].weight.detach().clone()
    methods = {"paca": rs.PaCA(rank=3, alpha=4, targets="0"), "lora": rs.LoRA(rank=2, targets="0")}
    run = rs.attach(model, methods[first])
    (other,) = methods.keys() - {first}
    run.add(other, methods[other])
    for name in run.adapters:
        with torch.no_grad():
            for p in run.adapter(name)["0"].parameters():
                if p.dtype is F64 and p.shape != (12, 10):
                    p += 0.3 * noise(*p.shape)
    adapter = run.adapter("default" if first == "paca" else "paca")["0"]
    lora = run.adapter("default" if first == "lora" else "lora")["0"]
    assert isinstance(adapter, PaCALayer)
    with torch.no_grad():
        adapter.origin.copy_(W0[:, adapter.channels])  # stirred above, though it follows from the base
    run.use(*run.adapters)
    assert (run.sites["0"].base.tenant is adapter) == (first == "paca")
    W = (W0 + lora.delta() + adapter.delta()).detach().requires_grad_()
    leaf = x.detach().requires_grad_()
    want = F.linear(leaf, W, model[0].bias)
    got = model[0](x)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    dy = noise(4, 12)
    dx, dD = torch.autograd.grad(got, [x, adapter.D], dy)
    full_x, full_W = torch.autograd.grad(want, [leaf, W], dy)
    torch.testing.assert_close(dx, full_x, rtol=0, atol=1e-12)
    torch.testing.assert_close(dD, adapter.scale * full_W[:, adapter.channels], rtol=0, atol=1e-12)
    torch.testing.assert_close(run.adapter(run.adapters[-1])["0"].rows(), W.detach(), rtol=0, atol=1e-12)


def test_shifting_to_lora_and_back():
    model, x = mlp(), noise(4, 10)
    run = rs.attach(model, rs.PaCA(rank=4))
    train(run, x, 2)
    trained = model(x)
    run = run.shift(rs.LoRA(rank=2))
    torch.testing.assert_close(model(x), trained, rtol=0, atol=1e-12)
    train(run, x, 2)
    trained = model(x)
    run = run.shift(rs.PaCA(rank=3))
    torch.testing.assert_close(model(x), trained, rtol=0, atol=1e-12)
    assert run.sites["0"].base.tenant is layer(run)
    train(run, x, 2)
    assert run.step == 6
    assert run.changed == {"0.weight", "2.weight"}


def test_copies_of_a_model_are_apart():
    """deepcopy and pickle: the copy trains, is averaged into, and goes back to its own base."""
    model, x = mlp(), noise(4, 10)
    plain = model(x)
    run = rs.attach(model, rs.PaCA(rank=4))
    stir(run)
    trained = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), trained)
        adapter = twin[0].adapters["default"]
        assert twin[0].base.tenant is adapter
        with torch.no_grad():
            adapter.D.zero_()
            twin[2].adapters["default"].D.zero_()
        assert torch.equal(twin(x), plain)
        assert torch.equal(model(x), trained)
    stir(run)  # copied before a forward has seen the change
    twin = copy.deepcopy(model)
    assert torch.equal(twin(x), model(x))
    average = torch.optim.swa_utils.AveragedModel(model)
    stir(run)
    average.update_parameters(model)
    average.update_parameters(model)
    assert torch.equal(average(x), model(x)) or torch.allclose(average(x), model(x), rtol=1e-6)


def test_another_dtype_while_it_acts():
    model, x = mlp(torch.float32), noise(3, 10, dtype=torch.float32)
    base = copy.deepcopy(model).bfloat16()
    run = rs.attach(model, rs.PaCA(rank=4))
    stir(run)
    model(x)
    model.bfloat16()
    assert layer(run).origin.dtype is BF16
    with run.disabled():
        assert torch.equal(model(x.bfloat16()), base(x.bfloat16()))
    W = base[0].weight.clone()
    W[:, layer(run).channels] += (layer(run).scale * layer(run).D).to(BF16)
    assert torch.equal(model[0](x.bfloat16()), F.linear(x.bfloat16(), W, base[0].bias))


def test_what_torch_sees_of_it():
    """Names in the model's own state, what of it trains, and loading it into a fresh model."""
    model, x = mlp(), noise(3, 10)
    run = rs.attach(model, rs.PaCA(rank=4, targets="0"))
    stir(run)
    trained = model(x)
    state = model.state_dict()
    names = {"0.base.weight", "0.base.bias", "2.weight", "2.bias"}
    mine = {"0.adapters.default.D", "0.adapters.default.origin", "0.adapters.default.channels"}
    assert set(state) == names | mine
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["0.adapters.default.D"]
    assert {n.rpartition(".")[2] for n in run.state_dict()["tensors"]} == {"D", "channels"}
    again = mlp()
    with torch.no_grad():
        again[0].weight.zero_()
    rs.attach(again, rs.PaCA(rank=4, targets="0"), seed=9)
    again.load_state_dict(state)
    assert torch.equal(again(x), trained)


@pytest.mark.parametrize("every", [None, 3])
def test_the_trainer_resumes_and_goes_back_to_its_best(every: int | None, tmp_path):
    """Columns that stand in the base are not taken for those of another base."""
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 30, (16, 6), generator=noise_generator())]
    ends = []
    for name, resume in (("a", None), ("b", tmp_path / "a" / "checkpoint-4")):
        arguments = tf.TrainingArguments(
            str(tmp_path / name), per_device_train_batch_size=2, max_steps=8, learning_rate=1e-2, use_cpu=True,
            report_to=[], save_steps=4, eval_steps=4, eval_strategy="steps", load_best_model_at_end=True,
            disable_tqdm=True, gradient_checkpointing=True,
        )  # fmt: skip
        method = rs.PaCA(rank=4, redraw_every=every)
        trainer = rs.Trainer(model=llama(), method=method, args=arguments, train_dataset=rows, eval_dataset=rows[:4])
        trainer.train(resume_from_checkpoint=resume)
        ends.append({n: t.clone() for n, t in trainer.run.state_dict()["tensors"].items()})
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(t, ends[1][n]) for n, t in ends[0].items())


def test_reading_a_run_of_its_own_from_a_directory(tmp_path):
    from rankshift.io.checkpoint import read

    model, x = mlp(), noise(3, 10)
    run = rs.attach(model, rs.PaCA(rank=10, rank_pattern={"2": 12}))
    train(run, x, 1)
    run.save(tmp_path / "saved")
    saved = model(x)
    train(run, x, 2)
    run.load_state_dict(read(model, tmp_path / "saved"))
    assert torch.equal(model(x), saved)


# ---- re-draws


def test_a_re_draw_folds_draws_and_starts_anew():
    model, x = mlp(BF16), noise(6, 10, dtype=BF16)
    run = rs.attach(model, rs.PaCA(rank=3, redraw_every=3), seed=1)
    optimizer = run.optimizer(lr=1e-2)
    adapter, chosen, W = layer(run), [], run.sites["0"].base.weight
    for step in range(7):
        before, was = W.detach().clone(), adapter.channels.clone()
        model(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        moments = optimizer.state[adapter.D]
        if step % 3 == 2:
            chosen.append(adapter.channels.tolist())
            assert adapter.channels.tolist() != was.tolist()
            assert not adapter.D.count_nonzero()
            assert all(not t.count_nonzero() for t in moments.values()), "moments and their count start anew"
            assert torch.equal(adapter.origin, W[:, adapter.channels])
            others = torch.ones(10, dtype=torch.bool).index_fill(0, was, False)
            assert torch.equal(before[:, others], W[:, others])
            assert not torch.equal(before[:, was], W[:, was]), "the step that was due is in the base"
        else:
            assert torch.equal(adapter.channels, was)
            assert bool(adapter.D.count_nonzero())
            assert moments["step"] == step % 3 + 1
    assert chosen[0] != chosen[1]
    assert run.changed == {"0.weight", "2.weight"}


def test_a_re_draw_keeps_the_function_to_the_bit():
    """What is folded is what acted: in bf16 too, since both round W₀ + s·D once."""
    x = noise(6, 10, dtype=BF16)
    outputs = []
    for every in (2, None):
        model = mlp(BF16)
        run = rs.attach(model, rs.PaCA(rank=3, redraw_every=every))
        train(run, x, 2)
        outputs.append(model(x))
    assert torch.equal(*outputs)


def test_a_base_that_is_rewritten_cannot_be_had_back():
    run = rs.attach(mlp(), rs.PaCA(rank=3, redraw_every=2))
    assert not run.method.reversible
    assert rs.PaCA().reversible
    for verb in (run.detach, run.disabled().__enter__):
        with pytest.raises(AttachError, match="PaCA trains the base itself"):
            verb()


def test_a_re_draw_under_another_adapter():
    """Both act: the one above folds through the columns of the one below."""
    model, x = mlp(), noise(6, 10)
    run = rs.attach(model, rs.PaCA(rank=4))
    run.add("second", rs.PaCA(rank=4, redraw_every=2))
    run.use("default", "second")
    whole = None
    optimizer = run.optimizer(lr=1e-2)
    for step in range(4):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        second = layer(run, name="second")
        if step % 2:
            assert not second.D.count_nonzero()
            whole = layer(run).base.rows() + layer(run).delta()
            torch.testing.assert_close(run.sites["0"].base.weight, whole, rtol=0, atol=1e-12)
    assert whole is not None
    assert layer(run).D.count_nonzero()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rank": 0}, "rank 0 at 'rank' is below 1"),
        ({"rank_pattern": {"q": 0}}, "rank 0 at 'q' is below 1"),
        ({"alpha": 0.0}, "alpha 0.0 at 'alpha' is not a positive number"),
        ({"alpha_pattern": {"q": float("inf")}}, "alpha inf at 'q'"),
        ({"redraw_every": 0}, "redraw_every = 0 is below 1"),
        ({"redraw_every": 5, "select": "gradient"}, "in mid-run there is no data"),
        ({"redraw_every": 5, "select": "activation"}, "in mid-run there is no data"),
        ({"select": "wieght_norm"}, "weight_norm"),
        ({"block": 0}, "block = 0"),
        ({"rnak": 4}, "rank"),
    ],
    ids=str,
)
def test_bad_settings(fields: dict[str, Any], says: str):
    with pytest.raises(ConfigError, match=says):
        rs.PaCA(**fields)


# ---- layers


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids))


def test_layers_that_it_cannot_serve():
    with pytest.raises(UnsupportedLayer, match=r"embed is an Embedding: its columns are tokens.*modules_to_save"):
        rs.attach(Tied(), rs.PaCA(rank=2, targets="embed"))
    with pytest.raises(TiedWeights, match=r'tied="untie"'):
        rs.attach(Tied(), rs.PaCA(rank=2, targets="head"))
    model = Tied()
    table = model.embed.weight.detach().clone()
    run = rs.attach(model, rs.PaCA(rank=2, targets="head", tied="untie"))
    optimizer = run.optimizer(lr=1e-2)
    model(torch.tensor([[1, 2]])).square().sum().backward()
    optimizer.step()
    assert torch.equal(model.embed.weight, table)
    assert not torch.equal(run.sites["head"].base.weight, table)


def test_experts_are_refused():
    config = tf.MixtralConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=20, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    model = tf.MixtralForCausalLM(config)
    with pytest.raises(UnsupportedLayer, match=r"stack of expert weights.*use LoRA there"):
        rs.attach(model, rs.PaCA(rank=2, targets="experts.down_proj"))


def test_patterns():
    run = rs.attach(mlp(), rs.PaCA(rank=2, alpha=4, rank_pattern={"2": 5}, alpha_pattern={"2": 15.0}))
    assert [layer(run, site).rank for site in ("0", "2")] == [2, 5]
    assert [layer(run, site).scale for site in ("0", "2")] == [2.0, 3.0]
    assert layer(run, "2").D.shape == (6, 5)


def test_an_adapter_made_for_a_wider_layer_is_refused():
    run = rs.attach(nn.Sequential(nn.Linear(40, 6)), rs.PaCA(rank=8))
    assert int(layer(run).channels[-1]) >= 12
    model = nn.Sequential(nn.Linear(12, 6))
    bits = model[0].weight.detach().clone()
    with pytest.raises(WrongBase, match=r"0 has 12 input channels, and the adapter trains channel \d+"):
        rs.restore(model, run.state_dict())
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight, bits)
    narrow = nn.Sequential(nn.Linear(5, 6))
    with pytest.raises(RankTooLarge, match="rank 8 at 0 exceeds its 5 input channels"):
        rs.restore(narrow, run.state_dict())
    assert type(narrow[0]) is nn.Linear


CONVS = [nn.Conv1d(6, 8, 3, padding=1), nn.Conv2d(6, 8, (2, 3), stride=2, padding="valid"), nn.Conv2d(6, 8, 1)]


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_a_convolution_trains_some_input_channels(conv: nn.Module):
    """D has the columns of every tap; a frozen one is written, folded and given back like a Linear's."""
    conv = copy.deepcopy(conv).to(F64)
    full = copy.deepcopy(conv)
    model = nn.Sequential(conv)
    x = noise(2, 6, *(7,) * (conv.weight.dim() - 2))
    run = rs.attach(model, rs.PaCA(rank=2, alpha=3, targets="0"))
    adapter, taps = layer(run), conv.weight[0, 0].numel()
    assert adapter.rank == 2
    assert adapter.D.shape == (8, 2 * taps)
    model(x).square().sum().backward()
    full(x).square().sum().backward()
    want = 1.5 * full.weight.grad[:, adapter.channels].flatten(1)  # type: ignore[index, union-attr]
    torch.testing.assert_close(adapter.D.grad, want, rtol=0, atol=1e-11)
    stir(run)
    with torch.no_grad():
        plain = full(x)
        full.weight[:, adapter.channels] += 1.5 * adapter.D.unflatten(1, (2, *conv.weight.shape[2:]))
    trained = model(x)
    assert torch.allclose(trained, full(x), rtol=0, atol=1e-12)
    A, B = adapter.low_rank()  # type: ignore[misc]
    assert A.shape == (2 * taps, 6 * taps)
    assert torch.equal(B @ A, adapter.delta())
    run.add("beside", rs.PaCA(rank=3, targets="0"))  # as a branch
    stir(run, "beside")
    run.use("default", "beside")
    with torch.no_grad():
        other = layer(run, name="beside")
        full.weight[:, other.channels] += other.scale * other.D.unflatten(1, (3, *conv.weight.shape[2:]))
    assert torch.allclose(model(x), full(x), rtol=0, atol=1e-12)
    with run.disabled():
        assert torch.equal(model(x), plain)


# ---- as LoRA, in PEFT itself


def exported_to_peft(model: nn.Module, run: rs.Run, plain: nn.Module, folder: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    run.export(folder)
    return peft.PeftModel.from_pretrained(plain, folder)


def test_peft_runs_the_export(tmp_path):
    model = llama().eval()
    plain = copy.deepcopy(model)
    run = rs.attach(model, rs.PaCA(rank=3, alpha=7))
    stir(run)
    batch = batches(1)[0]
    want = model(**batch).logits
    theirs = exported_to_peft(model, run, copy.deepcopy(plain), tmp_path / "peft")
    assert (theirs(**batch).logits - plain(**batch).logits).abs().max() > 1e-2
    torch.testing.assert_close(theirs(**batch).logits, want, rtol=1e-4, atol=1e-5)
    again = rs.load(copy.deepcopy(plain), tmp_path / "peft")
    torch.testing.assert_close(again.model(**batch).logits, want, rtol=1e-4, atol=1e-5)
    run.export(tmp_path / "portable", profile="portable")
    assert torch.equal(model(**batch).logits, want), "exporting changes nothing"


def test_peft_runs_the_export_of_gpt2(tmp_path):
    torch.manual_seed(0)
    config = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, n_positions=16)
    model = tf.GPT2LMHeadModel(config).eval()
    plain = copy.deepcopy(model)
    run = rs.attach(model, rs.PaCA(rank=3, alpha=7))
    assert "transformer.h.0.attn.c_attn" in run.sites
    ids = batches(1)[0]["input_ids"]
    optimizer = run.optimizer(lr=1e-2)
    model.train()(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    model.eval()
    stir(run)
    want = model(input_ids=ids).logits
    theirs = exported_to_peft(model, run, copy.deepcopy(plain), tmp_path / "peft")
    torch.testing.assert_close(theirs(input_ids=ids).logits, want, rtol=1e-4, atol=1e-5)
    with run.disabled():
        assert torch.equal(model(input_ids=ids).logits, plain(input_ids=ids).logits)


def test_peft_runs_the_export_of_convolutions(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, stride=2), nn.Conv2d(6, 5, (1, 2))).eval()
    plain = copy.deepcopy(model)
    run = rs.attach(model, rs.PaCA(rank=2, alpha=3, targets=("0", "1")))
    stir(run)
    x = noise(2, 4, 8, 8, dtype=torch.float32)
    theirs = exported_to_peft(model, run, plain, tmp_path / "peft")
    torch.testing.assert_close(theirs(x), model(x), rtol=1e-4, atol=1e-5)


# ---- counts


@pytest.mark.parametrize(
    ("shape", "rank", "count"),
    [
        ((4096, 11008, 32, 32), 8, 10_878_976),  # Llama-2-7B, 10.9 M
        ((4096, 11008, 32, 32), 16, 21_757_952),
        ((4096, 14336, 32, 8), 64, 88_080_384),  # Llama-3-8B, 88.1 M
    ],
)
def test_trainable_counts(shape: tuple[int, int, int, int], rank: int, count: int):
    """All linear layers of every block, as the paper counts them. Nothing is allocated."""
    width, hidden, heads, groups = shape
    config = tf.LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=32, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=32000,
    )  # fmt: skip
    with torch.device("meta"):
        model = tf.LlamaForCausalLM(config)
    total = sum(p.numel() for p in model.parameters())
    run = rs.attach(model, rs.PaCA(rank=rank))
    assert sum(p.numel() for _, p in run.trainable()) == count
    assert run.summary().trainable == count
    assert run.summary().total == total + count
