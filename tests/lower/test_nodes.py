"""The two nodes of a fused block against the block's equations, written out, in float64; and what they keep."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lower_models as models
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rankshift as rs
from rankshift.core.adapter import Columns, LowRank
from rankshift.core.base import Dense, Plain
from rankshift.core.form import Form
from rankshift.lower import nodes, siblings
from rankshift.lower.nodes import Norm, entry, exit_, normed
from rankshift.lower.siblings import Group, join, packed
from rankshift.ops.rms_norm import norm_back
from rankshift.storage.fp8 import FP8
from rankshift.storage.int8 import Int8

BATCH, LENGTH, HEAD, QUERIES, KEYS, WIDTH, HIDDEN, EPS = 2, 5, 6, 4, 2, 20, 28, 1e-5
T, O = BATCH * LENGTH, QUERIES * HEAD  # noqa: E741
SHAPES = {
    "q": (O, WIDTH), "k": (KEYS * HEAD, WIDTH), "v": (KEYS * HEAD, WIDTH), "o": (WIDTH, O),
    "gate": (HIDDEN, WIDTH), "up": (HIDDEN, WIDTH), "down": (WIDTH, HIDDEN),
}  # fmt: skip
ATTENTION, MLP = ("q", "k", "v"), ("o", "gate", "up", "down")
Term = LowRank | Columns | None


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- what adapters may hand over ------------------------------------------------------------------------------------


def low(name: str, rank: int, scale: float = 0.7, A: bool = True, B: bool = True, m: bool | None = None) -> LowRank:
    """``m``: with a magnitude, which trains or not."""
    out, into = SHAPES[name]
    seed = 10 * list(SHAPES).index(name)
    down, up = seeded(rank, into, seed=seed + 1) / into**0.5, seeded(out, rank, seed=seed + 2) / rank**0.5
    magnitude = None if m is None else (1 + seeded(out, seed=seed + 5) / 3).requires_grad_(m)
    return LowRank(down.requires_grad_(A), up.requires_grad_(B), scale, magnitude)


def columns(name: str, rank: int, scale: float = 0.7) -> Columns:
    out, into = SHAPES[name]
    seed = 10 * list(SHAPES).index(name)
    at = torch.randperm(into, generator=torch.Generator().manual_seed(seed))[:rank].sort().values
    return Columns(at, seeded(out, rank, seed=seed + 1).requires_grad_(), scale)


def shared(trains: bool, scales: bool) -> dict[str, Term]:
    """One A for all layers, of which each reads its columns; VeRA's does not train."""
    A = (seeded(9, HIDDEN, seed=1) / 5).requires_grad_(trains)
    found: dict[str, Term] = {}
    for i, (name, (out, into)) in enumerate(SHAPES.items()):
        found[name] = LowRank(A[:, :into], seeded(out, 9, seed=i).requires_grad_(), 1.0 + i * scales)
    return found


RANKS = (1, 5, 3, 2, 4, 6, 7)
TERMS = {
    "nothing": lambda: {},
    "equal": lambda: {name: low(name, 3) for name in SHAPES},
    "room below": lambda: {n: low(n, r) for n, r in zip(SHAPES, (16, 16, 16, 12, 4, 4, 12), strict=True)},
    "unequal": lambda: {name: low(name, r, 0.3 * r) for name, r in zip(SHAPES, RANKS, strict=True)},
    "unequal, one scale": lambda: {name: low(name, r) for name, r in zip(SHAPES, RANKS, strict=True)},
    "some": lambda: {"q": low("q", 3), "v": low("v", 2, 2.0), "up": low("up", 4), "down": low("down", 5)},
    "others": lambda: {"k": low("k", 3), "o": low("o", 2, 2.0), "gate": low("gate", 4)},
    "A frozen": lambda: {name: low(name, 3, A=False) for name in SHAPES},
    "B frozen": lambda: {name: low(name, 3, B=False) for name in SHAPES},
    "some frozen": lambda: {name: low(name, 3, A=i % 2 == 0, B=i % 3 == 0) for i, name in enumerate(SHAPES)},
    "shared": lambda: shared(False, False),
    "shared, scales": lambda: shared(False, True),
    "shared, trained": lambda: shared(True, True),
    "rank 70": lambda: {name: low(name, 70) for name in SHAPES},
    "rank 130": lambda: {name: low(name, 130) for name in SHAPES},
    "rank 130, some": lambda: {name: low(name, 130) for name in ("q", "v", "up", "down")},
    "rank 130, A frozen": lambda: {name: low(name, 130, A=False) for name in SHAPES},
    "dora": lambda: {name: low(name, 3, m=True) for name in SHAPES},
    "dora, room below": lambda: {n: low(n, r, m=True) for n, r in zip(SHAPES, (16, 16, 16, 12, 4, 4, 12), strict=True)},
    "dora, unequal": lambda: {name: low(name, r, 0.3 * r, m=True) for name, r in zip(SHAPES, RANKS, strict=True)},
    "dora, some": lambda: {"q": low("q", 3, m=True), "up": low("up", 4, m=True), "down": low("down", 5, m=True)},
    "dora, others": lambda: {"v": low("v", 3, m=True), "o": low("o", 2, 2.0, m=True), "gate": low("gate", 4, m=True)},
    "dora and not": lambda: {name: low(name, 3, m=True if i % 2 else None) for i, name in enumerate(SHAPES)},
    "dora, A frozen": lambda: {name: low(name, 3, A=False, m=True) for name in SHAPES},
    "dora, only m": lambda: {name: low(name, 3, A=False, B=False, m=True) for name in SHAPES},
    "dora, m frozen": lambda: {name: low(name, 3, m=False) for name in SHAPES},
    "dora, rank 70": lambda: {name: low(name, 70, m=True) for name in SHAPES},
    "dora, rank 130": lambda: {name: low(name, 130, m=True) for name in SHAPES},
    "columns": lambda: {name: columns(name, r, 0.3 * r) for name, r in zip(SHAPES, RANKS, strict=True)},
    "some columns": lambda: {name: columns(name, 3) for name in ("q", "v", "gate", "down")},
    "columns of one rank": lambda: {name: columns(name, 3, 0.2 + i) for i, name in enumerate(SHAPES)},
    "columns and ranks": lambda: {n: (columns if n in ("q", "k", "v", "down") else low)(n, 3) for n in SHAPES},
}


class Layer:
    """A linear layer and its term, as a group takes it and as an equation."""

    def __init__(self, name: str, term: Term, bias: bool):
        out, into = SHAPES[name]
        seed = 100 * list(SHAPES).index(name)
        self.term = term
        self.W, self.b = seeded(out, into, seed=seed + 3) / into**0.5, seeded(out, seed=seed + 4) if bias else None
        self.linear = nn.Linear(into, out, bias, dtype=torch.float64).requires_grad_(False)
        self.linear.weight.data.copy_(self.weight().detach())
        if bias:
            self.linear.bias.data.copy_(self.b)

    def weight(self) -> Tensor:
        """As it is stored."""
        if isinstance(self.term, Columns):
            return self.W.index_add(1, self.term.channels, self.term.scale * self.term.D)
        return self.W

    def __call__(self, x: Tensor) -> Tensor:
        W = self.weight()
        if isinstance(self.term, LowRank):
            W = W + self.term.scale * (self.term.B @ self.term.A)
            if self.term.magnitude is not None:
                W = self.term.magnitude[:, None] * W / W.detach().square().sum(1, keepdim=True).sqrt()
        y = torch.einsum("ti,oi->to", x, W)
        return y if self.b is None else y + self.b

    @property
    def leaves(self) -> list[Tensor]:
        if self.term is None:
            return []
        tensors = (self.term.D,) if isinstance(self.term, Columns) else (self.term.A, self.term.B, self.term.magnitude)
        return [t if t.is_leaf else t._base for t in tensors if t is not None and t.requires_grad]


def layers(case: str, names: tuple[str, ...], bias: bool) -> dict[str, Layer]:
    terms = TERMS[case]()
    return {name: Layer(name, terms.get(name), bias) for name in names}


def group(members: list[Layer], together: bool) -> Group:
    bases, terms = [Dense(member.linear, Form()) for member in members], [member.term for member in members]
    slot = 0
    if together:
        slot = join(bases, terms)
        assert len({base.weight.untyped_storage().data_ptr() for base in bases}) == 1
    return Group(bases, terms, slot)


def rms_norm(x: Tensor, w: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + EPS) * w


def rotated(y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(T, H·D) to (batch, H, S, D), turned as transformers' rotate_half does."""
    y = y.view(BATCH, LENGTH, -1, HEAD).transpose(1, 2)
    a, b = y.chunk(2, -1)
    cos, sin = (table.view(-1, 1, LENGTH, HEAD) for table in (cos, sin))
    return y * cos + torch.cat((-b, a), -1) * sin


def angles(rows: int) -> tuple[Tensor, Tensor]:
    angle = torch.cat([seeded(rows, HEAD // 2, seed=77)] * 2, -1)
    return angle.cos(), angle.sin()


def same(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def agree(fused: list[Tensor], plain: list[Tensor], leaves: list[Tensor]) -> None:
    """Values, and gradients at random cotangents: twice, as the graph must stay what it was."""
    same([t.detach() for t in fused], [t.detach() for t in plain])
    assert [t.requires_grad for t in fused] == [bool(leaves)] * len(fused)
    leaves = list(dict.fromkeys(leaves))
    if leaves:
        dy = [seeded(*t.shape, seed=50 + i) for i, t in enumerate(fused)]
        grads = [torch.autograd.grad(fused, leaves, dy, retain_graph=True, allow_unused=True) for _ in range(2)]
        ends = [(t, d) for t, d in zip(plain, dy, strict=True) if t.requires_grad]
        wanted = torch.autograd.grad([t for t, _ in ends], leaves, [d for _, d in ends], allow_unused=True)
        assert [g is None for g in grads[0]] == [g is None for g in wanted]
        same([g for g in grads[0] if g is not None], [g for g in wanted if g is not None])
        for a, b in zip(*grads, strict=True):
            assert a is b or torch.equal(a, b)


CASES = [(case, False, True, True) for case in TERMS]
CASES += [(case, True, False, True) for case in ("nothing", "unequal", "shared", "columns", "rank 130")]
CASES += [(case, True, False, True) for case in TERMS if "dora" in case]
CASES += [
    (case, False, True, False)
    for case in ("nothing", "some", "others", "columns", "A frozen", "rank 130", "dora, some", "dora, A frozen")
]


@pytest.mark.parametrize(("case", "bias", "together", "x_grad"), CASES)
def test_entry(case, bias, together, x_grad):
    parts = layers(case, ATTENTION, bias)
    x, w = seeded(T, WIDTH, seed=7).requires_grad_(x_grad), 1 + 0.3 * seeded(WIDTH, seed=8)
    cos, sin = angles(T if bias else LENGTH)  # every token's own position, or one table for all sequences
    fused = entry(x, Norm(w, EPS), group(list(parts.values()), together), cos, sin, HEAD, BATCH)
    q, k, v = (layer(rms_norm(x, w)) for layer in parts.values())
    v = v.view(BATCH, LENGTH, -1, HEAD).transpose(1, 2)
    plain = [rotated(q, cos, sin), rotated(k, cos, sin), v, x]
    agree(list(fused), plain, [x] * x_grad + [leaf for layer in parts.values() for leaf in layer.leaves])


GELU = [("gelu_tanh", case, False, True, True) for case in ("unequal", "rank 130", "columns", "nothing")]


@pytest.mark.parametrize(("activation", "case", "bias", "together", "x_grad"), [*(("silu", *c) for c in CASES), *GELU])
def test_exit(activation, case, bias, together, x_grad):
    parts = layers(case, MLP, bias)
    x, w = seeded(T, WIDTH, seed=7).requires_grad_(x_grad), 1 + 0.3 * seeded(WIDTH, seed=8)
    o = seeded(T, O, seed=9).requires_grad_(x_grad)
    after, gate, up, down = parts.values()
    groups = group([after], together), group([gate, up], together), group([down], together)
    fused = exit_(o, x, groups[0], Norm(w, EPS), groups[1], groups[2], activation)
    x2 = x + after(o)
    n = rms_norm(x2, w)
    act = F.silu if activation == "silu" else lambda t: F.gelu(t, approximate="tanh")
    plain = x2 + down(act(gate(n)) * up(n))
    agree([fused], [plain], [x, o] * x_grad + [leaf for layer in parts.values() for leaf in layer.leaves])


def test_of_o_and_x_either_may_need_no_gradient():
    parts = layers("equal", MLP, False)
    after, gate, up, down = parts.values()
    groups = group([after], True), group([gate, up], True), group([down], True)
    w = 1 + 0.3 * seeded(WIDTH, seed=8)
    for needs in ((True, False), (False, True)):
        o, x = (seeded(T, n, seed=n).requires_grad_(need) for n, need in zip((O, WIDTH), needs, strict=True))
        fused = exit_(o, x, groups[0], Norm(w, EPS), groups[1], groups[2], "silu")
        x2 = x + after(o)
        n = rms_norm(x2, w)
        agree([fused], [x2 + down(F.silu(gate(n)) * up(n))], [t for t in (o, x) if t.requires_grad] + after.leaves)


def test_a_norm_alone():
    x, w = seeded(2, 3, WIDTH, seed=7).requires_grad_(), 1 + 0.3 * seeded(WIDTH, seed=8)
    agree([normed(x, Norm(w, EPS))], [rms_norm(x, w)], [x])


@pytest.mark.parametrize("case", ["equal", "unequal", "shared", "columns"])
def test_a_gain_of_one_and_more(case):
    """As Gemma has it: the gradients of the factors have the offset too."""
    parts = layers(case, ATTENTION, False)
    x, w = seeded(T, WIDTH, seed=7), 1 + 0.3 * seeded(WIDTH, seed=8)
    cos, sin = angles(LENGTH)
    leaves = list(dict.fromkeys(leaf for layer in parts.values() for leaf in layer.leaves))
    found = []
    for how in (Norm(w, EPS), Norm(w - 1, EPS, 1.0)):
        fused = entry(x, how, group(list(parts.values()), True), cos, sin, HEAD, BATCH)[:3]
        found.append(torch.autograd.grad([(t * t).sum() for t in fused], leaves))
    same(*map(list, found))


@pytest.mark.parametrize("case", ["equal", "unequal", "shared", "some", "others"])
def test_the_mean_in_a_norms_gradient_is_taken_from_what_was_kept(case, monkeypatch):
    """z must be n Aᵀ of the low-rank term that comes with it, which the reference does not need."""
    seen = []

    def checked(dn, x2, rstd, weight, offset, low, residual, z, more):
        seen.append(low is not None)
        if low is not None:
            torch.testing.assert_close(z, rms_norm(x2, weight) @ low[1].t())
        return norm_back(dn, x2, rstd, weight, offset, low, residual, z, more)

    monkeypatch.setattr(nodes, "norm_back", checked)
    parts, mlp = layers(case, ATTENTION, False), layers(case, MLP, False)
    after, gate, up, down = mlp.values()
    x, w = seeded(T, WIDTH, seed=7).requires_grad_(), 1 + 0.3 * seeded(WIDTH, seed=8)
    q, *_, past = entry(x, Norm(w, EPS), group(list(parts.values()), True), *angles(LENGTH), HEAD, BATCH)
    o = q.transpose(1, 2).reshape(T, O)
    y = exit_(o, past, group([after], True), Norm(w, EPS), group([gate, up], True), group([down], True), "silu")
    y.sum().backward()
    assert seen == [True, True]


def test_a_backward_is_given_other_tensors_than_the_forward_had():
    """Hooks on what autograd keeps may copy it: what is multiplied by is what they gave back."""
    members = layers("nothing", ("gate", "up"), False)
    together = group(list(members.values()), True)
    together.times(seeded(T, WIDTH))
    dY = seeded(T, 2 * HIDDEN)
    kept = [2 * weight.detach() for weight in together.weights]
    torch.testing.assert_close(together.back(dY, kept)[0], 2 * together.back(dY, together.weights)[0])


# ---- A below the weights --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [ATTENTION, ("o",), ("gate", "up"), ("down",)], ids="-".join)
def test_the_products_with_w_and_a_are_one(names, monkeypatch):
    members = list(layers("room below", names, True).values())
    one, apart = group(members, True), group(members, False)
    assert one.deep is not None
    assert apart.deep is None
    x = seeded(T, SHAPES[names[0]][1])
    seen = []
    plain = Plain.times
    monkeypatch.setattr(Plain, "times", lambda self, x, bias, W: seen.append(W.shape) or plain(self, x, bias, W))
    (factors,) = packed((one,), x)
    ys, lows, kept = one.forward(x, factors)
    assert seen == [one.deep.shape] == [(sum(one.widths) + len(factors[0]), x.shape[1])]
    (factors,) = packed((apart,), x)
    want, want_lows, want_kept = apart.forward(x, factors)
    for got, expected in ((ys, want), (kept, want_kept), [[low[0] for low in some] for some in (lows, want_lows)]):
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_backward_that_multiplies_again_has_the_a_of_its_forward():
    """The room below the weights holds what the last forward wrote there."""
    members = layers("room below", ("gate", "up"), False)
    both = list(members.values())
    first, x = group(both, True), seeded(T, WIDTH)
    (factors,) = packed((first,), x)
    ys, _, kept = first.forward(x, factors)
    others = [member.term._replace(A=2 * member.term.A) for member in both]
    second = Group(first.bases, others, first.slot)
    second.forward(x, packed((second,), x)[0])
    again, _, kept_again = first.forward(x, kept[:2], again=True)
    for a, b in zip((*ys, *kept), (*again, *kept_again), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("together", [True, False])
def test_a_term_comes_first_where_adding_onto_a_product_would_pass_over_memory(together, monkeypatch):
    members = list(layers("room below", ("gate", "up"), False).values())
    one = group(members, together)
    dY, low = seeded(T, 2 * HIDDEN), (seeded(T, 3, seed=1), seeded(3, WIDTH, seed=2))
    want = dY @ torch.cat([member.linear.weight for member in members]) + low[0] @ low[1]
    for near in (siblings.NEAR, 0):
        monkeypatch.setattr(siblings, "NEAR", near)
        (found,) = one.back(dY, one.weights, low)
        torch.testing.assert_close(found, want)


@pytest.mark.parametrize("how", ["moved", "wider", "narrower", "unequal", "not ours"])
def test_memory_below_weights_that_is_no_room_for_a_is_not_written(how):
    members = list(layers("room below", ("gate", "up"), False).values())
    bases, terms = [Dense(m.linear, Form()) for m in members], [m.term for m in members]
    height, into = 2 * HIDDEN, WIDTH
    if how == "not ours":  # both weights lie in one buffer of somebody, and something else below them
        whole = seeded(height + 16, into)
        for base, rows in zip(bases, whole.split([HIDDEN, HIDDEN, 16]), strict=False):
            base.weight.data = rows
        before, slot = whole.clone(), 8
    else:
        slot = join(bases, terms)
        whole = bases[0].weight.data.as_strided((height + slot, into), (into, 1))
        whole[height:] = 0
        before = whole.clone()
        if how == "moved":
            bases[1].weight.data = bases[1].weight.data.clone()
        elif how == "unequal":
            terms[0] = terms[0]._replace(A=terms[0].A[:3], B=terms[0].B[:, :3])
        else:
            rank = 12 if how == "wider" else 3
            terms = [t._replace(A=t.A.repeat(3, 1)[:rank], B=t.B.repeat(1, 3)[:, :rank]) for t in terms]
    found = Group(bases, terms, slot)
    assert found.deep is None
    x = seeded(T, into)
    ys, _, (A, _, Z) = found.forward(x, packed((found,), x)[0])
    torch.testing.assert_close(whole, before, rtol=0, atol=0)
    torch.testing.assert_close(Z, x @ A.t())
    for y, base in zip(ys, bases, strict=True):
        torch.testing.assert_close(y, x @ base.weight.t())


def test_forwards_before_a_backward_write_no_weight_of_it():
    """To write A below weights that autograd keeps must not count as a change of them."""
    parts, w, (cos, sin) = layers("room below", ATTENTION, False), 1 + 0.3 * seeded(WIDTH, seed=8), angles(LENGTH)
    one, A = group(list(parts.values()), True), parts["q"].term.A
    assert one.deep is not None
    grads = []
    for more in (0, 1):
        x = seeded(T, WIDTH, seed=7).requires_grad_()
        outs = [entry(x, Norm(w, EPS), one, cos, sin, HEAD, BATCH) for _ in range(1 + more)]
        grads.append(torch.autograd.grad([y.sum() for y in outs[0]], [x, A]))
    for a, b in zip(*grads, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("names", [("gate", "up"), ("down",)], ids="-".join)
def test_nothing_but_the_weights_holds_their_memory(names):
    members = list(layers("room below", names, False).values())
    one = group(members, True)
    assert one.slot > 0
    memory = StorageWeakRef(one.weights[0].untyped_storage())
    slot, bases, terms = one.slot, one.bases, one.terms
    del one
    for member in members:
        member.linear.float()
    assert memory.expired()
    assert Group(bases, terms, slot).deep is None


@pytest.mark.parametrize("kind", ["fp8", "int8", "dense"])
def test_a_wide_term_is_no_part_more_than_a_norms_gradient_takes(kind):
    """Also of formats that multiply by themselves: norm_back's kernel reads three."""
    linears = [nn.Linear(32, 16, False, dtype=torch.bfloat16) for _ in range(3)]
    bases: list[Any] = [Dense(each, Form()) for each in linears]
    if kind != "dense":
        storage = {"fp8": FP8, "int8": Int8}[kind]
        bases = [storage.of(base, kind) for base in bases]
    one = Group(bases, [None] * 3)
    dY, low = seeded(T, 48).bfloat16(), (seeded(T, 70, seed=1).bfloat16(), seeded(70, 32, seed=2).bfloat16())
    parts = one.back(dY, one.weights, low)
    assert len(parts) == (1 if kind == "dense" else 3)
    want = sum(base.format.back(d, *base.packed).double() for base, d in zip(bases, dY.split(16, 1), strict=True))
    want += low[0].double() @ low[1].double()
    torch.testing.assert_close(sum(p.double() for p in parts), want, rtol=0.02, atol=0.2)


def test_weights_that_are_joined_again_are_the_same():
    members = list(layers("room below", ("gate", "up"), False).values())
    want = [member.linear.weight.clone() for member in members]
    for _ in range(2):
        assert group(members, True).deep is not None
        for member, weight in zip(members, want, strict=True):
            assert torch.equal(member.linear.weight, weight)


def test_blocks_by_their_kernels():
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", Path(__file__).with_name("blocks_interpreted.py")],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


# ---- bytes kept for backward ----------------------------------------------------------------------------------------


def kept_per_token(method: Any) -> tuple[float, Any]:
    """Bytes in bf16 that a lowered block keeps for backward, for one token more; and its configuration. Attention's own
    are left out, but for q, k and v, which nobody else keeps."""
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 1}
    model = models.llama(dtype=torch.bfloat16, attn="sdpa", **sizes)
    run = rs.attach(model, method)
    run.lower()
    config, layer = model.config, model.model.layers[0]
    sdpa = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def attention(module: Any, q: Tensor, k: Tensor, v: Tensor, *args: Any, **options: Any) -> Any:
        for t in (q, k, v):
            found[t.untyped_storage().data_ptr()] = t
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            return sdpa(module, q, k, v, *args, **options)

    def keep(t: Tensor) -> Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    ALL_ATTENTION_FUNCTIONS.register("counted", attention)
    config._attn_implementation = "counted"
    totals = []
    for batch in (2, 4):
        found: dict[int, Tensor] = {}
        x = torch.randn(batch, 16, 64, dtype=torch.bfloat16, requires_grad=True)
        positions = model.model.rotary_emb(x, torch.arange(16)[None])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = layer(x, position_embeddings=positions)
        assert layer.lowered.aside is None
        assert y.requires_grad
        totals.append(sum(t.untyped_storage().nbytes() for t in found.values()))
    return (totals[1] - totals[0]) / 32, config


@pytest.mark.parametrize("kind", ["lora", "dora", "paca", "vera"])
def test_a_block_keeps_what_a_frozen_one_must(kind):
    dora = rs.LoRA(rank=4, dora=True)
    method = {"lora": rs.LoRA(rank=4), "dora": dora, "paca": rs.PaCA(rank=4), "vera": rs.VeRA(rank=4)}[kind]
    found, c = kept_per_token(method)
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    ideal = 2 * c.hidden_size + 2 * queries + 2 * keys + 2 * c.intermediate_size  # x, x₂, q and o, k and v, g and u
    # Z of each layer, and what o and down give; of h its channels; Z of each group
    beside = {"lora": 7 * 4, "dora": 7 * 4 + 2 * c.hidden_size, "paca": 4, "vera": 4 * 4}[kind]
    assert found <= 1.02 * 2 * ideal + 2 * beside
    assert found >= 2 * ideal
