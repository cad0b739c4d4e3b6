"""rs.Trainer on two processes: DDP through phases, FSDP2, resume, and Ctrl-C on one of them."""

import inspect
import multiprocessing
import os
import signal
import socket
import traceback

import pytest
import torch
import torch.distributed as dist
import transformers
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from test_trainer import Interrupt, ctrl_c, ladder, losses, same, tensors, trainer

import rankshift as rs

STEPS = 8
ENGINES = {
    "ddp": {},
    "fsdp2": {
        "fsdp": True,
        "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
    },
}
climbing = ladder  # the fixture, under a name that pytest finds here


def _rank(rank, port, folder, job, args):
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    try:
        answer = job(*args)
    except BaseException:
        answer = traceback.format_exc()
    torch.save(answer, f"{folder}/answer-{rank}")
    os._exit(0)  # no clean-up of what the parent owns


def on_two(tmp_path, job, *args):
    """``job`` on two processes forked from this one, which has imported everything already."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    ranks = [fork.Process(target=_rank, args=(rank, port, tmp_path, job, args)) for rank in range(2)]
    for p in ranks:
        p.start()
    for p in ranks:
        p.join(100)
    hung = [p for p in ranks if p.is_alive()]
    for p in hung:
        p.kill()
    assert not hung
    answers = [torch.load(tmp_path / f"answer-{rank}", weights_only=False) for rank in range(2)]
    for answer in answers:
        assert not isinstance(answer, str), answer
    return answers


class OnCPU(rs.Trainer):
    """accelerate knows FSDP2 on accelerators only; with a CPU mesh it runs the same code."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fsdp_plugin_args is not None:
            plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.accelerator.state.distributed_type = DistributedType.FSDP
            self.accelerator.state.fsdp_plugin = plugin
            self.is_fsdp_enabled = True


def train(out, method, engine, resume=None, callbacks=None, **more):
    t = trainer(out, method, callbacks, cls=OnCPU, per_device_train_batch_size=1, **ENGINES[engine], **more)
    t.train(resume_from_checkpoint=resume)
    wrapper = type(t.model_wrapped).__name__
    sharded = any(hasattr(p, "to_local") for p in t.model.parameters())
    return {"losses": losses(t), "tensors": tensors(t.run), "step": t.run.step, "wrapper": wrapper, "sharded": sharded}


def train_and_resume(out, method, engine, at):
    first = train(out, method, engine)
    dist.barrier()
    second = train(out, method, engine, resume=str(out / f"checkpoint-{at}"), save_strategy="no")
    return first, second


@pytest.mark.parametrize(("engine", "at", "kind"), [("ddp", 4, ""), ("fsdp2", 3, ""), ("fsdp2", 5, "subspaces")])
def test_two_processes_agree_and_resume_to_the_bit(tmp_path, climbing, engine, at, kind):
    if engine == "ddp" and 'type != "cpu"' not in inspect.getsource(transformers.Trainer._load_optimizer_and_scheduler):
        pytest.skip("this transformers cannot load an optimizer on several CPU processes (map_location cpu:0)")
    method = climbing() if engine == "ddp" else rs.LoRA(rank=2)
    if kind:
        method = rs.AdaRankGrad(rank=6, every=3, earliest=1)
    (one, resumed), (two, _) = on_two(tmp_path, train_and_resume, tmp_path / "out", method, engine, at)
    assert one["wrapper"] == ("DistributedDataParallel" if engine == "ddp" else "FSDPLlamaForCausalLM")
    assert one["sharded"] == (engine == "fsdp2")
    assert one["step"] == STEPS
    assert one["losses"] == two["losses"]
    assert same(one["tensors"], two["tensors"])
    assert one["losses"] == resumed["losses"]
    assert same(one["tensors"], resumed["tensors"])
    names = {f.name for f in (tmp_path / "out" / f"checkpoint-{at}").rglob("*")}
    assert not any("model" in name for name in names), names


def interrupted(out):
    mine = [Interrupt("on_substep_end", ctrl_c)] if os.environ["RANK"] == "1" else []
    try:
        train(out, rs.LoRA(rank=2), "ddp", callbacks=mine, save_strategy="no")
    except SystemExit as left:
        return {"code": left.code, "handler": signal.getsignal(signal.SIGINT) is signal.default_int_handler}
    return {"code": None}


def test_ctrl_c_on_one_stops_both_at_the_same_step(tmp_path):
    answers = on_two(tmp_path, interrupted, tmp_path / "out")
    assert answers == [{"code": 130, "handler": True}] * 2
    assert [f.name for f in (tmp_path / "out").iterdir()] == ["checkpoint-4"]


def evaluated_first(out):
    t = trainer(out, method=rs.LoRA(rank=2), ddp_backend="gloo", save_strategy="no", max_steps=2)
    t.evaluate()
    t.train()
    return type(t.model_wrapped).__name__, tensors(t.run)


def test_an_evaluation_before_training_does_not_keep_ddp_away(tmp_path):
    (wrapper, one), (_, other) = on_two(tmp_path, evaluated_first, tmp_path / "out")
    assert wrapper == "DistributedDataParallel"
    assert same(one, other)
