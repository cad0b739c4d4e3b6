"""VeRA: what the paper promises, and what look-alikes get wrong. PEFT draws the pairs that ours are compared with."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import rankshift as rs
from rankshift.methods import vera
from rankshift.methods.vera import GENERATOR, Numbers, VeRALayer, digest

warnings.filterwarnings("ignore", module="peft")
F64 = torch.float64


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


class Net(nn.Module):
    """Layers of different widths, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v = nn.Linear(10, 10), nn.Linear(10, 6)
        self.up, self.down = nn.Linear(6, 14), nn.Linear(14, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.down(self.up(self.v(self.q(x).tanh()).tanh()).tanh()).tanh())


BODY = ("q", "v", "up", "down")


def net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Net().to(dtype)


def stirred(run: rs.Run, seed: int = 1, scale: float = 0.5) -> rs.Run:
    with torch.no_grad():
        for i, (_, p) in enumerate(run.trainable()):
            p += scale * seeded(*p.shape, seed=100 * seed + i)
    return run


def layers(run: rs.Run, name: str = "default") -> dict[str, VeRALayer]:
    return run.adapter(name)  # type: ignore[return-value]


X = seeded(5, 10, seed=7)


# ---- the pair


@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_the_pair_is_bit_for_bit_that_of_peft(seed: int) -> None:
    for targets, rank in ((BODY, 5), (("q", "v"), 40), (("up",), 1)):
        config = peft.VeraConfig(r=rank, target_modules=list(targets), projection_prng_key=seed)
        theirs = peft.get_peft_model(net(), config).base_model
        run = rs.attach(net(), rs.VeRA(rank=rank, targets=targets, projection_seed=seed))
        pair = next(iter(layers(run).values())).projection
        assert torch.equal(pair.A, theirs.vera_A["default"])
        assert torch.equal(pair.B, theirs.vera_B["default"])
        for name, layer in layers(run).items():
            linear = net().get_submodule(name)
            assert torch.equal(layer.A, pair.A[:, : linear.in_features])
            assert torch.equal(layer.B, pair.B[: linear.out_features])


def test_the_pair_does_not_depend_on_the_process() -> None:
    """Digests written down once: neither the global generator nor the number of threads is in them."""
    torch.manual_seed(99)
    assert digest(*Numbers(4, 12, 18, 0).draw()) == "b3910262714f2a74"
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert digest(*Numbers(64, 300, 200, 7).draw()) == "88497134033ac91a"
    finally:
        torch.set_num_threads(before)


def test_bounds_are_those_of_kaiming_with_gain_two() -> None:
    A, B = Numbers(64, 160, 300, 3).draw()
    for matrix, columns in ((A, 160), (B, 64)):
        bound = (6 / columns) ** 0.5
        assert 0.99 * bound < matrix.abs().max() <= bound * (1 + 1e-6)
        assert abs(matrix.std() / (bound / 3**0.5) - 1) < 0.02


def test_a_wider_rank_does_not_change_the_scale_of_the_branch() -> None:
    """Per output the branch has a standard deviation of about 2·d₀·rms(x), whatever r is."""
    spread = {}
    for rank in (256, 512):
        run = rs.attach(nn.Sequential(nn.Linear(64, 96, bias=False)), rs.VeRA(rank=rank, targets="0"))
        layer = layers(run)["0"]
        layer.lambda_b.data.fill_(1.0)
        x = seeded(400, 64, seed=3)
        spread[rank] = (layer.delta() @ x.T).std().item()
    assert abs(spread[512] / spread[256] - 1) < 0.1
    assert abs(spread[256] / (2 * 0.1) - 1) < 0.15


def test_one_storage_for_all_layers() -> None:
    model = net()
    run = rs.attach(model, rs.VeRA(rank=5, targets=BODY))
    assert {layer.A.data_ptr() for layer in layers(run).values()} == {layers(run)["q"].projection.A.data_ptr()}
    assert [n for n, _ in model.named_buffers()] == [f"q.adapters.default.projection.{m}" for m in "AB"]
    assert not [n for n in model.state_dict() if "projection" in n]
    assert not [n for n, _ in model.named_parameters() if n.rpartition(".")[2] in "AB"]
    twin = copy.deepcopy(model)
    places = {m.projection.A.data_ptr() for m in twin.modules() if isinstance(m, VeRALayer)}
    assert len(places) == 1
    assert places.isdisjoint({layers(run)["q"].projection.A.data_ptr()})


def test_casting_the_model_does_not_round_the_pair() -> None:
    model = net()
    run = rs.attach(model, rs.VeRA(rank=5, targets=BODY))
    pair = layers(run)["q"].projection
    A, B = pair.A.clone(), pair.B.clone()
    for cast in (model.bfloat16, model.half, model.double, model.float):
        cast()
        assert torch.equal(pair.A, A)
        assert torch.equal(pair.B, B)
        assert pair.A.dtype is torch.float32
        assert model(X.to(model.q.weight.dtype)).dtype is model.q.weight.dtype
    model.double()
    y = model(X.double())
    stirred(run)
    y = model(X.double())
    y.sum().backward()
    assert layers(run)["up"].lambda_d.grad.dtype is F64
    with run.merged():
        torch.testing.assert_close(model(X.double()), y)


def test_a_float64_base_computes_with_the_same_numbers() -> None:
    wide, narrow = (rs.attach(net(dtype=t), rs.VeRA(rank=5, targets=BODY)) for t in (F64, torch.float32))
    assert layers(wide)["q"].projection.A.dtype is F64
    assert torch.equal(layers(wide)["q"].A, layers(narrow)["q"].A.double())
    assert wide.describe()["adapters"] == narrow.describe()["adapters"]


def test_a_model_without_values_draws_when_it_gets_some() -> None:
    with torch.device("meta"):
        model = Net()
    method = rs.VeRA(rank=5, targets=BODY)
    run = rs.attach(model, method)
    assert all(layer.A.is_meta for layer in layers(run).values())
    there = rs.attach(net(), method)
    assert run.describe()["adapters"] == there.describe()["adapters"]
    model.to_empty(device="cpu")
    assert torch.equal(layers(run)["down"].B, layers(there)["down"].B)
    state = stirred(there).state_dict()
    run.load_state_dict(state)
    model.load_state_dict(net().state_dict(), strict=False)
    for name, site in run.sites.items():
        site.base.weight.data.copy_(net().get_submodule(name).weight)
        site.base.bias.data.copy_(net().get_submodule(name).bias)
    assert torch.equal(model(X), there.model(X))


def test_layers_on_two_devices_have_one_pair_each() -> None:
    model = net()
    model.up.to("meta")
    model.down.to("meta")
    run = rs.attach(model, rs.VeRA(rank=5, targets=BODY, save_projection=True))
    found = layers(run)
    assert found["q"].projection is found["v"].projection
    assert found["up"].projection is found["down"].projection is not found["q"].projection
    saved = [name for name in run.state_dict()["tensors"] if "projection" in name]
    assert saved == [f"default/q.projection.{m}" for m in "AB"]  # once, on whatever devices it will be loaded
    # as if the second device were real and the pair had come from a file
    A, B = torch.zeros(5, 14), torch.ones(14, 5)
    for pair in (found["q"].projection, found["up"].projection):
        pair.A, pair.B = torch.zeros(5, 14), torch.zeros(14, 5)
    found["q"].projection.B.fill_(1.0)
    run.use("default")
    assert torch.equal(found["down"].projection.A, A)
    assert torch.equal(found["down"].projection.B, B)


# ---- training


def test_the_vectors_train_and_nothing_else() -> None:
    model = net()
    run = rs.attach(model, rs.VeRA(rank=5, targets=BODY, modules_to_save=("head",)))
    pair = layers(run)["q"].projection
    before = digest(pair.A, pair.B)
    names = {f"{name}.{leaf}" for name in BODY for leaf in ("lambda_d", "lambda_b")} | {"head.weight", "head.bias"}
    assert {name for name, _ in run.trainable()} == names
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for _, p in run.trainable()}
    optimizer = run.optimizer(lr=1e-2)
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    for step in range(50):
        (model(seeded(8, 10, seed=step)) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert digest(pair.A, pair.B) == before
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_d_stands_still_for_one_step() -> None:
    model = net()
    base = model(X)
    run = rs.attach(model, rs.VeRA(rank=5, targets=BODY))
    assert torch.equal(model(X), base)
    optimizer = run.optimizer(lr=1e-2)
    d = {name: layer.lambda_d.clone() for name, layer in layers(run).items()}
    for step in range(2):
        (model(X) - 1).square().mean().backward()
        for name, layer in layers(run).items():
            assert layer.lambda_b.grad.count_nonzero() == layer.lambda_b.numel()
            assert (layer.lambda_d.grad.count_nonzero() == 0) == (step == 0)
            assert torch.equal(layer.lambda_d, d[name])
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(layer.lambda_d, d[name]) for name, layer in layers(run).items())


def test_the_equation() -> None:
    model = net(dtype=F64)
    run = stirred(rs.attach(model, rs.VeRA(rank=20, targets=BODY, d_initial=0.3)))
    for name, layer in layers(run).items():
        W, bias = net(dtype=F64).get_submodule(name).weight, net(dtype=F64).get_submodule(name).bias
        x = seeded(3, W.shape[1], seed=4, dtype=F64)
        A, B = layer.projection.A[:, : W.shape[1]], layer.projection.B[: W.shape[0]]
        want = torch.stack([W @ v + bias + layer.lambda_b * (B @ (layer.lambda_d * (A @ v))) for v in x])
        torch.testing.assert_close(model.get_submodule(name)(x), want)
        delta = torch.diag(layer.lambda_b) @ B @ torch.diag(layer.lambda_d) @ A
        torch.testing.assert_close(layer.delta(), delta)
        assert torch.linalg.matrix_rank(delta) <= 20


def test_symmetries_of_the_vectors() -> None:
    model = net(dtype=F64)
    run = stirred(rs.attach(model, rs.VeRA(rank=5, targets=BODY)))
    y = model(X.double())
    with torch.no_grad():
        for _, p in run.trainable():
            p.neg_()
    torch.testing.assert_close(model(X.double()), y)
    layer = layers(run)["q"]
    with torch.no_grad():
        layer.lambda_d[2] = 0
    left = [0, 1, 3, 4]
    want = torch.diag(layer.lambda_b) @ layer.B[:, left] @ torch.diag(layer.lambda_d[left]) @ layer.A[left]
    torch.testing.assert_close(layer.delta(), want)


def test_dropout_falls_on_the_branch_alone() -> None:
    model = nn.Sequential(nn.Linear(200, 6))
    run = stirred(rs.attach(model, rs.VeRA(rank=8, targets="0", dropout=0.5)))
    x = seeded(300, 200)
    with run.disabled():
        base = model(x)
    whole = model.eval()(x) - base
    torch.manual_seed(123)  # not that of x: the same stream would drop by its size
    noisy = model.train()(x) - base
    assert not torch.equal(noisy, whole)
    fit = (noisy * whole).sum() / whole.square().sum()  # kept inputs are scaled up by 1 / (1 − p)
    assert abs(fit - 1) < 0.25
    with torch.no_grad():
        layers(run)["0"].lambda_b.zero_()
    assert torch.equal(model(x), base)


def test_a_bf16_base_has_fp32_vectors_that_move() -> None:
    model = net(dtype=torch.bfloat16)
    run = rs.attach(model, rs.VeRA(rank=5, targets=BODY))
    assert {p.dtype for _, p in run.trainable()} == {torch.float32}
    assert layers(run)["q"].projection.A.dtype is torch.float32
    optimizer = run.optimizer(lr=1e-5)
    for _ in range(2):  # steps of 1e-5 of numbers of 0.1: bf16 would not move
        (model(X.bfloat16()) - 1).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(bool((layer.lambda_d != 0.1).all()) for layer in layers(run).values())


def test_the_head_has_a_learning_rate_of_its_own() -> None:
    model = net()
    run = rs.attach(model, rs.VeRA(rank=5, targets=("q",), modules_to_save=("head",), head_lr_ratio=0.25))
    groups = {n: g["lr"] for g in run.optimizer(lr=4e-3).param_groups for n in g["param_names"]}
    assert groups == {"q.lambda_d": 4e-3, "q.lambda_b": 4e-3, "head.weight": 1e-3, "head.bias": 1e-3}
    run.add("two", rs.VeRA(rank=5, targets=("v",), modules_to_save=("head",), head_lr_ratio=0.5))
    run.use("two")
    groups = {n: g["lr"] for g in run.optimizer(lr=4e-3).param_groups for n in g["param_names"]}
    assert groups["two:head.weight"] == 2e-3
    assert groups["two:v.lambda_b"] == 4e-3


def test_biases_train_where_they_are() -> None:
    run = rs.attach(net(), rs.VeRA(rank=5, targets=("q",), bias="vera_only"))
    assert [name for name, _ in run.trainable()] == ["q.lambda_d", "q.lambda_b", "q.bias"]
    run = rs.attach(net(), rs.VeRA(rank=5, targets=("q",), bias="all"))
    assert "head.bias" in dict(run.trainable())


# ---- two adapters


@pytest.mark.parametrize("first", ["wide", "narrow"])
def test_a_second_adapter_has_a_pair_of_its_own(first: str, tmp_path: Path) -> None:
    """PEFT computes an adapter that was trained on fewer layers with the pair of the one that is there: silently wrong
    one way, an error the other way."""
    methods = {"wide": rs.VeRA(rank=5, targets=BODY), "narrow": rs.VeRA(rank=5, targets=("q", "v"))}
    alone = {}
    for i, (name, method) in enumerate(methods.items()):
        run = stirred(rs.attach(net(), method), seed=i + 1)
        run.save(tmp_path / name)
        alone[name] = run.model(X)
    second = next(name for name in methods if name != first)
    run = rs.load(net(), tmp_path / first)
    run.add(second, methods[second])
    trained = load_file(tmp_path / second / "adapter.safetensors")
    with torch.no_grad():
        for site, layer in layers(run, second).items():
            layer.lambda_d.copy_(trained[f"default/{site}.lambda_d"])
            layer.lambda_b.copy_(trained[f"default/{site}.lambda_b"])
    assert torch.equal(run.model(X), alone[first])
    run.use(second)
    assert torch.equal(run.model(X), alone[second])
    pairs = [layers(run, name)["q"].projection for name in run.adapters]
    assert pairs[0].A.shape[1] != pairs[1].A.shape[1]
    # through a file, both again
    run.save(tmp_path / "both")
    again = rs.load(net(), tmp_path / "both")
    assert torch.equal(again.model(X), alone[second])
    again.use("default")
    assert torch.equal(again.model(X), alone[first])
    # what would be wrong: the first adapter's vectors with the second one's pair
    wrong = layers(again)["q"]
    wrong.__dict__["projection"] = layers(again, second)["q"].projection
    wrong._modules.pop("projection", None)
    assert (again.model(X) - alone[first]).abs().max() > 1e-2


def test_adapters_add_up_and_combine_into_a_lora() -> None:
    model = net(dtype=F64)
    run = stirred(rs.attach(model, rs.VeRA(rank=5, targets=BODY)))
    run.add("two", rs.VeRA(rank=3, targets=("q", "up"), projection_seed=4))
    with torch.no_grad():
        for layer in layers(run, "two").values():
            layer.lambda_b.normal_(generator=torch.Generator().manual_seed(5))
    run.use("default", "two")
    y = model(X.double())
    run.combine(["default", "two"], "both")
    run.use("both")
    torch.testing.assert_close(model(X.double()), y)
    assert type(run._on.members["both"].method) is rs.LoRA


# ---- experts


def test_experts_have_vectors_of_their_own() -> None:
    config = transformers.Qwen3MoeConfig(
        hidden_size=16, intermediate_size=24, moe_intermediate_size=12, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, vocab_size=31, num_experts=4, num_experts_per_tok=2,
        tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Qwen3MoeForCausalLM(config).eval()
    targets = ("experts.gate_up_proj", "experts.down_proj")
    with pytest.raises(rs.errors.UnsupportedLayer, match=r"stack of expert weights.*set dropout=0"):
        rs.attach(model, rs.VeRA(rank=5, targets=targets, dropout=0.1))
    ids = torch.arange(24).reshape(2, 12) % 31
    base = model(input_ids=ids).logits
    run = rs.attach(model, rs.VeRA(rank=5, targets=targets))
    assert torch.equal(model(input_ids=ids).logits, base)
    assert sum(p.numel() for _, p in run.trainable()) == 4 * (24 + 5) + 4 * (16 + 5)
    stirred(run)
    y = model(input_ids=ids).logits
    y.sum().backward()
    assert all(p.grad.count_nonzero() for _, p in run.trainable())
    for name, layer in run.adapter().items():
        A, B = layer.low_rank()
        torch.testing.assert_close(B @ A, layer.delta())
        for e in range(4):
            want = torch.diag(layer.lambda_b[e]) @ layer.B @ torch.diag(layer.lambda_d[e]) @ layer.A
            torch.testing.assert_close(layer.delta()[e], want, msg=name)
    merged = run.merge()
    assert (y - base).abs().max() > 1e-2
    torch.testing.assert_close(merged(input_ids=ids).logits, y, rtol=1e-4, atol=1e-5)


# ---- sizes


def test_trained_parameters_are_those_of_the_papers_tables() -> None:
    def count(model: nn.Module, method: rs.Method) -> int:
        return sum(p.numel() for _, p in rs.attach(model, method).trainable())

    with torch.device("meta"):
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=32))
        base = transformers.RobertaModel(transformers.RobertaConfig(vocab_size=32))
        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
        big = transformers.RobertaModel(transformers.RobertaConfig(vocab_size=32, **large))
    assert count(llama, rs.VeRA(rank=1024)) == 1_589_248
    assert count(base, rs.VeRA(rank=1024, targets=("query", "value"))) == 43_008
    assert count(big, rs.VeRA(rank=256, targets=("query", "value"))) == 61_440


def test_a_saved_adapter_is_four_bytes_a_parameter(tmp_path: Path) -> None:
    model = nn.Sequential(*(nn.Linear(512, 512) for _ in range(4)))
    run = stirred(rs.attach(model, rs.VeRA(rank=256, targets=("0", "1", "2", "3"))))
    run.save(tmp_path)
    file = tmp_path / "adapter.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    assert header < 2_000
    assert file.stat().st_size <= 4 * 4 * (512 + 256) + header
    assert not [name for name in load_file(file) if "projection" in name]
    assert sum(p.numel() for _, p in run.trainable()) == 4 * (512 + 256)


def test_the_summary_counts_the_pair_once() -> None:
    summary = rs.attach(net(), rs.VeRA(rank=5, targets=BODY)).summary()
    assert summary.bytes_frozen == 4 * 5 * (14 + 14)
    assert "frozen beside the base 560 B" in str(summary)
    assert "frozen beside" not in str(rs.attach(net(), rs.LoRA(rank=2, targets=BODY)).summary())


# ---- files


@pytest.mark.parametrize("save_projection", [False, True])
def test_a_loaded_adapter_is_the_run(save_projection: bool, tmp_path: Path) -> None:
    run = stirred(rs.attach(net(), rs.VeRA(rank=5, targets=BODY, save_projection=save_projection)))
    torch.manual_seed(1)
    run.save(tmp_path)
    torch.manual_seed(2)
    again = rs.load(net(), tmp_path)
    assert torch.equal(again.model(X), run.model(X))
    held = [name for name in load_file(tmp_path / "adapter.safetensors") if "projection" in name]
    assert held == ([f"default/q.projection.{m}" for m in "AB"] if save_projection else [])
    shared = json.loads((tmp_path / "rankshift.json").read_text())["run"]["adapters"]["default"]["shared"]
    assert shared == {"generator": GENERATOR, "seed": 0, "rank": 5, "in_max": 14, "out_max": 14} | {
        "digest": digest(layers(run)["q"].projection.A, layers(run)["q"].projection.B)
    }


def test_another_seed_is_another_function() -> None:
    run = stirred(rs.attach(net(), rs.VeRA(rank=5, targets=BODY)))
    other = rs.attach(net(), rs.VeRA(rank=5, targets=BODY, projection_seed=1))
    with pytest.raises(rs.errors.WrongBase, match="projection_seed"):
        other.load_state_dict(run.state_dict())
    with torch.no_grad():
        for (_, mine), (_, theirs) in zip(other.trainable(), run.trainable(), strict=True):
            mine.copy_(theirs)
    assert (other.model(X) - run.model(X)).abs().max() > 1e-2


class Strange:
    """A torch whose generator gives other numbers."""

    @staticmethod
    def draw(numbers: Numbers) -> tuple[Tensor, Tensor]:
        return seeded(numbers.rank, numbers.in_max, seed=8), seeded(numbers.out_max, numbers.rank, seed=9)


def test_a_torch_that_draws_other_numbers_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = stirred(rs.attach(net(), rs.VeRA(rank=5, targets=BODY)))
    run.save(tmp_path / "drawn")
    held = stirred(rs.attach(net(), rs.VeRA(rank=5, targets=BODY, save_projection=True)))
    held.save(tmp_path / "held")
    monkeypatch.setattr(Numbers, "draw", Strange.draw)
    model = net()
    with pytest.raises(rs.errors.WrongBase, match=r"drawn from seed 0; torch .* draws others .*save_projection=True"):
        rs.load(model, tmp_path / "drawn")
    assert not any(isinstance(m, VeRALayer) for m in model.modules())
    assert torch.equal(model(X), net()(X))
    again = rs.load(net(), tmp_path / "held")
    assert torch.equal(again.model(X), held.model(X))
    again.save(tmp_path / "held again")
    monkeypatch.undo()
    assert torch.equal(rs.load(net(), tmp_path / "held again").model(X), held.model(X))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"in_max": 9}, r"too small for this model's layers of up to 14 × 14"),
        ({"rank": 4}, r"A \(4, 14\)"),
        ({"generator": "mt20"}, r"drawn by 'mt20', which this version"),
        ({"seed": 3}, r"draws others"),
        ({"out_max": 15}, r"draws others"),
    ],
)
def test_a_pair_that_cannot_be_made_again_is_refused(change: dict, says: str) -> None:
    state = stirred(rs.attach(net(), rs.VeRA(rank=5, targets=BODY))).state_dict()
    state["adapters"]["default"]["shared"] |= change
    model = net()
    with pytest.raises(rs.errors.WrongBase, match=says):
        rs.restore(model, state)
    assert type(model.q) is nn.Linear


# ---- refusals


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rank": 0}, "rank = 0 is below 1"),
        ({"d_initial": 0.0}, "nothing can learn"),
        ({"d_initial": float("nan")}, "d_initial = nan"),
        ({"dropout": 1.0}, r"not in \[0, 1\)"),
        ({"head_lr_ratio": 0.0}, "head_lr_ratio = 0.0 is not a positive"),
        ({"projection_seed": 2**64}, "is no seed"),
        ({"projection_prng_key": 1}, "projection_seed"),
    ],
)
def test_bad_settings(fields: dict, says: str) -> None:
    with pytest.raises(rs.errors.ConfigError, match=says):
        rs.VeRA(**fields)


def test_an_embedding_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8))
    with pytest.raises(rs.errors.UnsupportedLayer, match=r"0 is an Embedding: its 50 columns would set the width"):
        rs.attach(model, rs.VeRA(rank=5, targets=("0", "1")))


def test_a_rank_above_the_width_is_the_papers_own() -> None:
    run = rs.attach(net(), rs.VeRA(rank=1024, targets=BODY))
    assert {layer.rank for layer in layers(run).values()} == {1024}
    assert vera.VeRA().rank == 256
