"""The head's loss without all logits: its value, its gradients, the memory it promises, and its kernel."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rankshift.ops.linear_cross_entropy import linear_cross_entropy, op, reference

F64, BF16 = torch.float64, torch.bfloat16


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = F64, grad: bool = False) -> Tensor:
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return values.to(dtype).requires_grad_(grad)


def labels_of(T: int, V: int, share: float = 0.4, ignored: int = -100) -> Tensor:
    generator = torch.Generator().manual_seed(T)
    labels = torch.randint(0, V, (T,), generator=generator)
    return labels.masked_fill_(torch.rand(T, generator=generator) < share, ignored)


@pytest.fixture(params=["near", "far"])
def _where(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far: as where labels are on a GPU, and nobody knows how many count."""
    if request.param == "far":
        monkeypatch.setattr(op, "_near", lambda tensor: False)


def plain(h: Tensor, W: Tensor, labels: Tensor, bias: Tensor | None, low: Any, m: float, cap: float | None) -> Tensor:
    """(T,) losses, by hand."""
    logits = h @ W.t()
    if low is not None:
        logits = logits + h @ (low[1] @ low[0]).t()
    if bias is not None:
        logits = logits + bias
    logits = logits * m
    if cap is not None:
        logits = cap * (logits / cap).tanh()
    chosen = logits.softmax(1).gather(1, labels.clamp(min=0)[:, None])[:, 0]
    return -chosen.log() * (labels != -100)


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize("low", [None, "A", "B", "AB"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("m", "cap"), [(1.0, None), (0.25, None), (1.5, 2.0)])
@pytest.mark.parametrize(("T", "K", "V", "chunk"), [(7, 5, 11, 3), (1, 3, 2, None), (130, 8, 65, 129), (4, 6, 9, 4)])
def test_value_and_gradients(
    T: int, K: int, V: int, chunk: int | None, m: float, cap: float | None, bias: bool, low: str | None
) -> None:
    h, W, labels = seeded(T, K, seed=1, grad=True), seeded(V, K, seed=2), labels_of(T, V, 0.0 if T == 1 else 0.4)
    b = seeded(V, seed=3) if bias else None
    factors = None
    if low is not None:
        factors = seeded(2, K, seed=4, grad="A" in low), seeded(V, 2, seed=5, grad="B" in low)
    leaves = [t for t in (h, *(factors or ())) if t.requires_grad]
    want = plain(h, W, labels, b, factors, m, cap)
    kept = int((labels != -100).sum())
    for reduction, divide_by, n in (("sum", None, 1), ("mean", None, kept), ("mean", 13, 13), ("sum", 2.5, 2.5)):
        for divisor in {divide_by, None if divide_by is None else torch.tensor(divide_by)}:
            got = linear_cross_entropy(
                h,
                W,
                labels,
                b,
                -100,
                reduction,
                divisor,
                cap,
                chunk,
                multiplier=m,
                low=factors,  # type: ignore[arg-type]
            )
            torch.testing.assert_close(got, want.sum() / n, rtol=1e-12, atol=1e-12)
            for a, e in zip(
                torch.autograd.grad(3 * got, leaves),
                torch.autograd.grad(3 * want.sum() / n, leaves, retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize("ignored", [-100, 0, 3])
def test_what_is_ignored(ignored: int) -> None:
    T, K, V = 9, 4, 6
    h, W, labels = seeded(T, K, seed=1, grad=True), seeded(V, K, seed=2), labels_of(T, V, ignored=ignored)
    got = linear_cross_entropy(h, W, labels, ignore_index=ignored, chunk=4)
    want = F.cross_entropy(h @ W.t(), labels, ignore_index=ignored)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
    (dh,), (expected,) = torch.autograd.grad(got, h), torch.autograd.grad(want, h)
    torch.testing.assert_close(dh, expected, rtol=1e-11, atol=1e-14)
    assert (dh[labels == ignored] == 0).all()


@pytest.mark.usefixtures("_where")
@pytest.mark.parametrize(("reduction", "divide_by"), [("mean", None), ("sum", None), ("sum", 0)])
def test_nothing_but_ignored_labels(reduction: Any, divide_by: int | None) -> None:
    """As F.cross_entropy and a division: NaN for a mean of nothing, and no gradient."""
    h, W = seeded(5, 4, seed=1, grad=True), seeded(6, 4, seed=2)
    low = seeded(2, 4, seed=3, grad=True), seeded(6, 2, seed=4, grad=True)
    loss = linear_cross_entropy(h, W, torch.full((5,), -100), None, -100, reduction, divide_by, low=low)
    assert loss.item() == 0 if reduction == "sum" and divide_by is None else loss.isnan()
    loss.backward()
    for leaf in (h, *low):
        assert leaf.grad is not None
        assert (leaf.grad == 0).all()


def test_no_rows() -> None:
    h, W = torch.zeros(0, 4, requires_grad=True), torch.zeros(6, 4)
    loss = linear_cross_entropy(h, W, torch.zeros(0, dtype=torch.long), reduction="sum")
    loss.backward()
    assert loss == 0
    assert h.grad is not None
    assert h.grad.shape == (0, 4)


def test_how_many_count_may_be_said() -> None:
    """Where it is not looked up: only as many rows are multiplied."""
    h, W, labels = seeded(9, 4, seed=1, grad=True), seeded(6, 4, seed=2), labels_of(9, 6)
    kept = int((labels != -100).sum())
    assert 0 < kept < 9
    with (seen := Seen()):
        got = linear_cross_entropy(h, W, labels, kept=kept, chunk=100)
    torch.testing.assert_close(got, F.cross_entropy(h @ W.t(), labels), rtol=1e-12, atol=0)
    assert seen.products == [(kept, 4), (kept, 6)]


def test_the_reference() -> None:
    h, W, labels = seeded(9, 4, seed=1), seeded(6, 4, seed=2), labels_of(9, 6)
    bias, low = seeded(6, seed=3), (seeded(2, 4, seed=4), seeded(6, 2, seed=5))
    for m, cap in ((1.0, None), (0.7, 1.5)):
        got = reference.linear_cross_entropy(h, W, labels, bias, low, -100, m, cap)
        torch.testing.assert_close(got, plain(h, W, labels, bias, low, m, cap).sum())
        op_ = linear_cross_entropy(h, W, labels, bias, -100, "sum", softcap=cap, multiplier=m, low=low)
        torch.testing.assert_close(op_, got)


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
def test_sixteen_bits(dtype: torch.dtype) -> None:
    """The loss in fp32 however narrow the logits; gradients in the dtype of what they belong to, masters' in fp32."""
    T, K, V = 64, 32, 501
    h, W, labels = seeded(T, K, seed=1, dtype=dtype, grad=True), seeded(V, K, seed=2, dtype=dtype), labels_of(T, V)
    low = seeded(4, K, seed=3, dtype=torch.float32, grad=True), seeded(V, 4, seed=4, dtype=torch.float32, grad=True)
    loss = linear_cross_entropy(h, W / 8, labels, low=tuple(t / 8 for t in low), chunk=20)  # type: ignore[arg-type]
    assert loss.dtype == torch.float32
    # as under a loss scale, of which fp16 loses nothing although 1/n alone would be small in it
    (dh, dA, dB) = torch.autograd.grad(loss, (h, *low), torch.tensor(2.0**10))
    assert (dh.dtype, dA.dtype, dB.dtype) == (dtype, torch.float32, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in (h, *low)]
    exact = plain(wide[0], W.double() / 8, labels, None, (wide[1] / 8, wide[2] / 8), 1.0, None).sum()
    exact = exact / (labels != -100).sum()
    assert abs(loss.item() - exact.item()) < 0.01
    for got, want in zip((dh, dA, dB), torch.autograd.grad(exact, wide, torch.tensor(2.0**10).double()), strict=True):
        error = (got.double() - want).norm() / want.norm()
        assert error < (0.02 if dtype == BF16 else 0.003), error


def test_a_factor_is_applied_in_fp32() -> None:
    """1/3 in bf16 is off by 2⁻⁹: all gradients of the model would be."""
    h, W, labels = seeded(8, 4, seed=1, dtype=BF16, grad=True), seeded(6, 4, seed=2, dtype=BF16), labels_of(8, 6, 0.0)
    (dh,) = torch.autograd.grad(linear_cross_entropy(h, W, labels, reduction="sum"), h)
    (third,) = torch.autograd.grad(linear_cross_entropy(h, W, labels, reduction="sum", divide_by=3), h)
    assert torch.equal(third, (dh.float() / 3).bfloat16())


def test_autocast() -> None:
    h, W, labels = seeded(8, 4, seed=1, dtype=torch.float32, grad=True), seeded(6, 4, seed=2), labels_of(8, 6)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, W.float(), labels)
        want = F.cross_entropy((h @ W.float().t()).float(), labels)
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    (dh,), (expected,) = torch.autograd.grad(loss, h), torch.autograd.grad(want, h)
    assert dh.dtype == torch.float32
    torch.testing.assert_close(dh, expected, rtol=0.02, atol=2e-3)


def test_what_cannot_train() -> None:
    h, W, labels = seeded(8, 4, grad=True), seeded(6, 4, grad=True), labels_of(8, 6)
    with pytest.raises(ValueError, match="frozen"):
        linear_cross_entropy(h, W, labels)
    with pytest.raises(ValueError, match="frozen"):
        linear_cross_entropy(h, W.detach(), labels, seeded(6, grad=True))
    with torch.no_grad():
        linear_cross_entropy(h, W, labels, seeded(6, grad=True))


def test_a_label_that_there_is_not() -> None:
    with pytest.raises((IndexError, RuntimeError)):
        linear_cross_entropy(seeded(2, 4), seeded(6, 4), torch.tensor([1, 6]))


class Seen(TorchDispatchMode):
    """The most bytes that operations had given out at a time, and the shapes of products into memory that is there."""

    def __init__(self) -> None:
        super().__init__()
        self.living = self.peak = 0
        self.known: set[int] = set()
        self.products: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            storage = t.untyped_storage() if isinstance(t, Tensor) else None
            if storage is not None and storage._cdata not in before | self.known:
                self.known.add(storage._cdata)
                weakref.finalize(storage, self.gone, storage._cdata, storage.nbytes())
                self.living += storage.nbytes()
                self.peak = max(self.peak, self.living)
        if func is torch.ops.aten.mm.out:
            self.products.append(tuple(args[0].shape))
        return out

    def gone(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.living -= size


@pytest.mark.usefixtures("_where")
def test_memory() -> None:
    """At any time less than h's gradient, twice in the backward, and a chunk: in bf16, and on a CPU in fp32 beside it
    three times over. Ordinary logits take 14 bytes for each of T·V."""
    T, K, V, chunk = 2048, 16, 1024, 64
    h, W, labels = seeded(T, K, seed=1, dtype=BF16, grad=True), seeded(V, K, seed=2, dtype=BF16), labels_of(T, V, 0.0)
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with (seen := Seen()), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        loss = linear_cross_entropy(h, W, labels, chunk=chunk)
    assert sum(t.nbytes for t in kept) == h.nbytes, "the gradient of h alone"
    logits = chunk * V * 2
    small = 3 * labels.nbytes
    assert h.nbytes + logits < seen.peak <= h.nbytes + logits + 3 * 2 * logits + small
    assert seen.peak < 14 * T * V / 20
    kept.clear()
    with (seen := Seen()):
        loss.backward()
    assert h.nbytes <= seen.peak <= h.nbytes + 3 * 4 * chunk * K + 64


def test_only_what_is_asked_for() -> None:
    """Without gradients the loss takes one product a chunk, not two."""
    W, labels = seeded(6, 4, seed=2), labels_of(9, 6, 0.0)
    seen = Seen()
    with seen:
        linear_cross_entropy(seeded(9, 4), W, labels)
        with torch.no_grad():
            linear_cross_entropy(seeded(9, 4, grad=True), W, labels)
    assert seen.products == [(9, 4)] * 2


def test_chunks() -> None:
    assert [op.even(T, 2048) for T in (0, 1, 129, 2048, 2049, 8191, 10_000)] == [1, 128, 256, 2048, 1152, 2048, 2048]
    assert all(1 <= op.even(T, chunk) <= chunk for T in range(300) for chunk in (1, 3, 127, 200))


INTERPRETED = """
import itertools, torch
from rankshift.ops.linear_cross_entropy import linear_cross_entropy, op, reference, triton

def check(V, size, stride, dtype, cap, m, grad, n=6):
    triton._SIZE = size
    g = torch.Generator().manual_seed(V)
    whole = (4 * torch.randn(n, stride, generator=g)).to(dtype)
    whole[:, V:] = float("nan")  # what is there is nobody's
    whole[1, 0] = 300.0 if dtype != torch.float16 else 200.0
    labels = torch.randint(0, V, (n,), generator=g)
    labels[2] = -100
    labels[3], labels[4] = 0, V - 1
    want = whole[:, :V].double()
    losses = reference.rows_(want, labels, -100, m, cap, grad)
    before = whole.clone()
    got = triton.launch(whole, V, labels, -100, m, cap, grad)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), losses, rtol=2e-6, atol=2e-5)
    if not grad:
        assert torch.equal(whole.nan_to_num(7), before.nan_to_num(7))
        return
    eps = torch.finfo(dtype).eps
    atol = 1e-6 if dtype == torch.float32 else eps / 200
    torch.testing.assert_close(whole[:, :V].double(), want, rtol=eps + 1e-5, atol=atol)
    assert (whole[2, :V] == 0).all()

for V, size in ((1, 256), (255, 256), (256, 256), (257, 256), (513, 512), (1000, 256), (2049, 1024)):
    for stride in (-(-V // 64) * 64, V):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            check(V, size, stride, dtype, None, 1.0, True)
check(300, 256, 320, torch.bfloat16, 5.0, 1.0, True)
check(300, 256, 320, torch.float32, 30.0, 0.5, True)
check(300, 256, 320, torch.float32, None, 0.125, False)
check(300, 256, 320, torch.float32, 2.0, 0.125, False)

wrong = triton.launch(torch.zeros(3, 64), 50, torch.tensor([50, -1, 3]), -100, 1.0, None, True)
assert wrong.isnan().tolist() == [True, True, False], "a label that there is not"

# the whole op through the kernel
op.runs_on = lambda device: True
g = torch.Generator().manual_seed(0)
for T, K, V in ((7, 12, 33), (130, 8, 65)):
    h = torch.randn(T, K, generator=g, requires_grad=True)
    W, A, B = (torch.randn(*s, generator=g) for s in ((V, K), (3, K), (V, 3)))
    A.requires_grad_(), B.requires_grad_()
    labels = torch.randint(0, V, (T,), generator=g)
    labels[::3] = -100
    got = linear_cross_entropy(h, W, labels, chunk=60, low=(A, B))
    want = reference.linear_cross_entropy(h, W, labels, low=(A, B)) / (labels != -100).sum()
    torch.testing.assert_close(got, want)
    for a, e in zip(torch.autograd.grad(got, (h, A, B)), torch.autograd.grad(want, (h, A, B))):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)
"""

COMPILED = """
import re, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.linear_cross_entropy.triton import _SIZE, _WARPS, _rows

for kind, cap, grad in (("bf16", False, True), ("bf16", True, True), ("fp16", False, True), ("fp32", False, False)):
    constants = {"CAP": cap, "GRAD": grad, "SIZE": _SIZE}
    names = [name for name in _rows.arg_names if name not in constants]
    types = ["*" + kind, "*i64", "*fp32", "i32", "i32", "i32", "fp32", "fp32"]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    places = {(i,): [["tt.divisibility", 16]] for i in (0, 1, 2, names.index("stride"))}
    source = ASTSource(fn=_rows, signature=signature, constexprs=constants, attrs=places)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": _WARPS})
    ptx = compiled.asm["ptx"]
    assert "ld.local" not in ptx and "st.local" not in ptx
    narrow = re.findall(r"ld\\.global\\.b(?:16|32|64)", ptx)
    assert len(narrow) == 2, "but for the label and its logit, 16 bytes come at once"
    times = _SIZE // (32 * _WARPS) * (4 if kind == "fp32" else 2) // 16
    assert ptx.count("ld.global.v4.b32") == times * (2 if grad else 1)
    assert ptx.count("st.global.v4.b32") == (2 * times if grad else 0)
"""


def run(script: Path, text: str, **environment: str) -> None:
    script.write_text(text)
    done = subprocess.run(
        [sys.executable, script], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_kernel_computes_what_the_reference_does(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    run(tmp_path / "interpreted.py", INTERPRETED, TRITON_INTERPRET="1")


def test_the_kernel_compiles(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    run(tmp_path / "compiled.py", COMPILED, TRITON_CACHE_DIR=str(tmp_path))
