"""The first gradient is judged under DDP and FSDP2 as it is alone, on every rank, by the name of the layer."""

import multiprocessing
import socket

import pytest
import torch
import torch.distributed as dist
from test_event import Partial, batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rankshift as rs
from rankshift.core.errors import NoGradient


def judge(rank, port, engine, how, answers):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = Partial(how)
    run = rs.attach(model, rs.LoRA(rank=2))
    if engine == "ddp":
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    else:
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = run.optimizer(lr=1e-2)
    wrapped(batch(rank)).square().mean().backward()
    try:
        optimizer.step()
        answers.put("nothing")
    except NoGradient as error:
        answers.put(str(error))
    dist.destroy_process_group()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("how", "text"), [("unused", "second.A received no"), ("zero", "second.B is exactly zero")])
def test_a_layer_that_learns_nothing_is_named_on_every_rank(engine, how, text):
    torch.set_num_threads(1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    ranks = [fork.Process(target=judge, args=(rank, port, engine, how, answers)) for rank in range(2)]
    for p in ranks:
        p.start()
    found = [answers.get(timeout=60) for _ in ranks]
    for p in ranks:
        p.join(30)
        assert p.exitcode == 0
    assert all(text in answer for answer in found), found
