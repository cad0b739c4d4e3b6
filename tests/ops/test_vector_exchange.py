"""Exchanges of vectors: which layers the kernels take, what they compute under the interpreter, that they compile."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from elsewhere import run
from torch import Tensor, nn

import rankshift as rs
from rankshift.methods import switchlora_pool
from rankshift.methods.switchlora import SwitchLayer
from rankshift.ops import vector_adam
from rankshift.ops.vector_exchange import fits, op, plain, sent

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.vector_exchange.triton import _BLOCK, _LENGTH, _TILE, _hold, _rewrite, _swap

def compiled(kernel, *types, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    places = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]

for void in (True, False):
    ptx = compiled(_swap, "*i64", "*fp32", "*fp32", "fp32", "i32", "i32", "i32", VOID=void, SIZE=_LENGTH)
    assert "ld.global.v4" in ptx, "rows of A are not read 16 bytes at a time"
    ptx = compiled(_rewrite, "*i64", "*fp32", "*fp32", "i32", "i32", VOID=void, M=_TILE[0], N=_TILE[1])
    assert "fma.rn.f32" in ptx
    assert ptx.count("st.global.v4") == _TILE[0] * _TILE[1] // (128 * 4), "W is not written 16 bytes at a time"
    compiled(_hold, "*i64", "*fp32", "i32", "i32", VOID=void, LENGTH=_BLOCK[0], SOME=_BLOCK[1])
"""


def test_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    m, n, r = 6, 8, 3
    W, A, B = (nn.Parameter(torch.zeros(size)) for size in ((m, n), (r, n), (m, r)))
    assert not fits(W, A, B), "there is no GPU"
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    assert fits(W, A, B)
    assert not fits(W.double(), A.double(), B.double())
    assert not fits(W, A, B.to("meta")), "elsewhere"
    assert not fits(torch.zeros(m, 10), torch.zeros(r, 10), B), "rows of W begin at multiples of 16 bytes"
    assert not fits(torch.zeros(m, n, 1), A, B), "a convolution's"
    assert not fits(torch.zeros(n, m).t(), A, B)
    assert not fits(W, A, torch.zeros(r, m).t())
    assert not fits(torch.zeros(n * m + 1)[1:].view(m, n), A, B)


def test_a_kind_of_tensor_that_they_do_not_know() -> None:
    class Elsewhere(torch.Tensor):
        """As DTensor: what it holds is not where data_ptr says."""

    assert plain(torch.zeros(3))
    assert plain(nn.Parameter(torch.zeros(3)))
    assert not plain(torch.zeros(3).as_subclass(Elsewhere))


def test_tables_go_in_the_order_that_kernels_read() -> None:
    table = np.arange(6).reshape(2, 3).T
    assert sent(table, torch.device("cpu")).is_contiguous()
    assert sent(table, torch.device("cpu")).tolist() == table.tolist()


def test_they_compute_what_their_reference_does() -> None:
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    tests = Path(__file__).with_name("vector_exchange_interpreted.py")
    run("-m", "pytest", "-p", "no:cacheprovider", tests, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def test_they_compile(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu_training_is_that_without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One update is void; pools are read, and copied, while the device may still write to them."""

    def trained() -> tuple[rs.Run, dict[str, Tensor]]:
        torch.manual_seed(0)
        layers = [nn.Linear(n, m) for n, m in ((64, 200), (200, 200), (200, 200), (200, 768), (768, 64))]
        model = nn.Sequential(*(module for layer in layers for module in (layer, nn.Tanh()))).cuda()
        run = rs.attach(model, rs.SwitchLoRA(rank=24, interval=10, rho=1.0, targets=("*",)), total_steps=40)
        optimizer = run.optimizer(lr=1e-4)
        for t in range(30):
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(t)).cuda()
            ((model(x) - 1).square().mean() * (float("nan") if t == 5 else 1.0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert run.skipped == 1
        moments = {f"{i} {k}": v for i, state in enumerate(optimizer.state.values()) for k, v in state.items()}
        return run, {name: t.cpu().clone() for name, t in (run.state_dict()["tensors"] | moments).items()}

    def known(run: rs.Run) -> list[bool]:
        layers = [layer for layer in run.adapter().values() if isinstance(layer, SwitchLayer)]
        return [layer.known(layer.get_parameter("A"), layer.get_parameter("B")) is not None for layer in layers]

    run, got = trained()
    assert known(run) == [True] * 5, "not by the kernels: was memory not lent?"
    for name, pool in run.adapter()["0"].aside().items():
        assert torch.equal(copy.deepcopy(run.adapter()["0"]).aside()[name], pool)
    monkeypatch.setattr(switchlora_pool, "lend", lambda at, size: 0)
    monkeypatch.setattr(vector_adam.op, "runs_on", lambda device: False)
    run, want = trained()
    assert known(run) == [False] * 5
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-3, atol=1e-4, msg=f"{name} differs")
