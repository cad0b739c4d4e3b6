"""LoRA layers that read one input compute together what each would compute alone, whatever is done to the model."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rankshift as rs
from laws.pool import Pool
from rankshift.core import shard
from rankshift.core.kin import kin
from rankshift.methods import lora_siblings
from rankshift.methods.lora import LoRALayer
from rankshift.methods.lora_siblings import Sibling, Siblings

D, WIDTH = torch.float64, 12
DOWN, TRACED = lora_siblings.down, lora_siblings._traced


class Attention(nn.Module):
    """q, k and v of one input, or k and v of another; v only where it is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 8, bias=False)
        self.v_proj, self.o_proj = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
        self.wanted = True

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        other = x if other is None else other
        q, k = self.q_proj(x), self.k_proj(other)
        v = self.v_proj(other) if self.wanted else k
        return self.o_proj((q @ k.mT).softmax(-1) @ v)


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(WIDTH, 20), nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2, self.attn, self.mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Attention(), MLP()

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), other)
        return x + self.mlp(self.norm2(x))


class Model(nn.Module):
    """Two blocks; ``how`` runs each."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.how: Callable[..., Tensor] = lambda block, *inputs: block(*inputs)

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = self.how(block, x, other)
        return x


def model(dtype: torch.dtype = D) -> Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Model().to(dtype)


def stir(run: rs.Run, name: str = "default", seed: int = 2) -> None:
    """Give every trained tensor of an adapter values of its own, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in run.adapter(name).values():
            for parameter in adapter.parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=D).to(parameter)


def groups(run: rs.Run, name: str = "default") -> list[Siblings]:
    found = [a.siblings for a in run.adapter(name).values() if isinstance(a, Sibling) and a.siblings is not None]
    return list({id(group): group for group in found}.values())


def apart(run: rs.Run) -> rs.Run:
    """The run with every layer computing alone."""
    for name in run.adapters:
        for group in groups(run, name):
            for member in group.members:
                member.siblings = None
    return run


def attached(method: rs.Method | None = None, alone: bool = False, dtype: torch.dtype = D) -> tuple[Model, rs.Run]:
    net = model(dtype)
    run = rs.attach(net, method or rs.LoRA(rank=3, alpha=4, rank_pattern={"k_proj": 2}), total_steps=8)
    stir(run)
    return net, apart(run) if alone else run


def inputs(seed: int = 0, dtype: torch.dtype = D) -> Tensor:
    return torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=D).to(dtype)


def results(net: nn.Module, run: rs.Run, *given: Tensor, grad: bool = True) -> list[Tensor | None]:
    """Output and all gradients of a forward and backward."""
    net.zero_grad()
    xs = [x.detach().clone().requires_grad_(grad) for x in given]
    y = net(*xs)
    y.square().sum().backward()
    gradients = [p.grad for _, p in run.trainable()]
    return [y.detach(), *(x.grad for x in xs), *(None if g is None else g.clone() for g in gradients)]


def same(got: list[Tensor | None], want: list[Tensor | None], tolerance: float = 1e-12) -> None:
    """Equal to rounding, which is that of the largest numbers."""
    assert [g is None for g in got] == [w is None for w in want]
    pairs = [(a, b) for a, b in zip(got, want, strict=True) if a is not None and b is not None]
    size = max(float(b.abs().max()) for _, b in pairs)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance * max(size, 1.0))


def empty(*runs: rs.Run) -> bool:
    """Whether no tensor is left behind."""
    return all(group.round is None for run in runs for group in groups(run))


@pytest.fixture(name="downs", autouse=True)
def _downs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers computed together, each time that some did. They do in eager mode, and in whatever order."""
    seen: list[int] = []

    def counted(x: Tensor, dtype: torch.dtype, factors: list[Tensor], *rest: Any) -> Any:
        seen.append(len(factors))
        return DOWN(x, dtype, factors, *rest)

    monkeypatch.setattr(lora_siblings, "down", counted)
    monkeypatch.setattr(lora_siblings, "choose", lambda *_, **__: ("f1", "b1s"))
    monkeypatch.setattr(lora_siblings, "_traced", lambda: "eager")
    return seen


@pytest.fixture(name="real")
def _real(downs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what the compiler traces shares, and nothing counts, which would be another guard in every step."""
    monkeypatch.setattr(lora_siblings, "down", DOWN)
    monkeypatch.setattr(lora_siblings, "_traced", TRACED)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


# ---- the same as alone

METHODS = {
    "lora": rs.LoRA(rank=3, alpha=4),
    "frozen-a": rs.LoRA(rank=3, train="B"),
    "frozen-b": rs.LoRA(rank=3, train="A", init="pissa"),
    "anchors": rs.LoRA(rank=2, init="olora"),
    "rslora": rs.LoRA(rank=3, scaling="rslora", rank_pattern={"q_proj": 5}),
    "biases": rs.LoRA(rank=3, bias="all", lora_bias=True),
    "sora": rs.SoRA(rank=3),
    "relora": rs.ReLoRA(rank=3, every=2),
    "switchlora": rs.SwitchLoRA(rank=3),
    "flat-lora": rs.FlatLoRA(rank=3),
    "one-block": rs.MELoRA(rank=3, blocks=1),
}


@pytest.mark.parametrize("name", METHODS)
def test_together_is_alone(name: str, downs: list[int]) -> None:
    (net, run), (other, lone) = attached(METHODS[name]), attached(METHODS[name], alone=True)
    assert len(groups(run)) == 4
    for grad in (True, False):
        downs.clear()
        got = results(net, run, inputs(), grad=grad)
        assert downs == [3, 2, 3, 2]
        same(got, results(other, lone, inputs(), grad=grad))
    assert empty(run)


@pytest.mark.parametrize("name", METHODS)
def test_training(name: str, downs: list[int]) -> None:
    """Events that write into factors, weights and gates between updates are seen."""
    ends = []
    for alone in (False, True):
        net, run = attached(METHODS[name], alone)
        optimizer, losses = run.optimizer(lr=1e-2, eps=1e-4), []
        for step in range(5):
            loss = (net(inputs(step)) - 1).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        ends.append([*losses, *(p.detach() for _, p in run.trainable())])
    assert downs == 5 * [3, 2, 3, 2]
    same(*ends, tolerance=1e-9)  # type: ignore[misc]


def test_it_is_the_plain_equation() -> None:
    net, run = attached()
    got = results(net, run, inputs())
    plain = model()
    leaves: dict[str, Tensor] = {}
    for name, adapter in run.adapter().items():
        A, B = (t.detach().clone().requires_grad_() for t in (adapter.A, adapter.B))
        leaves |= {f"{name}.A": A, f"{name}.B": B}
        layer = plain.get_submodule(name)
        layer.forward = lambda x, layer=layer, A=A, B=B, s=adapter.scale: (  # type: ignore[method-assign]
            nn.functional.linear(x, layer.weight + s * B @ A, layer.bias)
        )
    x = inputs().requires_grad_()
    y = plain(x)
    y.square().sum().backward()
    same(got, [y.detach(), x.grad, *(leaves[name].grad for name, _ in run.trainable())])


def test_some_of_a_row_and_one_alone(downs: list[int]) -> None:
    for targets, seen in ((("q_proj", "v_proj"), [2, 2]), (("q_proj", "down_proj"), []), (("up_proj",), [])):
        method = rs.LoRA(rank=3, targets=targets)
        (net, run), (other, lone) = attached(method), attached(method, alone=True)
        downs.clear()
        same(results(net, run, inputs()), results(other, lone, inputs()))
        assert downs == seen


@pytest.mark.parametrize("method", [rs.LoRA(rank=3, dora=True), rs.LoRA(rank=3, forward_order="f2"), rs.MELoRA(rank=4)])
def test_others_stay_alone(method: rs.Method, downs: list[int]) -> None:
    net, run = attached(method)
    results(net, run, inputs())
    assert not groups(run)
    assert not downs


def test_dropout_composes_each_layer_while_training(downs: list[int]) -> None:
    net, run = attached(rs.LoRA(rank=3, dropout=0.5))
    results(net.train(), run, inputs())
    assert not downs
    results(net.eval(), run, inputs())
    assert downs == [3, 2, 3, 2]


def test_a_sibling_that_composes_its_layer_keeps_the_others_alone(downs: list[int]) -> None:
    ends = []
    for alone in (False, True):
        net, run = attached(alone=alone)
        net.blocks[0].attn.k_proj.weight.requires_grad_(True)  # type: ignore[union-attr]
        ends.append([*results(net, run, inputs()), net.blocks[0].attn.k_proj.weight.grad])  # type: ignore[union-attr]
    same(*ends)
    assert downs == [2, 3, 2]


def test_autocast(downs: list[int]) -> None:
    """The input is cast once for all, and stays once for backward."""
    (net, run), (other, lone) = attached(dtype=torch.float32), attached(alone=True, dtype=torch.float32)
    ends = []
    for call, here in ((net, run), (other, lone)):
        with torch.autocast("cpu", torch.bfloat16):
            ends.append(results(call, here, inputs(dtype=torch.float32)))
    assert downs == [3, 2, 3, 2]
    same(*ends, tolerance=0.3)  # type: ignore[misc]
    assert ends[0][0].dtype == torch.float32  # type: ignore[union-attr]


def test_where_a_merged_order_is_cheaper_each_takes_it(downs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora_siblings, "choose", lambda b, n, m, *_, **__: ("f2" if m == 20 else "f1", "b1s"))
    net, run = attached()
    results(net, run, inputs())
    assert downs == [3, 3]


def test_values_of_bf16(downs: list[int]) -> None:
    (net, run), (other, lone) = attached(dtype=torch.bfloat16), attached(alone=True, dtype=torch.bfloat16)
    got, want = (results(n, r, inputs(dtype=torch.bfloat16)) for n, r in ((net, run), (other, lone)))
    assert downs == [3, 2, 3, 2]
    for a, b in zip(got, want, strict=True):
        assert a is not None
        assert b is not None
        assert a.dtype == b.dtype
        assert (a - b).norm() < 0.05 * b.norm()


# ---- what comes between


def trained(net: Model, run: rs.Run, *given: Tensor, count: int = 3) -> list[Tensor | None]:
    optimizer, found = run.optimizer(lr=1e-2, eps=1e-4), []
    for _ in range(count):
        found += results(net, run, *given)
        optimizer.step()
    return found


HOWS: dict[str, Callable[..., Tensor]] = {
    "plain": lambda block, *inputs: block(*inputs),
    "checkpoint": lambda block, *inputs: checkpoint(block, *inputs, use_reentrant=False),
}


@pytest.mark.parametrize("how", ["plain", "checkpoint", "broken"])
def test_in_eager_mode_nobody_shares(how: str, downs: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer has the bits that it has alone; also after an exception between siblings nothing is left behind."""
    monkeypatch.setattr(lora_siblings, "_traced", TRACED)
    ends = []
    for alone in (False, True):
        net, run = attached(alone=alone)
        net.how = HOWS["plain" if how == "broken" else how]
        if how == "broken":
            handle = net.blocks[0].attn.k_proj.register_forward_pre_hook(lambda *_: 1 / 0)  # type: ignore[union-attr]
            with pytest.raises(ZeroDivisionError):
                net(inputs())
            handle.remove()
            assert empty(run)
        ends.append(results(net, run, inputs()))
        assert alone or len(groups(run)) == 4
        assert empty(run)
    same(*ends, tolerance=0.0)  # type: ignore[misc]
    assert not downs


def plain_updates(net: Model, run: rs.Run, *given: Tensor) -> list[Tensor | None]:
    """Updates by torch's own optimizer, which does not mind a tensor without gradient."""
    optimizer, found = torch.optim.SGD([p for _, p in run.trainable()], lr=1e-3), []
    for _ in range(3):
        found += results(net, run, *given)
        optimizer.step()
    return found


def test_one_layer_twice(downs: list[int]) -> None:
    (net, run), (other, lone) = attached(), attached(alone=True)
    ends = []
    for each, here in ((net, run), (other, lone)):
        attn, x, u = each.blocks[0].attn, inputs().requires_grad_(), inputs(1).requires_grad_()
        both = attn(x) + attn(u)  # in turn
        mixed = attn.q_proj(x) + attn.q_proj(u) + attn.k_proj(u) + attn.k_proj(x) + attn.v_proj(x) + attn.q_proj(x)
        (both.sum() + mixed.square().sum()).backward()
        ends.append([both.detach(), mixed.detach(), x.grad, u.grad, *(p.grad for _, p in here.trainable())])
    same(*ends)  # type: ignore[misc]


@pytest.mark.parametrize("leaf", ["q_proj", "k_proj"])
@pytest.mark.parametrize("kind", ["input", "backward"])
def test_hooks_of_one_layer(leaf: str, kind: str) -> None:
    (net, run), (other, lone) = attached(), attached(alone=True)
    for each in (net, other):
        layer = getattr(each.blocks[0].attn, leaf)
        if kind == "input":
            layer.register_forward_pre_hook(lambda _, given: (given[0] * 2,))
        else:
            layer.register_full_backward_hook(lambda *_: None)
    same(trained(net, run, inputs()), trained(other, lone, inputs()), 1e-9)


def test_without_gradients_every_layer_computes_alone(downs: list[int]) -> None:
    net, run = attached()
    for block in (torch.no_grad(), torch.inference_mode()):
        with block:
            y = net(inputs())
    assert not downs
    torch.testing.assert_close(y.clone(), net(inputs()).detach())
    q = net.blocks[0].attn.q_proj  # type: ignore[union-attr]
    with torch.no_grad():
        q(inputs())
    assert empty(run)


def test_in_inference_mode_after_a_forward_with_gradients() -> None:
    net, run = attached()
    x = torch.zeros(0)
    with torch.inference_mode():
        x = inputs()
    net(inputs())
    with torch.no_grad():
        net(x)
    assert empty(run)


# ---- what runs do


def test_copies_and_pickles(downs: list[int]) -> None:
    """A copy's layers are siblings of one another and of nobody else; also one that is made between siblings."""
    net, run = attached()
    want = results(net, run, inputs())
    net.how = HOWS["plain"]
    held = net.blocks[0].attn.q_proj(inputs().requires_grad_())  # type: ignore[union-attr]
    assert not empty(run)
    del net.how
    buffer = io.BytesIO()
    torch.save(net, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(net), torch.load(buffer, weights_only=False)):
        twin.how = HOWS["plain"]
        layers = [m for m in twin.modules() if isinstance(m, LoRALayer)]
        mine = {id(layer) for layer in layers}
        assert all(id(m) in mine for layer in layers if layer.siblings for m in layer.siblings.members)
        with torch.no_grad():
            for layer in layers:
                layer.A.mul_(1)
        downs.clear()
        x = inputs().requires_grad_()
        y = twin(x)
        y.square().sum().backward()
        assert downs == [3, 2, 3, 2]
        leaves = dict(twin.named_parameters())
        names = [f"{n.rpartition('.')[0]}.adapters.default.{n.rpartition('.')[2]}" for n, _ in run.trainable()]
        same([y.detach(), x.grad, *(leaves[name].grad for name in names)], want)
    del held


def test_a_shallow_copy_of_a_layer_computes_alone(downs: list[int]) -> None:
    _, run = attached()
    layer = run.adapter()["blocks.0.attn.q_proj"]
    x = inputs()
    y = copy.copy(layer)(x)
    assert not downs
    torch.testing.assert_close(y, layer(x))
    assert downs == [3]


def test_switching_and_disabling() -> None:
    nets = []
    for alone in (False, True):
        net, run = attached(alone=alone)
        run.add("french", rs.LoRA(rank=2, init="gaussian"))
        stir(run, "french", seed=5)
        nets.append((net, apart(run) if alone else run))
    for active in (("default",), ("french",), ("default", "french"), ("french", "default"), ("default",)):
        ends = []
        for net, run in nets:
            run.use(*active)
            ends.append(results(net, run, inputs()))
            with run.disabled():
                assert torch.equal(net(inputs()), model()(inputs()))
            ends[-1] += results(net, run, inputs())
        same(*ends)  # type: ignore[misc]
        assert empty(nets[0][1])


def test_merging_shifting_and_loading(tmp_path: Any, downs: list[int]) -> None:
    net, run = attached()
    before = net(inputs()).detach()
    optimizer = run.optimizer(lr=1e-2)
    net(inputs()).sum().backward()
    optimizer.step()
    after = net(inputs()).detach()
    assert (after - before).abs().max() > 1e-4
    with run.merged():
        torch.testing.assert_close(net(inputs()), after)
    run.save(tmp_path / "run")
    fresh = model()
    loaded = rs.load(fresh, tmp_path / "run")
    assert len(groups(loaded)) == 4
    assert torch.equal(fresh(inputs()), after)
    run = run.shift(rs.LoRA(rank=2, init="gaussian"))
    torch.testing.assert_close(net(inputs()), after)
    assert len(groups(run)) == 4
    downs.clear()
    results(net, run, inputs())
    assert downs == [3, 2, 3, 2]
    torch.testing.assert_close(run.merge()(inputs()), after)


def test_what_a_phase_hands_on_has_siblings(downs: list[int]) -> None:
    net = model()
    run = rs.attach(net, rs.SoRA(rank=3, sparsity=(0.1, 0.2)), total_steps=4)
    optimizer = run.optimizer(lr=1e-2)
    while (method := run.due()) is None:
        net(inputs()).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    before = net(inputs()).detach()
    run = run.shift(method)
    assert len(groups(run)) == 4
    downs.clear()
    torch.testing.assert_close(net(inputs()).detach(), before)
    assert downs == [3, 2, 3, 2]


def test_a_run_that_resumes_has_the_same_bits() -> None:
    ends = []
    for cut in (None, 2):
        net, run = attached(dtype=torch.bfloat16)
        optimizer = run.optimizer(lr=1e-2)
        for step in range(4):
            if step == cut:
                states = copy.deepcopy((run.state_dict(), optimizer.state_dict()))
                net = model(torch.bfloat16)
                run = rs.restore(net, states[0])
                optimizer = run.optimizer(lr=1e-2)
                optimizer.load_state_dict(states[1])
            net(inputs(step, torch.bfloat16)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for _, p in run.trainable()])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# ---- the compiler


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("name", ["lora", "frozen-a", "biases"])
def test_compiled_it_is_one_graph(name: str, whole: bool, real: None) -> None:
    (net, run), (other, lone) = attached(METHODS[name]), attached(METHODS[name], alone=True)
    call = torch.compile(net, backend="aot_eager", fullgraph=True) if whole else net
    for block in () if whole else net.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    optimizer, second = run.optimizer(lr=1e-2, eps=1e-4), lone.optimizer(lr=1e-2, eps=1e-4)
    for step in range(4):
        same(results(call, run, inputs(step)), results(other, lone, inputs(step)), 1e-9)
        optimizer.step()
        second.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(groups(run)) == 4
    assert empty(run)


def test_compiled_around_checkpoints_every_layer_computes_alone(real: None) -> None:
    """What is recomputed is a graph inside the graph, out of which nothing can be written."""
    (net, run), (other, lone) = attached(), attached(alone=True)
    net.how = HOWS["checkpoint"]
    call = torch.compile(net, backend="aot_eager", fullgraph=True)
    for step in range(3):
        same(results(call, run, inputs(step)), results(other, lone, inputs(step)), 1e-9)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(
    ("kind", "how"), [("cross", "plain"), ("absent", "plain"), ("broken", "plain"), ("cross", "checkpoint")]
)
def test_compiled_with_a_wrong_guess_it_is_right(kind: str, how: str, real: None) -> None:
    given, ends = (inputs(), inputs(1)) if kind == "cross" else (inputs(),), []
    for alone in (False, True):
        net, run = attached(alone=alone)
        net.how = HOWS[how]
        for block in net.blocks:
            block.attn.wanted = kind != "absent"  # type: ignore[union-attr]
            if not alone:
                block.compile(backend="aot_eager", fullgraph=kind != "broken")
            if kind == "broken":
                block.attn.k_proj.register_forward_pre_hook(lambda *_: torch._dynamo.graph_break())  # type: ignore[union-attr]
        # the compiler makes zeros of a gradient that is none
        ends.append([torch.zeros(()) if t is None or not t.any() else t for t in plain_updates(net, run, *given)])
    same(*ends, tolerance=1e-10)  # type: ignore[misc]


def test_compiled_what_is_called_in_another_graph_is_alone(real: None) -> None:
    """Layers compiled one by one, and recomputed so, in any order and after any backward."""
    ends = []
    for alone in (False, True):
        net, run = attached(alone=alone)
        attn, found = net.blocks[0].attn, []
        for leaf in ("q_proj", "k_proj", "v_proj"):
            if not alone:
                getattr(attn, leaf).compile(backend="aot_eager", fullgraph=True)
        x = inputs()  # one and the same in all
        for order in (("q_proj", "k_proj", "v_proj"), ("k_proj", "q_proj", "v_proj"), ("v_proj", "k_proj", "q_proj")):
            net.zero_grad()
            for leaf in order:
                checkpoint(getattr(attn, leaf), x, use_reentrant=False).square().sum().backward()
            found += [torch.zeros(()) if p.grad is None else p.grad.clone() for _, p in run.trainable()]
            with torch.no_grad():
                for _, parameter in run.trainable():
                    parameter.mul_(0.9)
        ends.append(found)
    same(*ends)  # type: ignore[misc]


@pytest.mark.parametrize("how", ["plain", "checkpoint"])
def test_compiled_there_are_fewer_products(how: str, real: None) -> None:
    """One for each group in place of one for each of its layers; those of all layers where a checkpoint is inside."""
    counts = []
    for alone in (False, True):
        net, run = attached(alone=alone)
        net.how, net.blocks = HOWS[how], net.blocks[:1]
        products: list[str] = []

        def count(graph: torch.fx.GraphModule, _: Any, products: list[str] = products) -> torch.fx.GraphModule:
            products += [
                str(n.target) for n in graph.graph.nodes if str(n.target).startswith(("aten.mm", "aten.addmm"))
            ]
            return graph

        backend = aot_autograd(fw_compiler=count, bw_compiler=lambda graph, _: graph)
        results(torch.compile(net, backend=backend, fullgraph=True), run, inputs())
        counts.append(len(products))
    assert counts[1] - counts[0] == (2 + 1 if how == "plain" else 0)


# ---- names


def test_who_is_kin() -> None:
    def found(*leaves: str, parent: str = "a.0") -> list[list[str]]:
        return [[n.rpartition(".")[2] for n in row] for row in kin(f"{parent}.{leaf}" for leaf in leaves)]

    assert found("v_proj", "o_proj", "q_proj", "k_proj") == [["q_proj", "k_proj", "v_proj"]]
    assert found("q_proj", "v_proj", "gate_proj", "up_proj") == [["q_proj", "v_proj"], ["gate_proj", "up_proj"]]
    assert found("q_proj", "up_proj", "k_proj", parent="crossattention.self") == []
    assert found("query", "key", "value", parent="x.crossattention.self") == [["key", "value"]]
    assert found("q", "k", "v", parent="block.1.layer.1.EncDecAttention") == [["k", "v"]]
    assert kin(["a.q_proj", "b.k_proj"]) == []
    assert kin(["q", "k"]) == [["q", "k"]]


def small(kind: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A model of two layers, and a batch."""
    ids = torch.arange(12).reshape(2, 6)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = {"input_ids": ids, "labels": ids}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "vit":
            net = tf.ViTForImageClassification(tf.ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3))
            return net, {"pixel_values": torch.rand(2, 3, 8, 8), "labels": torch.tensor([0, 2])}
        if kind == "roberta":
            return tf.RobertaForMaskedLM(tf.RobertaConfig(**sizes, vocab_size=30, max_position_embeddings=20)), text
        if kind == "llama":
            return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, vocab_size=30)), text
        if kind == "t5":
            config = tf.T5Config(
                d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=30, decoder_start_token_id=0,
                feed_forward_proj="gated-gelu",
            )  # fmt: skip
            return tf.T5ForConditionalGeneration(config), text
        config = tf.BartConfig(
            d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
            encoder_ffn_dim=24, decoder_ffn_dim=24, vocab_size=30, max_position_embeddings=20,
        )  # fmt: skip
        return tf.BartForConditionalGeneration(config), text


@pytest.mark.parametrize(
    ("kind", "rounds"),
    [
        ("vit", [3, 3]),
        ("roberta", [3, 3]),
        ("llama", [3, 2, 3, 2]),
        ("t5", 2 * [3, 2] + 2 * [3, 2, 2]),
        ("bart", 2 * [3] + 2 * [3, 2]),
    ],
)
def test_models(kind: str, rounds: list[int], downs: list[int]) -> None:
    """Every block's siblings compute together, and no guess is wrong."""
    ends = []
    for alone in (False, True):
        net, batch = small(kind)
        net = net.double().train()
        batch = {name: t.double() if t.is_floating_point() else t for name, t in batch.items()}
        run = rs.attach(net, rs.LoRA(rank=2, init="gaussian"))
        stir(run)
        for module in net.modules():
            for word in ("p", "dropout", "dropout_prob", "attention_dropout"):
                if isinstance(getattr(module, word, None), float):
                    setattr(module, word, 0.0)
        if alone:
            apart(run)
        optimizer, found = run.optimizer(lr=1e-3, eps=1e-4), []
        for _ in range(2):
            loss = net(**batch).loss
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for _, p in run.trainable() if p.grad is not None)]
            optimizer.step()
            optimizer.zero_grad()
        ends.append(found)
        if not alone:
            assert empty(run)
            seen = list(downs)
    same(*ends, tolerance=1e-8)  # type: ignore[misc]
    assert sorted(seen) == sorted(rounds * 2)


def test_generating_after_training(downs: list[int]) -> None:
    net, batch = small("llama")
    run = rs.attach(net, rs.LoRA(rank=2, init="gaussian"))
    stir(run)
    ids = batch["input_ids"]
    net(**batch).loss.backward()
    downs.clear()
    with_cache = net.generate(ids, max_new_tokens=5, do_sample=False, use_cache=True)
    assert torch.equal(with_cache, net.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
    assert not downs


# ---- engines


@pytest.fixture(name="two", scope="module")
def _two() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.stop()


def engine(kind: str, alone: bool) -> tuple[list[Tensor], int]:
    """What three updates under an engine lead to, and how many groups computed together in the last."""
    seen: list[int] = []
    lora_siblings.choose = lambda *_, **__: ("f1", "b1s")  # type: ignore[assignment,attr-defined]
    lora_siblings._traced = lambda: "eager"
    lora_siblings.down = lambda *given: seen.append(1) or DOWN(*given)  # type: ignore[assignment,func-returns-value]
    try:
        net, run = attached(alone=alone)
        wrapped: nn.Module = net
        if kind == "ddp":
            wrapped = DistributedDataParallel(net)
        elif kind == "unused":
            for block in net.blocks:
                block.attn.wanted = False  # type: ignore[union-attr]
            wrapped = DistributedDataParallel(net, find_unused_parameters=True)
        elif kind == "linears":
            for module in list(net.modules()):
                if type(module).__name__ == "Site":
                    fully_shard(module)
            fully_shard(net)
        else:
            for block in net.blocks:
                fully_shard(block, mp_policy=MixedPrecisionPolicy())
            fully_shard(net)
        optimizer = torch.optim.SGD([p for _, p in run.trainable()], lr=1e-3)
        for step in range(3):
            seen.clear()
            wrapped(inputs(step + 10 * shard.rank())).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [shard.whole(p).clone() for _, p in run.trainable()], len(seen)
    finally:
        lora_siblings.down, lora_siblings._traced = DOWN, TRACED


@pytest.mark.parametrize(("kind", "together"), [("ddp", 4), ("unused", 4), ("linears", 0), ("blocks", 4)])
def test_engines(two: Pool, kind: str, together: int) -> None:
    """FSDP2 gathers a block's factors before its first layer runs; layers that it gathers one by one are alone."""
    mine, theirs = two.run(engine, kind, False), two.run(engine, kind, True)
    for (ends, count), (want, none) in zip(mine, theirs, strict=True):
        assert (count, none) == (together, 0)
        same(ends, want)
