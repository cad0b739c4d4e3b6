"""TRL's SFTTrainer as it is, fed with an attached model.

python examples/trl_sft.py       (a minute on two CPU cores; STEPS=30 for a first look; needs pip install trl)
"""

import os

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import rankshift as rs
from rankshift.train.bundled import model_path, text

STEPS = int(os.environ.get("STEPS", 200))
OUT = os.environ.get("OUT", "out/trl_sft")

tokenizer = AutoTokenizer.from_pretrained(model_path("babyllama"))
tokenizer.pad_token = tokenizer.eos_token = "<s>"  # the story model knows no other special character
model = AutoModelForCausalLM.from_pretrained(model_path("babyllama"))

speeches = [speech for speech in text("tinyshakespeare")[:300_000].split("\n\n") if 40 < len(speech) < 200]
data = Dataset.from_dict({"text": speeches}).train_test_split(64, shuffle=False)

run = rs.attach(model, rs.LoRA(rank=16, alpha=32))
optimizer = run.optimizer(lr=3e-3)  # carries the method: its tensors, their rates, its events

trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        OUT,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        max_length=200,
        lr_scheduler_type="cosine",
        logging_steps=20,
        save_strategy="no",
        bf16=False,
        report_to=[],
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=tokenizer,
    optimizers=(optimizer, None),  # the line through which TRL trains the method; None: TRL's own schedule
)

before = trainer.evaluate()["eval_loss"]
trainer.train()
print(f"held-out loss {before:.3f} → {trainer.evaluate()['eval_loss']:.3f}")
run.save(f"{OUT}/run")
