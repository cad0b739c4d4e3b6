"""The kernel of ops/column_write under Triton's interpreter, on the CPU: see kernels_interpreted.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from rankshift.ops import column_write
from rankshift.ops.column_write import Layer, op, reference, triton

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.fixture(autouse=True)
def _as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "runs_on", lambda device: True)
    op._table.cache_clear()


def made(out: int, into: int, rank: int, dtype: torch.dtype = FP16, scale: float = 0.3) -> Layer:
    draw = torch.Generator().manual_seed(out + rank)
    W, origin = (torch.randn(out, n, generator=draw).to(dtype) for n in (into, rank))
    D = torch.randn(out, rank, generator=draw)
    if dtype is BF16:  # the interpreter does not round to the nearest
        origin, D, scale = origin.round(), D.round(), 0.5
    return Layer(W, D, origin, torch.randperm(into, generator=draw)[:rank].sort().values, scale)


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("rank", [1, 5, 16, 64, 70])
def test_columns_are_those_of_the_reference(rank: int, dtype: torch.dtype) -> None:
    """Layers of several sizes and scales, one of them rows of a larger weight, and one of another rank."""
    layers = [
        made(1, 70, rank, dtype),
        made(37, 73, rank, dtype, 2.0),
        made(16, 130, rank, dtype),
        made(40, 9, 3, dtype),
    ]
    whole = torch.randn(60, 73).to(dtype)
    layers[1] = layers[1]._replace(W=whole[11:48])
    assert all(column_write.fits(layer) for layer in layers)
    wants = [layer.W.clone() for layer in layers]
    above, below = whole[:11].clone(), whole[48:].clone()
    for layer, want in zip(layers, wants, strict=True):
        reference.write_(want, *layer[1:])
    kept = [[t.clone() for t in layer[1:4]] for layer in layers]
    versions = [layer.W._version for layer in layers]
    column_write.write_(layers)
    for layer, want, version, inputs in zip(layers, wants, versions, kept, strict=True):
        assert torch.equal(layer.W, want)
        assert layer.W._version > version
        assert all(torch.equal(t, was) for t, was in zip(layer[1:4], inputs, strict=True))
    assert torch.equal(whole[:11], above)
    assert torch.equal(whole[48:], below)


def test_a_table_lasts_as_long_as_tensors_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[object] = []
    send = op.sent
    monkeypatch.setattr(op, "sent", lambda *args: sent.append(args) or send(*args))
    layer = made(20, 30, 4)
    for moved in (None, None, "D", "W", None, "scale"):
        if moved == "scale":
            layer = layer._replace(scale=0.7)
        elif moved:
            layer = layer._replace(**{moved: getattr(layer, moved).clone()})
        layer.D.add_(1)
        layer.channels.copy_(torch.randperm(30)[:4])
        want = layer.W.clone()
        reference.write_(want, *layer[1:])
        column_write.write_([layer])
        assert torch.equal(layer.W, want)
    assert len(sent) == 4


@pytest.mark.parametrize("every", [None, 2])
def test_training_is_that_without_the_kernel(every: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with a layer that it does not take, one of another rank, a change by hand and the way back."""
    launched: list[int] = []
    launch = triton.launch
    monkeypatch.setattr(
        triton, "launch", lambda table, *rest: (launched.append(table.shape[1]), launch(table, *rest))[1]
    )
    found: list[list[Tensor]] = []
    for kernel in (True, False):
        monkeypatch.setattr(op, "runs_on", lambda device, kernel=kernel: kernel)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(10, 12), nn.Linear(12, 12), nn.Linear(12, 12)]
            model = nn.Sequential(*layers, nn.Unflatten(1, (2, 6)), nn.Conv1d(2, 4, 3)).half()
        base = [p.detach().clone() for p in model.parameters()]
        run = rs.attach(
            model, rs.PaCA(rank=4, rank_pattern={"2": 3, "4": 1}, targets=("0", "1", "2", "4"), redraw_every=every)
        )
        optimizer = run.optimizer(lr=1e-2)
        x = torch.randn(5, 10, generator=torch.Generator().manual_seed(1)).half()
        seen = []
        for step in range(5):
            run.model(x).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            seen += [site.base.weight.detach().clone() for site in run.sites.values()]
            versions = [site.base.weight._version for site in run.sites.values()]
            run.model(x)
            assert versions == [site.base.weight._version for site in run.sites.values()], "forward wrote again"
            if step == 2:
                with torch.no_grad():
                    run.adapter("default")["1"].D.add_(0.5)
        found.append(seen)
        if every is None:
            run.detach()
            assert all(torch.equal(p, was) for p, was in zip(model.parameters(), base, strict=True))
    assert launched == [2, 1] * 5
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))
