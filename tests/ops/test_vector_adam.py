"""Adam with a count for each vector: which tensors the kernels take, what they compute, that they compile."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from elsewhere import run
from torch import Tensor, nn

from rankshift.ops.vector_adam import fits, op, reference
from rankshift.optim import Optimizer
from rankshift.optim.vectors import Vectors

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rankshift.ops.vector_adam.triton import _SOME, _TILE, EXACT, _factors, _step

def compiled(kernel, *types, options, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = {**dict(zip(names, types, strict=True)), **dict.fromkeys(constants, "constexpr")}
    places = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(types) if kind[0] == "*"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=places)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]

for axis, void in ((0, True), (0, False), (1, True)):
    kinds = {"AXIS": axis, "VOID": void, "BETA1": 0.9, "BETA2": 0.999}
    compiled(_factors, "*i64", "*fp32", "*fp32", "i32", options={"num_warps": 4}, SOME=_SOME, **kinds)
    for moves in (True, False):
        ptx = compiled(
            _step, "*i64", "*fp32", "*fp32", "i32", "fp32", options={"num_warps": 8, **EXACT}, MOVES=moves,
            N=_TILE[0], M=_TILE[1], **kinds,
        )
        each = _TILE[0] * _TILE[1] // (256 * 4)
        assert ptx.count("st.global.v4") == (3 if moves else 2) * each, "what a thread writes at once is not 16 bytes"
        assert "fma.rn.f32" not in ptx, "a product and a sum are rounded once"
        assert "approx" not in ptx, "a root or a quotient is not rounded to the nearest"
"""


def test_what_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    p, g = nn.Parameter(torch.zeros(6, 8)), torch.zeros(6, 8)
    assert not fits([p], [g]), "there is no GPU"
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    assert fits([p], [g])
    assert fits([p, nn.Parameter(torch.zeros(3, 4))], [g, torch.zeros(3, 4)])
    assert not fits([p, p], [g, torch.zeros(8, 6).t()])
    assert not fits([p, p], [g, g.double()])
    assert not fits([p, p], [g, g.to("meta")])
    assert not fits([p, nn.Parameter(torch.zeros(6, 6))], [g, torch.zeros(6, 6)]), "rows begin at multiples of 16 bytes"
    assert not fits([nn.Parameter(torch.zeros(49)[1:].view(6, 8))], [g])
    assert not fits([nn.Parameter(torch.zeros(8))], [torch.zeros(8)])

    class Elsewhere(torch.Tensor):
        """As DTensor: what it holds is not where data_ptr says."""

    assert not fits([p], [g.as_subclass(Elsewhere)])


@pytest.mark.parametrize("axis", [0, 1])
def test_the_reference_is_an_adamw_for_each_vector(axis: int) -> None:
    """In float64, against torch's, each begun when its vector was."""
    draw = torch.Generator().manual_seed(0)
    p = torch.randn(4, 6, generator=draw, dtype=torch.float64)
    t = torch.zeros((4, 1) if axis == 0 else (1, 6), dtype=torch.float64)
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    alone = [nn.Parameter(x.clone()) for x in p.unbind(axis)]

    def begun(x: Tensor) -> torch.optim.Optimizer:
        return torch.optim.AdamW([x], lr=1e-2, weight_decay=0.1)

    optimizers = list(map(begun, alone))
    for step in range(9):
        if step in (2, 5):
            for tensor in (m, v, t):
                tensor.select(axis, step % 4).zero_()
            optimizers[step % 4] = begun(alone[step % 4])
        g = torch.randn(4, 6, generator=draw, dtype=torch.float64)
        reference.step_(p, g, m, v, t, 1e-2, (0.9, 0.999), 1e-8, 1 - 1e-3)
        for x, optimizer, part in zip(alone, optimizers, g.unbind(axis), strict=True):
            x.grad = part.clone()
            optimizer.step()
    torch.testing.assert_close(p, torch.stack([x.detach() for x in alone], axis), rtol=0, atol=1e-14)


def test_they_compute_what_their_reference_does() -> None:
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    tests = Path(__file__).with_name("vector_adam_interpreted.py")
    run("-m", "pytest", "-p", "no:cacheprovider", tests, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def test_they_compile(tmp_path: Path) -> None:
    """For a GPU that is not here: the interpreter takes what the compiler refuses."""
    pytest.importorskip("triton", reason="Triton is there on Linux only")
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    run(script, TRITON_CACHE_DIR=str(tmp_path))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("axis", [0, 1])
def test_on_a_gpu_a_step_is_that_of_torchs_fused_kernel(axis: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kernels in (True, False):
        if not kernels:
            monkeypatch.setattr(op, "runs_on", lambda device: False)
        draw = torch.Generator("cuda").manual_seed(0)
        sizes = ((192, 768), (768, 192), (192, 768), (40, 36))
        ps = [nn.Parameter(torch.randn(size, generator=draw, device="cuda")) for size in sizes]
        optimizer = Optimizer([{"params": ps}], [Vectors(axis)], lr=1e-2, weight_decay=0.1)
        for t in range(6):
            for p in ps:
                p.grad = torch.randn(p.shape, generator=draw, device="cuda")
            optimizer.void = torch.tensor(float(t == 3), device="cuda") if t > 1 else None
            optimizer.step()
            for value in optimizer.state[ps[0]].values():
                value.select(axis, t)[...] = 0
        found.append([(p.detach(), *optimizer.state[p].values()) for p in ps])
    for got, want in zip(*found, strict=True):
        for x, y in zip(got, want, strict=True):  # where torch computes moments in fp32, 1 − β2 is off by 1e-5
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)
