"""LoRA in a plain PyTorch loop: a small Llama that knows children's stories learns Shakespeare.

python examples/loop.py          (a minute on two CPU cores; STEPS=30 for a first look)
"""

import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankshift as rs
from rankshift.train.bundled import model_path, text

STEPS = int(os.environ.get("STEPS", 200))
OUT = os.environ.get("OUT", "out/loop")
BATCH, LENGTH = 8, 128

tokenizer = AutoTokenizer.from_pretrained(model_path("babyllama"))
model = AutoModelForCausalLM.from_pretrained(model_path("babyllama"))

ids = torch.tensor(tokenizer(text("tinyshakespeare")[:300_000], add_special_tokens=False).input_ids)
train, held_out = ids[:-20_000], ids[-20_000:]


def batch(source, generator):
    starts = torch.randint(len(source) - LENGTH, (BATCH,), generator=generator)
    rows = torch.stack([source[s : s + LENGTH] for s in starts.tolist()])
    return {"input_ids": rows, "labels": rows}


@torch.no_grad()
def loss_on(source):
    model.eval()
    generator = torch.Generator().manual_seed(0)
    losses = [model(**batch(source, generator)).loss for _ in range(8)]
    model.train()
    return torch.stack(losses).mean().item()


run = rs.attach(model, rs.LoRA(rank=16, alpha=32))  # in place; the base is frozen
optimizer = run.optimizer(lr=3e-3)  # a torch.optim.Optimizer over what trains
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
print(run.summary())
print(f"held-out loss before {loss_on(held_out):.3f}")

generator = torch.Generator().manual_seed(1)
for step in range(STEPS):
    loss = model(**batch(train, generator)).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(f"step {step:4}  loss {loss.item():.3f}")

print(f"held-out loss after {loss_on(held_out):.3f}")
with run.disabled():
    print(f"the base, untouched: {loss_on(held_out):.3f}")

run.save(OUT)  # rs.load(model, OUT) takes it up again; run.export(…) writes a PEFT directory
