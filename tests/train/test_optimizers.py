"""bitsandbytes' optimizers under rs.Trainer and in recipes."""

import io

import bitsandbytes
import pytest
import torch
from rich.console import Console
from test_trainer import arguments, base, data, losses, same, tensors, trainer
from test_trainer_distributed import ENGINES, OnCPU, on_two
from torch import nn

import rankshift as rs
from rankshift.core.errors import ConfigError
from rankshift.train import config, optimizers, recipe

METHOD = rs.LoRA(rank=300, lr_ratio=4.0, targets=("q_proj", "down_proj"))  # factors of more than 4096 numbers


def wide(width=320):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = {"hidden_size": width, "intermediate_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, max_position_embeddings=32, **settings))


def train(out, optim="adamw_8bit", method=METHOD, model=None, resume=None, **more):
    rest = {"base": "nf4"} if method is METHOD else {}
    t = trainer(out, method, model=model or wide(), rest=rest, optim=optim, **more)
    t.train(resume_from_checkpoint=resume)
    return t


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_bnb_8bit"])
def test_state_in_8_bits_with_the_methods_rates_and_decay_resumed_to_the_bit(tmp_path, optim):
    whole = train(tmp_path, optim, max_steps=6, save_steps=3)
    optimizer = whole.run._driver.ridden
    assert isinstance(optimizer, bitsandbytes.optim.AdamW)
    assert {s["state1"].dtype for s in optimizer.state.values()} == {torch.uint8}
    rates = {id(p): group["initial_lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, p in whole.run.trainable():
        assert rates[id(p)] == (4e-2 if name.endswith(".B") else 1e-2), name
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.1}
    assert whole.run.step == 6
    again = train(tmp_path, optim, resume=str(tmp_path / "checkpoint-3"), max_steps=6, save_strategy="no")
    assert again.run.step == 6
    assert losses(again) == losses(whole)
    assert same(tensors(again.run), tensors(whole.run))
    for ours, theirs in zip(again.run._driver.ridden.state.values(), optimizer.state.values(), strict=True):
        assert same({k: v for k, v in ours.items() if k != "step"}, {k: v for k, v in theirs.items() if k != "step"})
        assert ours["step"] == theirs["step"] == 6


def test_the_step_is_that_of_bitsandbytes(tmp_path):
    """By hand: the same gradients, clipped alike, into their own optimizer."""

    class Seen(rs.Trainer):
        def training_step(self, model, inputs, *rest):
            self.seen = inputs
            return super().training_step(model, inputs, *rest)

    alone = {"max_steps": 1, "warmup_steps": 0, "gradient_accumulation_steps": 1, "save_strategy": "no"}
    t = train(tmp_path / "a", cls=Seen, **alone)
    run = rs.attach(wide(), METHOD, base="nf4", seed=3, total_steps=1)
    groups = [
        {"params": [p for name, p in run.trainable() if name.endswith(leaf)], "lr": lr}
        for leaf, lr in ((".A", 1e-2), (".B", 4e-2))
    ]
    theirs = bitsandbytes.optim.AdamW8bit(groups, weight_decay=0.1)
    run.carry(theirs)
    run.model.train()
    run.model(**t.seen).loss.backward()
    torch.nn.utils.clip_grad_norm_([p for _, p in run.trainable()], 1.0)
    theirs.step()
    assert same(tensors(run), tensors(t.run))


def test_events_go_on(tmp_path):
    run = train(
        tmp_path, method=rs.SoRA(rank=4, sparsity=100.0, targets="q_proj"), model=base(), save_strategy="no"
    ).run
    assert run.step == 8
    assert run.metrics()["open_gates"] < 8


def test_every_phase_gets_one(tmp_path):
    then = [rs.Then(rs.VeRA(rank=4), steps=2)]
    t = rs.Trainer(
        base(), arguments(tmp_path, optim="adamw_8bit", max_steps=4, save_strategy="no"), method=rs.LoRA(rank=2),
        then=then, train_dataset=data(),
    )  # fmt: skip
    t.train()
    assert isinstance(t.run._driver.ridden, bitsandbytes.optim.AdamW)
    assert (t.run.method.name, t.run.step) == ("vera", 4)


@pytest.mark.parametrize(
    ("method", "more", "text"),
    [
        (rs.GaLore(rank=2), {}, "GaLore projects gradients inside its own optimizer"),
        (rs.AdaRankGrad(rank=2), {}, "AdaRankGrad projects gradients"),
        (rs.ReLoRA(rank=2, every=4), {}, "resets Adam's moments of its factors"),
        (rs.SwitchLoRA(rank=2), {}, "resets Adam's state of single vectors"),
        (rs.LoRA(rank=2), {"optim": "paged_adamw_32bit"}, "pages out to the host, and this training is on cpu"),
        (rs.LoRA(rank=2), {"optim": "paged_adamw_8bit"}, "Use adamw_8bit"),
        (rs.LoRA(rank=2), {"optim": "lion_8bit"}, "'adamw_torch', 'adamw_torch_fused', 'adamw_8bit'"),
        (rs.LoRA(rank=2), {"fused": True}, "fused_backward=True is for the run's own optimizer"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_attached(tmp_path, method, more, text):
    model, fused = base(), more.pop("fused", False)
    before = [id(module) for module in model.modules()]
    with pytest.raises(ConfigError, match=text):
        rs.Trainer(
            model, arguments(tmp_path, **{"optim": "adamw_8bit", **more}), method=method, train_dataset=data(),
            fused_backward=fused,
        )  # fmt: skip
    assert [id(module) for module in model.modules()] == before


def test_what_is_loaded_is_paged_again(monkeypatch):
    """Without a GPU there are no pages: the buffers that bitsandbytes makes for them are counted."""
    made, told = [], []

    def buffer(self, p, dtype=torch.float32):
        made.append(torch.zeros_like(p, dtype=dtype))
        return made[-1]

    monkeypatch.setattr(bitsandbytes.optim.AdamW, "get_state_buffer", buffer)
    weights = [nn.Parameter(torch.randn(80, 80)) for _ in range(2)]
    weights[1].data.copy_(weights[0])
    one, other = (optimizers._made("paged_adamw_8bit", [{"params": [w]}], {"lr": 1e-2}) for w in weights)
    gradients = [torch.randn(80, 80) for _ in range(4)]
    for k, gradient in enumerate(gradients):
        weights[0].grad = gradient.clone()
        one.step()
        if k == 1:
            other.register_load_state_dict_post_hook(lambda _: told.append(1))
            other.load_state_dict(one.state_dict())
            assert told == [1]
            weights[1].data.copy_(weights[0])
            state = other.state[weights[1]]
            assert all(any(state[m] is b for b in made) for m in ("state1", "state2"))
        elif k > 1:
            weights[1].grad = gradient.clone()
            other.step()
    assert torch.equal(*weights)


def in_two(out, engine):
    if engine == "fsdp2":
        with pytest.raises(ConfigError, match="know no sharded tensors"):
            trainer(out, rs.LoRA(rank=2), cls=OnCPU, optim="adamw_8bit", **ENGINES[engine])
        return None
    t = trainer(out, rs.LoRA(rank=2), cls=OnCPU, optim="adamw_8bit", max_steps=2, save_strategy="no", **ENGINES[engine])
    t.train()
    return losses(t)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_in_two_processes(tmp_path, engine):
    one, two = on_two(tmp_path, in_two, tmp_path / "out", engine)
    assert one == two


# ---- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        (["train.optim=adamw_8bits"], "Did you mean 'adamw_8bit'"),
        (["train.optim=adamw_8bit", "method=galore"], "GaLore projects gradients"),
        (["train.optim=adamw_8bit", "train.fused_backward=true", "train.clip=0"], "the method's own optimizer"),
    ],
)
def test_settings_are_refused(pairs, text):
    with pytest.raises(ConfigError, match=text):
        config.read(None, [*pairs, "model=nowhere", "data=nothing.txt"])


def test_pages_are_refused_without_a_gpu_before_data_is_read(monkeypatch, tiny_llama):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted = config.read(None, ["train.optim=paged_adamw_8bit", f"model={tiny_llama}", "data=tinyshakespeare"])
    with pytest.raises(ConfigError, match="optim='paged_adamw_8bit' keeps its state"):
        recipe.preflight(wanted)


def test_a_recipe(tmp_path, tiny_llama):
    (tmp_path / "a.txt").write_text("hello how are you ? fine thanks . " * 50)
    pairs = [f"model={tiny_llama}", f"data={tmp_path / 'a.txt'}", "data.max_length=16", "train.steps=4"]
    wanted = config.read(None, [*pairs, "train.optim=adamw_8bit", "base=int8", f"output={tmp_path}", "train.lr=1e-2"])
    result = recipe.train(wanted, Console(file=io.StringIO()))
    assert result.final["loss"] < result.base["loss"]
    assert "optim: adamw_8bit" in (result.directory / "config.yaml").read_text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pages move between a GPU and its host")
@pytest.mark.parametrize(("paged", "plain"), [("paged_adamw_8bit", "adamw_8bit"), ("paged_adamw_32bit", "adamw_torch")])
def test_pages_on_a_gpu(paged, plain, tmp_path):
    """Where its moments lie changes nothing that an optimizer does, nor what a resumed training does."""

    def trained(name, resume=None):
        model = wide(512)  # bitsandbytes pages moments of more than 100,000 numbers
        steps = {"max_steps": 4, "save_steps": 2}
        return train(tmp_path / name, name, model=model, resume=resume, use_cpu=False, **steps)

    whole, other = trained(paged), trained(plain)
    again = trained(paged, str(tmp_path / paged / "checkpoint-2"))
    for t in (whole, again):
        assert all(state["state1"].is_paged for state in t.run._driver.ridden.state.values())
    assert losses(whole) == pytest.approx(losses(other), rel=1e-3)
    assert losses(again) == losses(whole)
    assert same(tensors(again.run), tensors(whole.run))
