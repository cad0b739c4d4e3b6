"""The lowered head of causal language models: the same loss and gradients, without full logits, whoever trains."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.loss.loss_utils import ForCausalLMLoss

import rankshift as rs
from rankshift.core.site import Site
from rankshift.lower import head as lowered
from rankshift.lower import lower, undo
from rankshift.lower.head import LazyLogits, lower_head, raise_head
from rankshift.storage import held_as

V, K, B, S = 37, 16, 3, 7


def small(
    kind: Any = LlamaForCausalLM, config: Any = LlamaConfig, dtype: torch.dtype = torch.float64, **more: Any
) -> Any:
    """A model whose body trains; head and embedding do not."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": V, "hidden_size": K, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1,
        "eos_token_id": 2, "initializer_range": 0.3,
    }  # fmt: skip
    model = kind(config(**{**settings, **more})).to(dtype).train()
    model.get_output_embeddings().weight.requires_grad_(False)
    return model


def llama(**more: Any) -> Any:
    return small(tie_word_embeddings=False, **more)


def qwen2(**more: Any) -> Any:
    return small(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True, **more)


def gemma2(**more: Any) -> Any:
    return small(
        Gemma2ForCausalLM, Gemma2Config, head_dim=8, final_logit_softcapping=2.0, query_pre_attn_scalar=8, **more
    )


def granite(**more: Any) -> Any:
    return small(GraniteForCausalLM, GraniteConfig, logits_scaling=3.0, **more)


def biased(**more: Any) -> Any:
    model = llama(**more)
    model.lm_head = nn.Linear(K, V, dtype=model.dtype)
    return model.requires_grad_(True) and frozen_head(model)


def frozen_head(model: Any) -> Any:
    model.lm_head.requires_grad_(False)
    return model


def adapted(**more: Any) -> Any:
    model = llama(**more)
    rs.attach(model, rs.LoRA(rank=3, targets=["q_proj", "lm_head"]))
    for name, p in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(p, std=0.3)
    return model


def vera(**more: Any) -> Any:
    model = llama(**more)
    rs.attach(model, rs.VeRA(rank=3, targets=["lm_head"]))
    for name, p in model.named_parameters():
        if name.endswith("lambda_b"):
            nn.init.normal_(p)
    return model


MODELS = {f.__name__: f for f in (llama, qwen2, gemma2, granite, biased, adapted, vera)}


def batch(ignored: str = "some") -> dict[str, Tensor]:
    ids = torch.randint(3, V, (B, S), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    if ignored == "some":
        labels[0, :4], labels[1] = -100, -100
    elif ignored == "all":
        labels[:] = -100
    return {"input_ids": ids, "labels": labels}


def grads(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def same(got: dict[str, Tensor], want: dict[str, Tensor], rtol: float = 1e-9) -> None:
    assert got.keys() == want.keys()
    for name, g in got.items():
        torch.testing.assert_close(g, want[name], rtol=rtol, atol=rtol * float(want[name].abs().max()), msg=name)


def exact(model: Any, data: dict[str, Tensor], **more: Any) -> Tensor:
    """The loss in the model's dtype, from its own logits; transformers takes it in fp32."""
    logits = model(input_ids=data["input_ids"]).logits
    assert type(logits) is Tensor, "there was no loss to take"
    ignore = more.get("ignore_index", -100)
    shift = more["shift_labels"] if "shift_labels" in more else F.pad(data["labels"], (0, 1), value=ignore)[:, 1:]
    n = more.get("num_items_in_batch")
    kind = "mean" if n is None else "sum"
    return F.cross_entropy(logits.view(-1, V), shift.reshape(-1), ignore_index=ignore, reduction=kind) / (n or 1)


# ---- one forward


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients(name: str, ignored: str) -> None:
    model, data = MODELS[name](), batch(ignored)
    want = exact(model, data)
    expected = grads(model, want)
    theirs = model(**data)
    undo = lower_head(model)
    assert callable(undo), undo
    out = model(**data)
    assert type(out.logits) is LazyLogits
    assert out.logits.there is None
    torch.testing.assert_close(out.loss, want, rtol=1e-10, atol=0, equal_nan=True)
    torch.testing.assert_close(out.loss.float(), theirs.loss, rtol=1e-5, atol=0, equal_nan=True)
    same(grads(model, out.loss), expected)
    assert torch.equal(out.logits[:], theirs.logits), "to the bit"
    assert torch.equal(exact(model, data).isnan(), want.isnan())


@pytest.mark.parametrize("name", ["llama", "gemma2", "adapted"])
@pytest.mark.parametrize(
    "more",
    [
        {"num_items_in_batch": 11},
        {"num_items_in_batch": torch.tensor(11)},
        {"ignore_index": 5},
        {"shift_labels": torch.arange(B * S).view(B, S) % V},
        {"shift_labels": torch.full((B, S), -100), "num_items_in_batch": 4},
    ],
    ids=lambda more: "+".join(more),
)
def test_what_the_loss_is_told(name: str, more: dict[str, Any]) -> None:
    model, data = MODELS[name](), batch()
    if "ignore_index" in more:
        data["labels"][data["labels"] == -100] = 5
    want = exact(model, data, **more)
    expected = grads(model, want)
    theirs = model(**data, **more).loss
    lower_head(model)
    out = model(**data, **more)
    assert out.logits.there is None
    torch.testing.assert_close(out.loss, want, rtol=1e-10, atol=0)
    torch.testing.assert_close(out.loss.float(), theirs, rtol=1e-5, atol=0)
    same(grads(model, out.loss), expected)


def test_ordinary_logits_otherwise() -> None:
    model, data = llama(), batch()
    lower_head(model)
    assert type(model(input_ids=data["input_ids"]).logits) is Tensor
    with torch.no_grad():
        assert type(model(**data).logits) is Tensor
    model.lm_head.weight.requires_grad_(True)
    out = model(**data)
    assert type(out.logits) is Tensor, "it trains now"
    out.loss.backward()
    assert model.lm_head.weight.grad is not None
    model.lm_head.weight.requires_grad_(False)
    assert type(model(**data).logits) is LazyLogits
    model.eval()
    assert type(model(**data).logits) is Tensor
    with pytest.raises(ValueError, match="input_ids"):
        model.train()(**{**data, "input_ids": None})
    assert model.lm_head.asked is None, "a forward that failed asks for nothing later"


def test_a_vocabulary_of_another_size() -> None:
    """Where the loss is told of another width than the head's, the model's own sees to it."""
    model, data = llama(), batch()
    lower_head(model)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        model.loss_function(model(**data).logits, data["labels"], V - 1)


@pytest.mark.parametrize("hands_on", [False, True])
def test_logits_changed_before_the_loss(hands_on: bool) -> None:
    """By a hook on the head: the loss is that of what they are now."""
    model, data = llama(), batch()

    def hook(module: nn.Module, args: Any, logits: Tensor) -> Tensor | None:
        changed = logits.mul_(2)
        return changed if hands_on else None

    model.lm_head.register_forward_hook(hook)
    plain = model(**data).loss
    want = grads(model, plain)
    lower_head(model)
    loss = model(**data).loss
    torch.testing.assert_close(loss, plain, rtol=0, atol=0)
    same(grads(model, loss), want)


# ---- what is done with the logits


def detached(logits: Tensor) -> Any:
    return logits.detach()


USES: dict[str, Any] = {
    "index": lambda x: x[:, :-1, 3],
    "argmax": lambda x: x.argmax(-1),
    "detach": detached,
    "float": lambda x: x.float() + 0,
    "to": lambda x: x.to(torch.float32)[0],
    "device": lambda x: x.to("cpu")[0],
    "cat": lambda x: torch.cat([x, x]),
    "keyword": lambda x: torch.softmax(input=x, dim=-1),
    "scaled": lambda x: (x / 3).tanh()[0] * 2,
    "capped twice": lambda x: torch.tanh(torch.tanh(x / 2))[1],
    "rounding": lambda x: torch.div(x, 0.3, rounding_mode="floor"),
    "zero": lambda x: x * 0,
    "reversed": lambda x: 2 * x - 1,
    "by a tensor": lambda x: x * torch.arange(V),
    "int": lambda x: x.to(torch.int64),
    "list": lambda x: torch.tensor(x.tolist()),
    "numpy": lambda x: torch.from_numpy(x.detach().numpy()),
    "iterate": lambda x: torch.stack(list(x)),
    "max": lambda x: x.max(-1).values,
    "repr": lambda x: torch.tensor(len(repr(x.detach()))),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.detach())),
    "copy": lambda x: copy.deepcopy(x.detach()),
    "in place": lambda x: x.clone().mul_(2),
    "address": lambda x: torch.tensor(x.data_ptr() != 0),
    "map": lambda x: torch.func.vmap(lambda row: row.sum())(x),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("grad", [True, False])
def test_they_are_logits_to_whoever_looks(use: str, name: str, grad: bool) -> None:
    model, data = MODELS[name](), batch()
    plain = model(**data).logits
    lower_head(model)
    lazy = model(**data).logits
    assert (lazy.shape, lazy.dtype, lazy.device, lazy.dim(), len(lazy)) == ((B, S, V), plain.dtype, plain.device, 3, B)
    assert lazy.requires_grad
    assert isinstance(lazy, Tensor)
    assert lazy.there is None, "it was only looked at"
    with torch.set_grad_enabled(grad):
        got, want = USES[use](lazy), USES[use](plain)
    assert type(got[:1] if got.dim() else got) is Tensor
    assert torch.equal(got, want)
    assert got.requires_grad == want.requires_grad


class Twice(torch.autograd.Function):
    """A node that is given lazy logits as they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        return x.clone() * 2

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * d


@pytest.mark.parametrize("name", ["llama", "gemma2", "adapted"])
@pytest.mark.parametrize("how", ["function", "node", "kept"])
def test_gradients_through_the_logits(name: str, how: str) -> None:
    """Of a user's own loss, beside the model's or alone."""
    model, data = MODELS[name](), batch()

    def both(out: Any) -> Tensor:
        x = out.logits
        if how == "kept":
            x[:].sum()
            x.retain_grad()
        own = Twice.apply(x) if how == "node" else 2 * x  # type: ignore[no-untyped-call]
        return own.square().mean() + (out.loss.double() if how == "function" else 0)

    plain = model(**data)
    want = grads(model, both(plain))
    lower_head(model)
    out = model(**data)
    same(grads(model, both(out)), want, 1e-6 if how == "function" else 1e-9)
    if how == "kept":
        torch.testing.assert_close(out.logits.grad, plain.logits.grad)


def test_hooks_on_the_logits() -> None:
    """FSDP2 hangs one on every output; that computes none."""
    model, data = llama(), batch()
    lower_head(model)
    logits = model(**data).logits
    seen: list[Tensor] = []
    logits.register_hook(seen.append)
    assert logits.there is None
    (3 * logits).sum().backward()
    assert (seen[0] == 3).all()


def test_too_late() -> None:
    model, data = adapted(), batch()
    lower_head(model)
    out = model(**data)
    out.loss.backward()
    with torch.no_grad():
        for p in model.lm_head.parameters():
            if p.requires_grad:
                p -= 0.1
    with pytest.raises(RuntimeError, match="before the update"):
        out.logits.argmax(-1)


def test_memory() -> None:
    """Nothing of the size of the logits is kept, or made beside a chunk of them."""
    model, data = llama(dtype=torch.float32, vocab_size=5000), batch("none")
    kept: list[int] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t.numel() if t.data_ptr() != model.lm_head.weight.data_ptr() else 0)
        return t

    for lowers in (False, True):
        if lowers:
            lower_head(model)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            model(**data)
        assert (max(kept) < B * S * 5000 / 4) == lowers


# ---- sites


def test_a_site_at_the_head() -> None:
    model, data = llama(), batch()
    run = rs.attach(model, rs.LoRA(rank=3, targets=["lm_head"]))
    site = model.lm_head
    undo = lower_head(model)
    assert isinstance(model.lm_head, Site)
    assert isinstance(model(**data).logits, LazyLogits)
    opt = run.optimizer(lr=1e-2)
    for _ in range(3):
        model(**data).loss.backward()
        opt.step()
        opt.zero_grad()
    with run.disabled():
        assert type(model(**data).logits) is LazyLogits, "of the base alone"
    want = exact(model, data)
    assert callable(undo)
    undo()
    assert type(model.lm_head) is Site
    assert vars(model.lm_head) is vars(site)
    torch.testing.assert_close(exact(model, data), want, rtol=0, atol=0)
    lower_head(model)
    merged = run.merge()
    assert type(merged.lm_head) is nn.Linear
    raise_head(merged)
    assert merged.loss_function is ForCausalLMLoss
    torch.testing.assert_close(exact(merged, data), want)


@pytest.mark.parametrize(
    "method",
    [
        rs.LoRA(rank=2, targets=["lm_head"], dora=True),
        rs.LoRA(rank=2, targets=["lm_head"], dropout=0.3),
        rs.PaCA(rank=2, targets=["lm_head"]),
    ],
    ids=["dora", "dropout", "paca"],
)
def test_an_adapter_that_is_more_than_a_term(method: rs.Method) -> None:
    model, data = llama(), batch()
    rs.attach(model, method)
    torch.manual_seed(3)
    want = grads(model, model(**data).loss)
    assert callable(lower_head(model))
    torch.manual_seed(3)
    out = model(**data)
    assert type(out.logits) is Tensor
    same(grads(model, out.loss), want)


def test_a_base_that_was_exchanged() -> None:
    """For one in fewer bits, after the head was lowered."""
    model, data = adapted(dtype=torch.float32), batch()
    lower_head(model)
    model.lm_head.rest_on(held_as("int8").of(model.lm_head.base, "int8"))
    model.lm_head.enter()
    out = model(**data)
    assert type(out.logits) is Tensor
    torch.testing.assert_close(out.loss, exact(model, data))


def test_a_model_without_numbers() -> None:
    model = llama().to("meta")
    lower_head(model)
    out = model(**{name: tensor.to("meta") for name, tensor in batch().items()})
    assert out.loss.is_meta
    assert out.logits.shape == (B, S, V)


# ---- the way back


@pytest.mark.parametrize("name", MODELS)
def test_nothing_remains(name: str) -> None:
    model = MODELS[name]()
    before, layer, state = dict(vars(model)), model.lm_head, copy.deepcopy(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    undo = lower_head(model)
    assert callable(undo)
    assert isinstance(model.lm_head, type(layer))
    assert list(model.state_dict()) == list(state)
    assert [id(p) for p in model.parameters()] == parameters
    undo()
    assert type(model.lm_head) is type(layer)
    assert vars(model.lm_head) is vars(layer)
    assert "asked" not in vars(layer)
    assert model.loss_function is ForCausalLMLoss
    assert {k: v for k, v in vars(model).items() if k != "_loss_function"} == before
    assert type(model(**batch()).logits) is Tensor
    undo()


def test_why_not() -> None:
    model = llama()
    model.lm_head.weight.requires_grad_(True)
    assert lower_head(model) == "the head's weight trains"
    assert lower_head(nn.Linear(2, 2)) == "the model has no output embeddings"
    model = llama()
    lower_head(model)
    assert not isinstance(lower_head(model), str)  # it stays so
    model = llama()
    model.lm_head.forward = model.lm_head.forward
    assert lower_head(model) == "the head is a Linear"
    model = llama()
    model.loss_function = F.cross_entropy
    assert lower_head(model) == "its loss is cross_entropy"
    assert model.loss_function is F.cross_entropy
    model = llama(dtype=torch.float32)
    rs.attach(model, rs.LoRA(rank=2, targets=["lm_head"]), base="nf4")
    assert lower_head(model) == "the head is held in nf4"
    assert type(model.lm_head) is Site


def test_beside_lowered_blocks() -> None:
    model, data = adapted(), batch()
    want = grads(model, exact(model, data))
    lower(model)
    lower_head(model)
    out = model(**data)
    assert isinstance(out.logits, LazyLogits)
    same(grads(model, out.loss), want, 1e-5)  # transformers' norms are taken in fp32
    undo(model)
    assert type(model.lm_head) is Site
    assert type(model(**data).logits) is Tensor
    raise_head(model)
    assert "asked" not in vars(model.lm_head)
    assert model.loss_function is ForCausalLMLoss
    same(grads(model, exact(model, data)), want)


@pytest.mark.parametrize("name", ["qwen2", "adapted"])
def test_copies(name: str) -> None:
    """A copy is lowered by itself: its parameters, its hooks, its way back."""
    model, data = MODELS[name](), batch()
    lower_head(model)
    want = grads(model, model(**data).loss)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        other.zero_grad()
        out = other(**data)
        assert type(out.logits) is LazyLogits
        assert out.logits.source.head is other.lm_head
        same(grads(other, out.loss), want)
        raise_head(other)
        assert not other._forward_pre_hooks
        assert type(other(**data).logits) is Tensor
    assert type(model(**data).logits) is LazyLogits


# ---- who trains


def test_autocast_and_checkpointing() -> None:
    model, data = llama(dtype=torch.float32), batch()
    model.gradient_checkpointing_enable()

    def run() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return model(**data)

    plain = run()
    want = grads(model, plain.loss)
    lower_head(model)
    out = run()
    assert out.logits.dtype == torch.bfloat16
    torch.testing.assert_close(out.loss, plain.loss, rtol=1e-5, atol=0)
    same(grads(model, out.loss), want, 0.05)
    assert torch.equal(out.logits[:], plain.logits), "computed outside as it would have been inside"


def test_accelerate() -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    plain, model, data = llama(dtype=torch.float32), llama(dtype=torch.float32), batch()
    lower_head(model)
    plain, model = accelerator.prepare(plain), accelerator.prepare(model)
    want, out = plain(**data), model(**data)
    assert out.logits.dtype == want.logits.dtype == torch.float32
    assert out.logits.there is None
    torch.testing.assert_close(out.loss, want.loss, rtol=1e-5, atol=0)
    assert torch.equal(out.logits.argmax(-1), want.logits.argmax(-1))
    assert torch.equal(out.logits[0], want.logits[0])
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Any:
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("how", [{}, {"find_unused_parameters": True}, {"static_graph": True}], ids=str)
def test_ddp(how: dict[str, bool]) -> None:
    plain, model, data = adapted(), adapted(), batch()
    want = grads(plain, exact(plain, data))
    lower_head(model)
    wrapped = nn.parallel.DistributedDataParallel(model, **how)
    for _ in range(3):
        out = wrapped(**data)
        assert out.logits.there is None, "nobody made them"
        same(grads(model, out.loss), want)
    if "static_graph" in how:
        return
    for asked in ({}, {"labels": data["labels"]}):  # the user's own loss, beside the model's or not
        labels = F.pad(data["labels"], (0, 1), value=-100)[:, 1:].reshape(-1)
        own = F.cross_entropy(wrapped(input_ids=data["input_ids"], **asked).logits.view(-1, V), labels)
        same(grads(model, own), want)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("alone", [False, True], ids=["in the root", "head alone"])
def test_fsdp2(alone: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    plain, model, data = adapted(), adapted(), batch()
    want = grads(plain, exact(plain, data))
    assert callable(lower_head(model))
    for layer in model.model.layers:
        fully_shard(layer)
    if alone:
        fully_shard(model.lm_head)
    fully_shard(model)
    for _ in range(2):
        model.zero_grad()  # not after the forward, when the root's parameters are others
        out = model(**data)
        assert isinstance(out.logits, LazyLogits) != alone, "sharded again when the loss is taken"
        assert alone or out.logits.there is None, "nobody made them"
        same({n: g.full_tensor() for n, g in grads(model, out.loss).items()}, want, 1e-6 if alone else 1e-9)
    assert lower_head(adapted_and_sharded()) == "the head is sharded already: lower before fully_shard()"


def adapted_and_sharded() -> Any:
    from torch.distributed.fsdp import fully_shard

    model = adapted()
    fully_shard(model)
    return model


def rows() -> list[dict[str, list[int]]]:
    return [
        {"input_ids": ids, "labels": [-100, *ids[1:]], "attention_mask": [1] * S}
        for ids in torch.randint(3, V, (24, S), generator=torch.Generator().manual_seed(2)).tolist()
    ]


@pytest.mark.parametrize("more", [{}, {"label_smoothing_factor": 0.1}, {"bf16": True}], ids=str)
def test_transformers_trainer(tmp_path: Any, more: dict[str, Any]) -> None:
    """Loss for loss, with accumulation, evaluation and its logits."""

    def train(lowers: bool) -> tuple[list[float], list[float]]:
        run = rs.attach(llama(dtype=torch.float32), rs.LoRA(rank=2, targets=["q_proj", "lm_head"]))
        if lowers:
            assert callable(lower_head(run.model))
        args = TrainingArguments(
            str(tmp_path), max_steps=5, per_device_train_batch_size=3, gradient_accumulation_steps=2, logging_steps=1,
            use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", eval_strategy="steps", eval_steps=2,
            **more,
        )  # fmt: skip
        trainer = Trainer(
            model=run.model, args=args, train_dataset=rows(), eval_dataset=rows()[:4],
            optimizers=(run.optimizer(lr=3e-2), None),
            compute_metrics=lambda p: {"right": float((p.predictions.argmax(-1) == p.label_ids).mean())},
        )  # fmt: skip
        trainer.train()
        history = trainer.state.log_history
        found = [entry["loss"] for entry in history if "loss" in entry]
        return found, [entry[key] for entry in history for key in ("eval_loss", "eval_right") if key in entry]

    made: list[bool] = []
    plain = train(False)
    original = lowered.LazyLogits.logits
    try:
        lowered.LazyLogits.logits = lambda self: (made.append(True), original(self))[1]  # type: ignore
        got = train(True)
    finally:
        lowered.LazyLogits.logits = original  # type: ignore[method-assign]
    rtol = 2e-2 if more.get("bf16") else 1e-4
    torch.testing.assert_close(torch.tensor(got[0]), torch.tensor(plain[0]), rtol=rtol, atol=0)
    torch.testing.assert_close(torch.tensor(got[1]), torch.tensor(plain[1]), rtol=rtol, atol=0.05)
    assert len(got[0]) == 5
    assert not made, "no training step made logits"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trl(tmp_path: Any) -> None:
    """SFTTrainer: the loss, and the entropy and accuracy that it takes from hidden states or logits."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    def train(lowers: bool, **more: Any) -> list[dict[str, float]]:
        run = rs.attach(llama(dtype=torch.float32), rs.LoRA(rank=2, targets=["q_proj"]))
        if lowers:
            assert callable(lower_head(run.model))
        args = trl.SFTConfig(
            str(tmp_path), max_steps=3, per_device_train_batch_size=3, logging_steps=1, use_cpu=True, bf16=False,
            report_to=[], disable_tqdm=True, save_strategy="no", max_length=S, **more,
        )  # fmt: skip
        trainer = trl.SFTTrainer(
            model=run.model, args=args, train_dataset=Dataset.from_list(rows()), processing_class=tokenizer(),
            optimizers=(run.optimizer(lr=3e-2), None),
        )  # fmt: skip
        trainer.train()
        keys = ("loss", "entropy", "mean_token_accuracy")
        return [{key: entry[key] for key in keys} for entry in trainer.state.log_history if "loss" in entry]

    for more in ({}, {"label_smoothing_factor": 0.1}):
        for got, want in zip(train(True, **more), train(False, **more), strict=True):
            assert got == pytest.approx(want, rel=1e-4)


def tokenizer() -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(V)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), unk_token="w0", bos_token="w1",
        eos_token="w2", pad_token="w0",
    )  # fmt: skip


def test_compiled_models_have_ordinary_logits() -> None:
    model, data = llama(dtype=torch.float32), batch()
    want = grads(model, model(**data).loss)
    lower_head(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    out = compiled(**data)
    assert not isinstance(out.logits, LazyLogits)
    same(grads(model, out.loss), want, 1e-4)
    assert type(model(**data).logits) is LazyLogits


# ---- how many labels count


def test_the_count_is_of_the_labels_of_the_loss() -> None:
    labels, other = torch.tensor([1, -100]), torch.tensor([1, -100])
    count = lowered.Count(labels)
    assert count(labels, None, -100) is None, "on the CPU the op looks itself"
    waited = []
    count.answer = torch.tensor(1)
    count.event = type("Event", (), {"synchronize": lambda self: waited.append(True)})()
    assert count(labels, None, -100) == 1
    assert waited
    assert count(other, None, -100) is None
    assert count(labels, other, -100) is None
    assert count(labels, None, 0) is None
