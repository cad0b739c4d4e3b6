"""One of two processes that attach EVA to the same model on data of their own; light, because each imports it anew."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import rankshift as rs


def main(rank: int, store: str, out: Any) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 4))
    torch.manual_seed(1 + rank)
    batches = [torch.randn(40, 20) * (1 + rank * torch.arange(20)) for _ in range(2)]
    run = rs.attach(model, rs.LoRA(rank=2, init="eva"), data=batches)
    out.put((rank, {n: a.A.detach().tolist() for n, a in run.adapter().items()}))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
