"""When blocks run by graphs: a recorder stands in for the GPU's, over a block that is simple enough to be replayed."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rankshift as rs
from rankshift.lower.graphs import SEEN, Tape


class Replayed:
    """Work that is done again into the memory of its first results."""

    def __init__(self, work: Callable[[], Any], results: list[Tensor | None]):
        self.work, self.results, self.times = work, results, 0

    def replay(self) -> None:
        self.times += 1
        with torch.enable_grad():
            again = _flat(self.work())
        for result, new in zip(self.results, again, strict=True):
            if result is not None and new is not None:
                result.data.copy_(new)


class Here:
    """Records on the CPU. A backward is asked of a graph that must still be there: nothing may free it."""

    def record(self, work: Callable[[], Any]) -> tuple[Replayed, Any]:
        grad = torch.autograd.grad

        def kept(*args: Any, **words: Any) -> Any:
            return grad(*args, **words, retain_graph=True)

        def kept_work() -> Any:
            torch.autograd.grad = kept
            try:
                return work()
            finally:
                torch.autograd.grad = grad

        with torch.enable_grad():
            result = kept_work()
        return Replayed(kept_work, _flat(result)), result


def _flat(found: Any) -> list[Tensor | None]:
    return list(found) if isinstance(found, tuple) else [found]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, dtype=torch.float64))

    def work(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return x * self.weight * cos + sin  # keeps what the graph reads, and nothing that it computes


class Model(nn.Module):
    """Blocks one after the other, with graphs or without."""

    def __init__(self, tape: Tape | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.tape = tape
        self.by_graph: list[bool] = []

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, state: Any = 0, only: tuple[int, ...] = (0, 1, 2)) -> Tensor:
        self.by_graph = []
        for index, block in enumerate(self.blocks):
            if index not in only:
                continue
            y = None
            if self.tape is not None:
                y = self.tape.run(index, block, x, (cos, sin), state, block.work)
            self.by_graph.append(y is not None)
            x = block.work(x, cos, sin) if y is None else y
        return x


def pair() -> tuple[Model, Model]:
    return Model(Tape(3, Here)), Model(None)


def same(a: Model, b: Model, rows: int = 2, seed: int = 0, **words: Any) -> bool:
    """A forward and backward of both; whether the first went by graphs."""
    torch.manual_seed(seed)
    x = torch.randn(rows, 4, dtype=torch.float64, requires_grad=True)
    cos, sin = torch.randn(rows, 4, dtype=torch.float64), torch.randn(rows, 4, dtype=torch.float64)
    found = []
    for model in (a, b):
        x.grad = None
        model.zero_grad()
        y = model(x, cos, sin, **words)
        y.pow(2).sum().backward()
        found.append((y.detach().clone(), x.grad.clone(), [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    return all(a.by_graph)


def test_steps_by_graphs_are_those_without_them() -> None:
    a, b = pair()
    assert [same(a, b, seed=i) for i in range(SEEN + 3)] == [False] * SEEN + [True] * 3
    with torch.no_grad():  # an update
        for model in (a, b):
            for p in model.parameters():
                p.data.mul_(0.9)  # past the counter that the recorder here heeds
    assert same(a, b, seed=9)


def test_another_shape_runs_by_itself_until_it_stays() -> None:
    a, b = pair()
    for i in range(SEEN + 1):
        same(a, b, seed=i)
    assert not same(a, b, rows=3)
    assert same(a, b)  # what was captured was not forgotten
    assert [same(a, b, rows=3, seed=i) for i in range(SEEN + 1)] == [False] * SEEN + [True]
    assert not same(a, b)


def test_a_tensor_that_was_exchanged_is_noticed() -> None:
    a, b = pair()
    for i in range(SEEN + 1):
        same(a, b, seed=i)
    for model in (a, b):
        model.blocks[1].weight = nn.Parameter(torch.ones(4, dtype=torch.float64))
    assert not same(a, b)
    assert a.by_graph == [True, False, False]
    for model in (a, b):
        model.blocks[1].weight.requires_grad_(True)
    assert [same(a, b, seed=i) for i in range(SEEN + 1)] == [False] * SEEN + [True]


def test_another_state_is_noticed() -> None:
    a, b = pair()
    for i in range(SEEN + 1):
        same(a, b, seed=i)
    assert not same(a, b, state=1)


def test_a_forward_whose_backward_is_not_over_is_left_alone() -> None:
    a, b = pair()
    for i in range(SEEN + 1):
        same(a, b, seed=i)
    torch.manual_seed(3)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    tables = torch.randn(2, 2, 4, dtype=torch.float64).unbind()
    first = a(x, *tables)
    assert all(a.by_graph)
    second = a(2 * x, *tables)
    assert not any(a.by_graph)
    grads = torch.autograd.grad(first.sum() + second.sum(), [x, *a.parameters()])
    wanted = torch.autograd.grad(b(x, *tables).sum() + b(2 * x, *tables).sum(), [x, *b.parameters()])
    torch.testing.assert_close(grads, wanted, rtol=1e-12, atol=1e-12)
    assert same(a, b)
    a(x, *tables)  # dropped without a backward
    assert same(a, b)


def test_a_second_backward_is_an_error() -> None:
    a, b = pair()
    for i in range(SEEN + 1):
        same(a, b, seed=i)
    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    y = a(x, torch.ones(2, 4, dtype=torch.float64), torch.ones(2, 4, dtype=torch.float64)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="graphs=False"):
        y.backward()


def test_blocks_out_of_turn_are_never_captured() -> None:
    a, _ = pair()
    for i in range(3 * SEEN):
        torch.manual_seed(i)
        x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
        one = torch.ones(2, 4, dtype=torch.float64)
        a(x, one, one, only=(0, 2)).sum().backward()
        assert a.by_graph[1] is False
    assert not a.tape.captured  # type: ignore[union-attr]


def test_a_copy_has_no_graphs_yet() -> None:
    a, b = pair()
    for i in range(SEEN + 1):
        same(a, b, seed=i)
    copied = copy.deepcopy(a)
    assert not copied.tape.captured  # type: ignore[union-attr]
    assert not pickle.loads(pickle.dumps(a.tape)).captured
    assert not same(copied, b)


class OnGPU:
    """As much of a tensor as is asked."""

    is_cuda = True


def test_what_keeps_a_block_from_its_graph() -> None:
    from lower_models import llama as tiny
    from transformers import DynamicCache

    from rankshift.lower import lower
    from rankshift.lower.llama import _ungraphed

    model = tiny()
    model.requires_grad_(False)
    report = lower(model, graphs=True)
    layer, x = model.model.layers[0], OnGPU()
    empty, filled = DynamicCache(config=model.config), DynamicCache(config=model.config)
    filled.update(torch.zeros(1, 2, 3, 4), torch.zeros(1, 2, 3, 4), layer.self_attn.layer_idx)
    assert _ungraphed(layer, x, None, None, {}) is None
    assert _ungraphed(layer, x, None, empty, {"num_items_in_batch": 3, "other": None}) is None
    assert "GPU" in _ungraphed(layer, torch.zeros(1), None, None, {})
    assert "mask" in _ungraphed(layer, x, torch.ones(1), None, {})
    assert "earlier" in _ungraphed(layer, x, None, filled, {})
    assert "cu_seq_lens_q is given" in _ungraphed(layer, x, None, None, {"cu_seq_lens_q": torch.ones(1)})
    hook = layer.register_forward_hook(lambda *_: None)
    assert "hooked" in _ungraphed(layer, x, None, None, {})
    hook.remove()
    layer.self_attn.attention_dropout = 0.1
    assert "dropout" in _ungraphed(layer, x, None, None, {})
    layer.self_attn.attention_dropout = 0.0
    model.config._attn_implementation = "flash_attention_2"
    assert "positions" in _ungraphed(layer, x, None, None, {})
    model.config._attn_implementation = "sdpa"
    model.train()
    ids = torch.randint(0, 30, (1, 6))
    model(inputs_embeds=model.get_input_embeddings()(ids).requires_grad_(), labels=ids).loss.backward()
    assert "not by a CUDA graph (×2): the model is not on a GPU" in str(report)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")
@pytest.mark.parametrize(
    "method", [rs.LoRA(rank=16), rs.LoRA(rank=16, dora=True), rs.PaCA(rank=16), rs.VeRA(rank=64), rs.SoRA(rank=8)]
)
def test_training_by_graphs_on_a_gpu_is_training_without(method: rs.Method) -> None:
    """To the bit: they are the same kernels. Over two forwards an update, and shapes that change."""
    config = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    )  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    shapes = [(2, 128)] * 6 + [(2, 96)] * 3 + [(2, 128)] * 3
    batches = [torch.randint(0, 512, shape, generator=draw).cuda() for shape in shapes]

    def trained(graphs: bool) -> tuple[list[float], list[Tensor]]:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda().train()
        run = rs.attach(model, method, total_steps=20)
        report, optimizer = run.lower(graphs=graphs), run.optimizer(lr=1e-3)
        losses = []
        for ids in batches:
            for part in (ids, ids.flip(0)):
                loss = model(input_ids=part, labels=part).loss
                loss.backward()
                losses.append(float(loss))
            optimizer.step()
            optimizer.zero_grad()
        assert "not by a CUDA graph" not in str(report)
        return losses, [p.detach().clone() for _, p in run.trainable()]

    torch.testing.assert_close(trained(True), trained(False), rtol=0, atol=0)
