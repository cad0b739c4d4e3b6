"""The first gradient is judged under DDP and FSDP2 as it is alone, on every rank, by the name of the layer."""

import pytest
import torch.distributed as dist
from test_event import Partial, batch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import rankshift as rs
from laws.pool import Pool
from rankshift.core.errors import NoGradient


def judge(engine, how):
    """What the first update says on this rank."""
    model = Partial(how)
    run = rs.attach(model, rs.LoRA(rank=2))
    if engine == "ddp":
        wrapped = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)
    else:
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = run.optimizer(lr=1e-2)
    wrapped(batch(dist.get_rank())).square().mean().backward()
    try:
        optimizer.step()
        return "nothing"
    except NoGradient as error:
        return str(error)


@pytest.fixture(scope="module")
def pool():
    """Two ranks."""
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("how", "text"), [("unused", "second.A received no"), ("zero", "second.B is exactly zero")])
def test_a_layer_that_learns_nothing_is_named_on_every_rank(engine, how, text, pool):
    found = pool.run(judge, engine, how)
    assert all(text in answer for answer in found), found
