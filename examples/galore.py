"""GaLore in a plain PyTorch loop: every weight of a small Llama trains, Adam's moments in a subspace of each gradient.

python examples/galore.py          (a minute on two CPU cores; STEPS=30 for a first look)
"""

import os

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankshift as rs
from rankshift.train.bundled import model_path, text
from rankshift.train.heat_map import heat_map

STEPS = int(os.environ.get("STEPS", 200))
OUT = os.environ.get("OUT", "out/galore")
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


# rs.AdaRankGrad(rank=32, energy=0.9, earliest=10, every=50) lets each layer's rank follow its gradient
run = rs.attach(model, rs.GaLore(rank=32, every=25))
optimizer = run.optimizer(lr=3e-3)  # projected weights see a quarter of it: scale=0.25
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
print(run.summary())
print(f"held-out loss before {loss_on(held_out):.3f}")

generator, tables = torch.Generator().manual_seed(1), []
for step in range(STEPS):
    loss = model(**batch(train, generator)).loss
    loss.backward()
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    if step % 5 == 0:
        tables.append((run.step, run.subspace_table()))
    if step % 20 == 0:
        means = run.metrics()
        print(f"step {step:4}  loss {loss.item():.3f}  captured {means['subspace_energy']:.0%} of the gradients")

print(f"held-out loss after {loss_on(held_out):.3f}")
print(run.subspace_table())

os.makedirs(OUT, exist_ok=True)
print(heat_map(f"{OUT}/subspaces.png", tables, "rank and captured energy"))
run.export(f"{OUT}/model", format="merged")  # a plain transformers model
