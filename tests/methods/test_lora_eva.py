"""EVA: A from the layer's inputs. Oracles: a dense SVD of all that the layer saw, and the ranks by the paper's rule."""

from __future__ import annotations

from typing import Any

import eva_process
import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import rankshift as rs
from rankshift.core.errors import ConfigError, DataError, UnsupportedLayer
from rankshift.methods.lora_eva import Stream, redistribute

LOW = 5  # rank of the rows below: few enough that a carried SVD forgets nothing


def rows(count: int, width: int, rank: int, seed: int, decay: float = 0.6) -> Tensor:
    """Rows whose singular values fall off by ``decay`` and end after ``rank``."""
    gen = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, rank, generator=torch.Generator().manual_seed(99), dtype=torch.float64))[
        0
    ]
    return torch.randn(count, rank, generator=gen, dtype=torch.float64) * decay ** torch.arange(rank) @ basis.t()


def same_subspace(A: Tensor, B: Tensor) -> float:
    """Sine of the largest angle between the row spaces of two matrices with orthonormal rows."""
    cosines = torch.linalg.svdvals(A.double() @ B.double().t())
    return float((1 - cosines.detach().min().clamp(max=1) ** 2).sqrt())


def record(model: nn.Module, names: list[str], batches: list[Any]) -> dict[str, list[Tensor]]:
    """The inputs of named layers, by hooks of the test's own."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: seen[name].append(args[0].detach())
        )
        for name in names
    ]
    model.eval()
    with torch.no_grad():
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for hook in hooks:
        hook.remove()
    return seen


# ---- the carried SVD


def test_stream_equals_the_dense_svd():
    X = rows(90, 20, LOW, seed=0)
    stream = Stream(cap=4, tau=2.0)
    for part in X.split(13):
        stream.add(part)
    _, S, Vh = torch.linalg.svd(X, full_matrices=False)
    assert stream.rows == 90
    torch.testing.assert_close(stream.values[:4], S[:4], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close((stream.vectors[:4] * Vh[:4]).sum(1).abs(), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(
        torch.tensor(stream.shares()), (S[:4] ** 2 / X.square().sum()).float(), rtol=1e-5, atol=0
    )


def test_stream_with_more_directions_than_it_keeps():
    """Full-rank data with a decaying spectrum: what is cut off lies beyond 16 spare directions."""
    X = rows(600, 64, 64, seed=1, decay=0.9)
    stream = Stream(cap=6, tau=2.0)
    for part in X.split(40):
        stream.add(part)
    Vh = torch.linalg.svd(X, full_matrices=False)[2]
    assert same_subspace(stream.vectors[:6], Vh[:6]) < 0.02


def test_stream_settles_on_steady_data_and_not_on_drifting_data():
    steady, drifting = Stream(cap=3, tau=0.99), Stream(cap=3, tau=0.99)
    for i in range(6):
        steady.add(rows(400, 20, LOW, seed=i))
        drifting.add(torch.eye(20, dtype=torch.float64)[3 * i : 3 * i + 3] * (10.0 * 2**i))
        if i == 0:
            assert not steady.settled
            assert not drifting.settled
    assert steady.settled
    assert not drifting.settled


def test_half_precision_rows_are_decomposed_in_fp32():
    stream = Stream(cap=2, tau=0.99)
    stream.add(torch.randn(9, 4).bfloat16())
    assert stream.vectors.dtype == torch.float32
    with pytest.raises(DataError, match=r"NaN or Inf"):
        stream.add(torch.full((2, 4), torch.nan))


# ---- ranks


def ranks_by_hand(shares: dict[str, list[float]], budget: int) -> dict[str, int]:
    """One each; then, ``budget`` − layers times, to the layer whose next component explains most."""
    ranks = dict.fromkeys(shares, 1)
    for _ in range(budget - len(shares)):
        open_ = [name for name in shares if ranks[name] < len(shares[name])]
        if open_:
            best = max(open_, key=lambda name: shares[name][ranks[name]])
            ranks[best] += 1
    return ranks


def test_redistribution():
    shares = {"a": [0.9, 0.05, 0.03, 0.01], "b": [0.3, 0.25, 0.2, 0.15], "c": [0.5, 0.3, 0.1, 0.04]}
    assert redistribute(shares, 6) == {"a": 1, "b": 3, "c": 2}
    gen = torch.Generator().manual_seed(0)
    for trial in range(40):
        layers = 1 + trial % 5
        shares = {str(i): sorted(torch.rand(4 + i, generator=gen).tolist(), reverse=True) for i in range(layers)}
        for budget in range(layers, sum(map(len, shares.values())) + 3):
            got = redistribute(shares, budget)
            assert got == ranks_by_hand(shares, budget)
            assert sum(got.values()) == min(budget, sum(map(len, shares.values())))


# ---- models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.drop, self.two, self.norm = (
            nn.Linear(20, 16),
            nn.Dropout(0.5),
            nn.Linear(16, 4),
            nn.BatchNorm1d(4),
        )

    def forward(self, x):
        return self.norm(self.two(self.drop(torch.tanh(self.one(x)))))


BATCHES = [rows(40, 20, LOW, seed=i).float() for i in range(5)]


@pytest.mark.parametrize("ratio", [1.0, 2.0])
def test_starts_at_the_inputs_principal_directions(ratio: float):
    model = Net()
    before = model.eval()(BATCHES[0])
    seen = record(model, ["one", "two"], BATCHES)
    method = rs.LoRA(rank=2, init="eva", eva_ratio=ratio, eva_tau=1.0)
    run = rs.attach(model, method, data=BATCHES)
    shares = {}
    for name, adapter in run.adapter().items():
        X = torch.cat(seen[name]).double()
        _, S, Vh = torch.linalg.svd(X, full_matrices=False)
        shares[name] = (S**2 / (S**2).sum())[: int(2 * ratio)].tolist()
        assert same_subspace(adapter.A, Vh[: adapter.rank]) < 1e-3
        torch.testing.assert_close(adapter.A @ adapter.A.t(), torch.eye(adapter.rank), rtol=1e-5, atol=1e-5)
        assert not adapter.B.any()
    ranks = {name: adapter.rank for name, adapter in run.adapter().items()}
    assert ranks == ranks_by_hand(shares, 4)
    assert sum(ranks.values()) == 4
    if ratio == 1:
        assert set(ranks.values()) == {2}
    assert torch.equal(model.eval()(BATCHES[0]), before)


def test_ranks_move_and_their_sum_stays():
    """A layer with one strong direction gives its ranks to a layer whose input is spread out."""
    torch.manual_seed(0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.narrow(x[..., :1] * torch.ones(16) + 1e-3 * x) + self.wide(x)

    run = rs.attach(Two(), rs.LoRA(rank=4, init="eva", eva_ratio=2), data=[torch.randn(50, 16) for _ in range(3)])
    assert {n: a.rank for n, a in run.adapter().items()} == {"narrow": 1, "wide": 7}
    assert {a.scale for a in run.adapter().values()} == {32 / 4}  # alpha goes along with the rank
    assert dict(run.describe()["adapters"]["default"]["ranks"]) == {"narrow": 1, "wide": 7}


def test_the_state_resumes_with_the_ranks_it_had():
    run = rs.attach(Net(), rs.LoRA(rank=2, init="eva"), data=BATCHES)
    again = rs.restore(Net(), run.state_dict())
    for name, adapter in run.adapter().items():
        assert torch.equal(again.adapter()[name].A, adapter.A)
        assert again.adapter()[name].scale == adapter.scale


def test_nothing_but_reading():
    """Modes, hooks, buffers, gradients and global random state are as they were; also after an error in the model."""
    model = Net().train()
    model.norm.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    state = {n: t.clone() for n, t in model.state_dict().items()}
    rng = torch.get_rng_state()
    run = rs.attach(model, rs.LoRA(rank=2, init="eva"), data=iter(BATCHES))
    assert torch.equal(torch.get_rng_state(), rng)
    assert {n: m.training for n, m in model.named_modules() if n in modes} == {
        n: m for n, m in modes.items() if n in dict(model.named_modules())
    }
    assert not any(m._forward_pre_hooks for m in model.modules())
    plain = run.detach()
    assert all(torch.equal(t, state[n]) for n, t in plain.state_dict().items())
    with pytest.raises(TypeError, match=r"unexpected keyword argument 'y'"):
        rs.attach(plain, rs.LoRA(rank=2, init="eva"), data=[BATCHES[0], {"y": BATCHES[0]}])
    assert {n: m.training for n, m in plain.named_modules()} == modes
    assert not any(m._forward_pre_hooks for m in plain.modules())
    assert type(plain.one) is nn.Linear


def test_reading_stops_when_every_layer_has_settled():
    taken = []

    def batches():
        for i in range(100):
            taken.append(i)
            yield rows(400, 20, LOW, seed=i).float()

    rs.attach(Net(), rs.LoRA(rank=2, init="eva", eva_ratio=1), data=batches())
    assert 2 <= len(taken) < 20


def test_refusals_come_before_anything_is_touched():
    model = Net()
    with pytest.raises(ConfigError, match=r"looks at data before it starts: pass batches, data= of attach\(\)"):
        rs.attach(model, rs.LoRA(rank=2, init="eva"))
    with pytest.raises(DataError, match=r"EVA saw 3 rows of input at one in 1 batches, too few for rank 4"):
        rs.attach(model, rs.LoRA(rank=4, init="eva", targets="one"), data=[torch.randn(3, 20)])
    with pytest.raises(DataError, match=r"EVA saw 0 rows of input at one in 0 batches"):
        rs.attach(model, rs.LoRA(rank=4, init="eva"), data=[])
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.one) is nn.Linear
    with pytest.raises(UnsupportedLayer):
        rs.attach(nn.Sequential(nn.Embedding(4, 4)), rs.LoRA(rank=1, targets="0", init="eva"), data=[torch.arange(4)])


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30
    )
    return tf.LlamaForCausalLM(config)


def text(seed: int) -> dict[str, Tensor]:
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 30, (3, 12), generator=gen)
    mask = (torch.arange(12) < torch.tensor([[12], [7], [9]])).long()
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": torch.where(torch.arange(12) < 4, -100, ids)}


@pytest.mark.parametrize("tokens", ["attention", "labels"])
def test_padded_tokens_do_not_count(tokens: str):
    """With tokens="labels" neither do prompts, whose label is −100."""
    model, batches = llama(), [text(i) for i in range(4)]
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"]
    seen = record(model, names, batches)
    method = rs.LoRA(rank=3, init="eva", eva_ratio=1, eva_tau=1, eva_tokens=tokens, targets=("q_proj", "down_proj"))  # type: ignore[arg-type]
    run = rs.attach(model, method, data=batches)
    for name in names:
        kept = [
            x[(batch["attention_mask"] == 1) & ((batch["labels"] != -100) | (tokens == "attention"))]
            for x, batch in zip(seen[name], batches, strict=True)
        ]
        all_rows = torch.cat([x.flatten(0, 1) for x in seen[name]])
        Vh = torch.linalg.svd(torch.cat(kept).double(), full_matrices=False)[2]
        assert same_subspace(run.adapter()[name].A, Vh[:3]) < 1e-3
        assert same_subspace(run.adapter()[name].A, torch.linalg.svd(all_rows.double())[2][:3]) > 1e-2
    assert tokens == "attention" or run.method.eva_tokens == "labels"


def test_labels_are_needed_where_they_are_asked_for():
    batch = {k: v for k, v in text(0).items() if k != "labels"}
    with pytest.raises(DataError, match=r'needs batches with "labels"'):
        rs.attach(llama(), rs.LoRA(rank=2, init="eva", eva_tokens="labels"), data=[batch])


def test_gpt2_conv1d():
    torch.manual_seed(0)
    config = tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=30, bos_token_id=0, eos_token_id=0)
    model, batches = tf.GPT2LMHeadModel(config), [{"input_ids": text(i)["input_ids"]} for i in range(3)]
    seen = record(model, ["transformer.h.0.mlp.c_proj"], batches)["transformer.h.0.mlp.c_proj"]
    run = rs.attach(model, rs.LoRA(rank=3, init="eva", eva_ratio=1, eva_tau=1, targets="mlp.c_proj"), data=batches)
    Vh = torch.linalg.svd(torch.cat(seen).flatten(0, 1).double(), full_matrices=False)[2]
    adapter = run.adapter()["transformer.h.0.mlp.c_proj"]
    assert adapter.A.shape == (3, 64)
    assert same_subspace(adapter.A, Vh[:3]) < 1e-3


def test_conv2d_patches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 6, 3, stride=2, padding=1))
    batches = [torch.randn(4, 2, 7, 7) * torch.tensor([3.0, 1.0])[:, None, None] for _ in range(3)]
    run = rs.attach(model, rs.LoRA(rank=3, init="eva", eva_ratio=1, eva_tau=1, targets="0"), data=batches)
    patches = torch.cat([nn.functional.unfold(x, 3, padding=1, stride=2).mT.flatten(0, 1) for x in batches])
    Vh = torch.linalg.svd(patches.double(), full_matrices=False)[2]
    assert same_subspace(run.adapter()["0"].A, Vh[:3]) < 1e-3


def test_a_second_adapter_may_start_so_too():
    run = rs.attach(Net(), rs.LoRA(rank=2))
    run.add("second", rs.LoRA(rank=2, init="eva", eva_ratio=1, eva_tau=1), data=BATCHES)
    X = torch.cat(BATCHES).double()
    Vh = torch.linalg.svd(X, full_matrices=False)[2]
    assert same_subspace(run.adapter("second")["one"].A, Vh[:2]) < 1e-3


def test_it_learns():
    model = Net()
    run = rs.attach(model, rs.LoRA(rank=2, init="eva"), data=BATCHES)
    opt = run.optimizer(lr=0.05)
    losses = []
    for _ in range(30):
        loss = (model(BATCHES[0]) - BATCHES[0][:, :4]).square().mean()
        loss.backward()
        opt.step(), opt.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


def test_processes_agree_whatever_data_they_saw(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    out = context.Queue()
    workers = [context.Process(target=eva_process.main, args=(rank, str(tmp_path / "store"), out)) for rank in (0, 1)]
    for worker in workers:
        worker.start()
    found = dict(out.get(timeout=120) for _ in workers)
    for worker in workers:
        worker.join(60)
    assert found[0] == found[1]
