"""An unmodified TRL SFTTrainer trains an attached model, with ``optimizers=(run.optimizer(…), None)`` or with
``optimizer_cls_and_kwargs=run.optimizer_cls_and_kwargs(args)``."""

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import rankshift as rs
from rankshift.train.callback import RunCallback

trl = pytest.importorskip("trl")

TEXTS = ["abba abba baab", "baba abba", "abab abab abba", "aabb abba abba"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    characters = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>", "<pad>", "a", "b", " "])}
    core = Tokenizer(models.WordLevel(characters, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=32, bos_token_id=1, eos_token_id=2, pad_token_id=3,
        )
    )  # fmt: skip


def sft(out, tokenizer, method, by_arguments=False, **more):
    run = rs.attach(model(), method)
    settings = {
        "max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "logging_steps": 1,
        "max_length": 24, "use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_steps": 2,
    }  # fmt: skip
    args = trl.SFTConfig(str(out), **{**settings, **more})
    trainer = trl.SFTTrainer(
        model=run.model,
        args=args,
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
        **(
            {"optimizer_cls_and_kwargs": run.optimizer_cls_and_kwargs(args)}
            if by_arguments
            else {"optimizers": (run.optimizer(lr=3e-2), None)}
        ),
    )
    return run, trainer


def losses(trainer):
    return {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}


def tensors(run):
    return {name: t.clone() for name, t in run.state_dict()["tensors"].items()}


@pytest.mark.parametrize("method", [rs.LoRA(rank=2, dropout=0.1), rs.Full()], ids=["lora", "full"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_trains_saves_and_resumes_to_the_bit(tmp_path, tokenizer, method):
    run, whole = sft(tmp_path / "out", tokenizer, method)
    frozen = {name: p.clone() for name, p in run.model.named_parameters() if not p.requires_grad}
    whole.train()
    assert run.step == 6
    assert losses(whole)[6] < losses(whole)[1]
    assert all(torch.equal(p, frozen[name]) for name, p in run.model.named_parameters() if name in frozen)
    for step in (2, 4):
        again, resumed = sft(tmp_path / "out", tokenizer, method, save_strategy="no")
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert again.step == 6
        assert losses(resumed) == losses(whole)
        mine, theirs = tensors(again), tensors(run)
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[k], theirs[k]) for k in mine)
    run.save(tmp_path / "run")
    loaded = rs.load(model(), tmp_path / "run")
    assert all(torch.equal(a, b) for a, b in zip(tensors(loaded).values(), tensors(run).values(), strict=True))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_sft_with_the_numbers_of_its_arguments(tmp_path, tokenizer):
    method, rates = rs.GaLore(rank=4, every=2, transport="square"), {"learning_rate": 3e-2, "weight_decay": 0.1}
    run, whole = sft(tmp_path / "out", tokenizer, method, by_arguments=True, **rates)
    whole.train()
    assert losses(whole)[6] < losses(whole)[1]
    again, resumed = sft(tmp_path / "out", tokenizer, method, by_arguments=True, save_strategy="no", **rates)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert (again.step, losses(resumed)) == (6, losses(whole))
    mine, theirs = dict(again.model.named_parameters()), dict(run.model.named_parameters())
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_what_is_logged_of_subspaces(tmp_path, tokenizer):
    run, trainer = sft(tmp_path, tokenizer, rs.GaLore(rank=4, every=3), by_arguments=True, save_strategy="no")
    trainer.add_callback(RunCallback(run, trainer, heat_map=tmp_path / "subspaces.png"))
    trainer.train()
    log = trainer.state.log_history
    own = "mean_token_accuracy"  # what TRL's log adds
    assert sum(own in entry for entry in log) == sum("loss" in entry for entry in log) == 6
    assert [entry["subspace_rank"] for entry in log if "subspace_rank" in entry] == [4.0] * 6
    assert {name for entry in log for name in entry if name.startswith("subspace_rank/")} == {
        f"subspace_rank/{name}" for name in run.subspaces
    }
    assert (tmp_path / "subspaces.png").exists()
