"""PC-LoRA's distillation inside trainers: scaled as the task's loss is, on one process and two, to a smaller model."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_trainer import arguments, base, data, losses, same, tensors, trainer
from test_trainer_distributed import on_two
from transformers import AutoTokenizer, Trainer

import rankshift as rs

METHOD = rs.PCLoRA(rank=2, decay_end=0.5, task_weight=0.3)


def features(model, inputs, names):
    found = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda m, a, y, name=name: found.__setitem__(name, y))
        for name in names
    ]
    output = model(**inputs)
    for hook in hooks:
        hook.remove()
    return found, output


@pytest.mark.parametrize("how", ["model's loss", "smoothed", "own", "sum by micro-batch"])
def test_the_trainer_adds_what_the_method_adds_scaled_as_the_task_is(tmp_path, how):
    """α·task + (1 − α)·KD, a mean over micro-batches, however transformers divides the task's own loss."""
    more, rest = {}, {}
    if how == "smoothed":
        more = {"label_smoothing_factor": 0.1}
    if how == "own":
        rest = {"compute_loss_func": lambda out, labels, num_items_in_batch=None: out.logits.square().sum() / 1000}
    model = base(0.0)
    teacher = copy.deepcopy(model).eval()
    mine = trainer(tmp_path, METHOD, model=model, rest=rest, **more)
    for adapter in mine.run.adapter().values():
        torch.nn.init.normal_(adapter.B, std=0.3, generator=torch.Generator().manual_seed(1))
        adapter.fade(0.4)
    model.train()
    inputs = {key: torch.stack([row[key] for row in data(2)]) for key in ("input_ids", "labels")}
    items = None if how == "sum by micro-batch" else torch.tensor(50)  # of the whole update
    mine.current_gradient_accumulation_steps = 2
    kept = dict(inputs)
    loss, outputs = mine.compute_loss(model, inputs, return_outputs=True, num_items_in_batch=items)
    assert inputs.keys() == kept.keys(), "the batch is the caller's"
    task, _ = Trainer.compute_loss(mine, model, dict(inputs), True, items)
    model.eval()
    student, again = features(model, inputs, mine.run.sites)
    with torch.no_grad():
        wanted, _ = features(teacher, inputs, mine.run.sites)
    kd = sum(F.mse_loss(student[name], wanted[name]) for name in wanted) / len(wanted)
    parts = 1 if how == "sum by micro-batch" else 2  # there the trainer divides by it afterwards
    assert torch.allclose(loss, 0.3 * task + 0.7 * kd / parts, atol=1e-6)
    assert kd > 0.01
    assert torch.allclose(outputs.logits, again.logits, atol=1e-6)


def test_evaluation_sees_the_loss_of_the_task(tmp_path):
    mine = trainer(tmp_path, METHOD)
    inputs = {key: torch.stack([row[key] for row in data(2)]) for key in ("input_ids", "labels")}
    mine.model.eval()
    assert mine.compute_loss(mine.model, inputs) == mine.model(**inputs).loss


def test_a_method_that_adds_nothing_has_the_losses_of_transformers(tmp_path):
    """Bit for bit, with seven micro-batches: 7·x/7 is not x."""
    method = rs.LoRA(rank=2, dropout=0.1)

    class Plain(rs.Trainer):
        compute_loss = Trainer.compute_loss

    ends = []
    for cls in (Plain, rs.Trainer):
        one = trainer(tmp_path, method, cls=cls, gradient_accumulation_steps=7, save_strategy="no", max_steps=3)
        one.train()
        ends.append((losses(one), tensors(one.run)))
    assert ends[0][0] == ends[1][0]
    assert same(ends[0][1], ends[1][1])


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_trainer_ends_in_a_smaller_model_and_resumes_to_the_bit(tmp_path):
    more = {"gradient_checkpointing": True}
    whole = trainer(tmp_path / "out", METHOD, **more)
    whole.train()
    assert whole.run.total_steps == 8
    logged = [entry["lambda"] for entry in whole.state.log_history if "lambda" in entry]
    assert logged == [0.75, 0.5, 0.25, 0, 0, 0, 0, 0]
    resumed = trainer(tmp_path / "out", METHOD, save_strategy="no", **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert same(tensors(resumed.run), tensors(whole.run))
    before = sum(p.numel() for p in base().parameters())
    model = whole.run.compress()
    assert sum(p.numel() for p in model.parameters()) < before / 1.4
    ids = data(1)[0]["input_ids"][None]
    assert torch.isfinite(model.eval()(ids).logits).all()


def test_features_are_compared_in_the_precision_of_autocast():
    """At λ = 1 student and teacher are one function in bf16 too, so nothing is left to distil."""
    model = base(0.0)
    run = rs.attach(model, rs.PCLoRA(rank=2, task_weight=0.0), total_steps=4)
    inputs = {key: torch.stack([row[key] for row in data(2)]) for key in ("input_ids", "labels")}
    with torch.autocast("cpu", torch.bfloat16):
        assert run.loss(model.train()(**inputs).loss, **inputs) == 0


def test_an_unmodified_trainer_is_stopped_at_its_first_update(tmp_path):
    run = rs.attach(base(), METHOD, total_steps=8)
    plain = Trainer(run.model, arguments(tmp_path), train_dataset=data(), optimizers=(run.optimizer(), None))
    with pytest.raises(rs.errors.TrainingError, match=r"run\.loss"):
        plain.train()


def _two(folder):
    mine = trainer(folder, METHOD, model=base(0.0), save_strategy="no")
    mine.train()
    return tensors(mine.run)


def test_two_processes_agree(tmp_path):
    first, second = on_two(tmp_path, _two, tmp_path)
    assert same(first, second)
    assert all(torch.isfinite(t).all() for t in first.values())


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_documented_trainer_of_trl_distils(tmp_path, tiny_llama):
    """The lines of the documentation page, as they stand there, between their fences."""
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    page = (Path(__file__).parents[2] / "docs" / "pc-lora.md").read_text(encoding="utf-8")
    code = next(part for part in page.split("```") if "class Distilling" in part).removeprefix("python\n")
    run = rs.attach(base(0.0), METHOD, total_steps=2)
    here = {"trl": trl, "run": run}
    exec(code, here)
    rows = [{"input_ids": row["input_ids"].tolist()} for row in data(8)]
    args = trl.SFTConfig(
        str(tmp_path), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2, use_cpu=True,
        bf16=False, report_to=[], disable_tqdm=True, save_strategy="no", logging_steps=1, max_length=12,
    )  # fmt: skip
    sft = here["Distilling"](
        run.model, args, train_dataset=Dataset.from_list(rows), optimizers=(run.optimizer(lr=1e-2), None),
        processing_class=AutoTokenizer.from_pretrained(tiny_llama),
    )  # fmt: skip
    sft.train()
    assert run.step == 2
    assert all(adapter.faded for adapter in run.adapter().values())
