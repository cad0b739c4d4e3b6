"""rs.Trainer: transformers' Trainer, given a method. Stop it with Ctrl-C and start it again: it goes on to the bit.

python examples/hf_trainer.py    (a minute on two CPU cores; STEPS=30 for a first look)
"""

import os
from pathlib import Path

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

import rankshift as rs
from rankshift.train.bundled import model_path, text

STEPS = int(os.environ.get("STEPS", 200))
OUT = os.environ.get("OUT", "out/hf_trainer")
LENGTH = 128

tokenizer = AutoTokenizer.from_pretrained(model_path("babyllama"))
model = AutoModelForCausalLM.from_pretrained(model_path("babyllama"))

ids = tokenizer(text("tinyshakespeare")[:300_000], add_special_tokens=False).input_ids
rows = [ids[i : i + LENGTH] for i in range(0, len(ids) - LENGTH, LENGTH)]
data = Dataset.from_dict({"input_ids": rows, "labels": rows}).train_test_split(64, shuffle=False)

trainer = rs.Trainer(
    model=model,
    method=rs.LoRA(rank=16, alpha=32),  # the one line that is not transformers' own
    args=TrainingArguments(
        OUT,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_steps=50,
        save_total_limit=2,
        report_to=[],
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
)

before = trainer.evaluate()["eval_loss"]
trainer.train(resume_from_checkpoint="last" if any(Path(OUT).glob("checkpoint-*")) else None)
print(f"held-out loss {before:.3f} → {trainer.evaluate()['eval_loss']:.3f}")
trainer.run.export(f"{OUT}/peft", format="peft")  # PeftModel.from_pretrained(base, …) loads it
