"""Fused blocks: `run.lower()` changes how a Llama computes, and nothing that a method makes of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import rankshift as rs
from laws.capabilities import written
from laws.cases import CASES, Case, rows
from laws.test_laws import Refuse, cases
from laws.world import TOTAL, VOCAB, Session, fails, same, scramble
from rankshift.core.method import Method
from rankshift.lower import Lowered, llama
from rankshift.lower.llama import raised
from rankshift.lower.nodes import entry
from rankshift.lower.siblings import Group
from rankshift.lower.stand_in import stands_in

# Products are summed in another order: 1e-16 of numbers around one, 1e-7 in fp32. AdamW divides that by √v + 1e-6.
FUSED = {torch.float64: 1e-10, torch.float32: 1e-4}
NAMES = {
    "embed": "embed_tokens",
    **{name: f"{name}_proj" for name in ("q", "k", "v", "o", "up", "down")},
    "norm2": "post_attention_layernorm",
    "head": "lm_head",
    "blocks.0": "model.layers.0",
    "blocks.0.q": "model.layers.0.self_attn.q_proj",
    "blocks.0.up": "model.layers.0.mlp.up_proj",
}
"""What layers of the laws' model are called in a Llama."""


def translated(value: Any) -> Any:
    """A method that names layers of the laws' model, in the names of a Llama."""
    if isinstance(value, Method):
        return replace(value, **{f.name: translated(getattr(value, f.name)) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(map(translated, value))
    if isinstance(value, dict):
        return {translated(key): item for key, item in value.items()}
    return NAMES.get(value, value) if isinstance(value, str) else value


def made(base: Any = None) -> LlamaForCausalLM:
    """Two blocks, the same on every call; in float64, but for layers that are to be held in 4 bits."""
    width, dtype = (16, torch.float64) if base is None else (64, torch.float32)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width + 8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=16, attention_bias=True, initializer_range=0.2, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype)
    model.loss_function = ForCausalLMLoss
    return model


def ForCausalLMLoss(logits: Tensor, labels: Tensor, vocab_size: int, *args: Any, **kwargs: Any) -> Tensor:  # noqa: N802
    """transformers' loss of that name, without rounding to fp32."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes norms in fp32, whatever the model's dtype: here they are taken in that."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def objective(run: rs.Run, model: nn.Module, ids: Tensor) -> Tensor:
    return run.loss(model(input_ids=ids, labels=ids).loss, input_ids=ids)


def begin(case: Case, base: Any, lower: bool) -> tuple[Session, Lowered | None]:
    scramble()
    run = rs.attach(made(base), translated(case.method), base=base, total_steps=TOTAL)
    report = run.lower() if lower else None
    return Session("one", run, noisy=case.noisy, objective=objective), report


def hindrance(method: Method) -> str:
    """Why blocks under a method do not run fused; "" if they do."""
    report = rs.attach(made(), translated(method), total_steps=TOTAL).lower()
    return "; ".join(sorted(set(report.aside.values())))


def fused(case: Case, base: Any = None) -> str:
    """A lowered run trains as one that is not, and its state is that of the model's own blocks: raised, or saved and
    loaded, it goes on. Where blocks do not run fused, all this holds too, and the reason comes back."""
    plain = begin(case, base, lower=False)[0].steps(TOTAL)
    session, report = begin(case, base, lower=True)
    assert report is not None
    session.steps(2)
    saved, at_two = session.save(), session.state()
    session.steps(1)
    names = [f"model.layers.{i}" for i in range(2)]
    assert report.blocks == names, "blocks were not lowered"
    why, running = report.aside, len(names) - len(report.aside)
    assert str(report).startswith(f"{running} of 2 blocks run fused"), report
    at_three = session.state()
    session.run.raise_()
    same(session.state(), at_three, what="raise_() changed the state")
    assert not any(map(stands_in, session.model.modules())), "raise_() left a stand-in"
    assert session.model.loss_function is ForCausalLMLoss, "raise_() left a loss"
    session.steps(1)
    alike(session, plain, "lowered")
    resumed = Session.load(saved, "one", made(base), noisy=case.noisy, objective=objective)
    same(resumed.state(), at_two, what="saved lowered, loaded raised")
    alike(resumed.steps(2), plain, "saved lowered, gone on raised")
    return "; ".join(sorted(set(why.values())))


def alike(session: Session, plain: Session, what: str) -> None:
    """Raise AssertionError unless losses and all that was trained are those of ``plain``."""
    tolerance = FUSED[next(session.model.parameters()).dtype]
    late = plain.losses[-len(session.losses) :]
    assert max(abs(a - b) for a, b in zip(session.losses, late, strict=True)) < tolerance, f"{what}: losses differ"
    same(session.state(), plain.state(), tolerance, what)


def refusal(method: Method, why: str) -> str:
    """As a footnote: with what would come of other settings, where the method has them."""
    text, changes = f"Not fused: {why}.", dict[str, Any]()
    for name, value in {"rest": "freeze", "dropout": 0}.items():
        if why and getattr(method, name, value) != value:
            changes[name] = value
            why = hindrance(replace(method, **changes))
            text += f" With {', '.join(f'{k}={written(v)}' for k, v in changes.items())}: {why or 'fused'}."
    return text


@pytest.mark.capability("fused blocks")
@cases(*rows())
def test_lowered_training(case: Case, record_property: Refuse) -> None:
    if why := fused(case):
        record_property("refused", {"fused blocks": refusal(case.method, why)})


def test_lowered_training_on_a_base_in_four_bits() -> None:
    assert fused(CASES["lora"][0], base="nf4") == ""


# ---- the law bites ---------------------------------------------------------------------------------------------------


def forgets_a_term(x: Tensor, before: Any, qkv: Any, *rest: Any) -> Any:
    q, k, v = qkv.terms
    return entry(x, before, Group(qkv.bases, (q, k, v._replace(B=v.B - v.B.detach())), qkv.slot), *rest)


def forgets_a_gradient(x: Tensor, before: Any, qkv: Any, *rest: Any) -> Any:
    q, k, v = qkv.terms
    return entry(x, before, Group(qkv.bases, (q, k, v._replace(A=0 * v.A + v.A.detach())), qkv.slot), *rest)


def rounds_weights(layer: Any) -> nn.Module:
    with torch.no_grad():
        layer.self_attn.o_proj.base.weight.mul_(1 + 1e-6)
    return raised(layer)


def stands_on(layer: Any) -> nn.Module:
    return layer


@pytest.mark.parametrize(
    ("part", "fault", "says"),
    [
        ("entry", forgets_a_term, "lowered: losses differ"),
        ("entry", forgets_a_gradient, "lowered: losses differ"),
        ("raised", rounds_weights, "raise_() changed the state"),
        ("raised", stands_on, "raise_() left a stand-in"),
        ("is_block", lambda layer: False, "blocks were not lowered"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_law_bites(part: str, fault: Callable[..., Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, part, fault)
    assert says in fails(lambda: fused(CASES["lora"][0]))


def test_a_block_that_stays_as_it_was_is_no_fused_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama, "_terms", lambda layer, bases: "planted")
    assert fused(CASES["lora"][0]) == hindrance(CASES["lora"][0].method) == "planted"
    assert refusal(CASES["lora"][0].method, "planted") == "Not fused: planted."
    assert refusal(rs.ReLoRA(rank=2), "planted") == 'Not fused: planted. With rest="freeze": planted.'


def test_a_refusal_says_what_would_serve() -> None:
    method = rs.ReLoRA(rank=2, dropout=0.1)
    assert refusal(method, hindrance(method)) == (
        'Not fused: its norms train. With rest="freeze": ReLoRALayer is more than a low-rank term beside a weight. '
        'With rest="freeze", dropout=0: fused.'
    )
