"""Layers of other quantisers: called as they are, and nothing else is asked of them."""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import rankshift as rs
from rankshift.core.base import storage_of
from rankshift.core.errors import UnsupportedLayer
from rankshift.core.site import Site, place, spec_of
from rankshift.storage.opaque import MAKERS, Opaque

CODES = torch.randint(-7, 8, (6, 8), generator=torch.Generator().manual_seed(0), dtype=torch.int8)


def seeded(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Buffered(nn.Module):
    """As GPTQ's: codes, scales and bias are buffers, sizes have other names, and a kernel goes with the mode."""

    def __init__(self, bias: bool = True, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.infeatures, self.outfeatures = 8, 6
        self.register_buffer("qweight", CODES.clone())
        self.register_buffer("scales", seeded(6, 1, seed=1, dtype=dtype).abs())
        self.register_buffer("bias", seeded(6, seed=2, dtype=dtype) if bias else None)
        self.calls: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(self.training)
        y = x @ (self.qweight * self.scales).to(x.dtype).t()
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Told(nn.Module):
    """As HQQ's: a parameter of codes, and plain attributes."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.in_features, self.out_features, self.compute_dtype = 8, 6, torch.bfloat16
        self.W_q = nn.Parameter(CODES.clone(), requires_grad=False)
        self.meta = {"scale": seeded(6, 1, seed=1, dtype=torch.bfloat16)}
        self.bias = seeded(6, seed=2, dtype=torch.bfloat16) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ (self.W_q * self.meta["scale"]).to(x.dtype).t()
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Scaled(nn.Module):
    """As EETQ's: no sizes at all, (in, out)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(CODES.t().contiguous(), requires_grad=False)
        self.weight_scales = nn.Parameter(seeded(6, seed=1, dtype=torch.float16), requires_grad=False)
        self.bias = None

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.weight_scales).to(x.dtype)


class Tagged(torch.Tensor):
    """A weight that is a class of its own, as torchao's."""

    def __deepcopy__(self, memo: object) -> Tensor:
        return nn.Parameter(self.detach().clone(), requires_grad=False)


def subclassed() -> nn.Linear:
    layer = nn.Linear(8, 6)
    layer.weight = nn.Parameter(seeded(6, 8).as_subclass(Tagged), requires_grad=False)
    layer.bias.requires_grad_(False)
    return layer


LAYERS: dict[str, tuple[Callable[[], nn.Module], type, str]] = {
    "gptqmodel.nn_modules.qlinear.torch": (Buffered, Buffered, "GPTQ"),
    "awq.modules.linear.gemm": (lambda: Buffered(bias=False), Buffered, "AWQ"),
    "hqq.core.quantize": (Told, Told, "HQQ"),
    "optimum.quanto.nn.qlinear": (lambda: Told(bias=False), Told, "quanto"),
    "transformers.integrations.eetq": (Scaled, Scaled, "EETQ"),
    "torchao.dtypes.affine": (subclassed, Tagged, "torchao"),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[nn.Module]:
    """A layer whose class says that it is from one of these packages."""
    make, kind, _ = LAYERS[request.param]
    monkeypatch.setattr(kind, "__module__", request.param)
    module = types.ModuleType(request.param)
    setattr(module, kind.__name__, kind)  # copies look for it there
    monkeypatch.setitem(sys.modules, request.param, module)
    return make()


class Model(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.before, self.layer, self.after = nn.Linear(8, 8), layer, nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.tanh(self.layer(self.before(x))))


def maker(layer: nn.Module) -> str:
    described = Opaque.describe(layer)
    assert described is not None
    return described["kind"]


def test_it_is_known_and_measured(layer: nn.Module) -> None:
    assert storage_of(layer) is Opaque
    assert maker(layer) in {name for _, _, name in LAYERS.values()} & set(MAKERS.values())
    spec = spec_of(Model(layer), "layer")
    dtype = {"HQQ": torch.bfloat16, "quanto": torch.bfloat16, "EETQ": torch.float16}.get(maker(layer), torch.float32)
    assert (spec.out, spec.into, spec.dtype, spec.device) == (6, 8, dtype, torch.device("cpu"))


def test_it_is_called_as_it_is(layer: nn.Module) -> None:
    base, x = Opaque.over(layer), seeded(2, 3, 8).requires_grad_()
    y = base.linear(x)
    assert torch.equal(y, layer(x))
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert dx.shape == x.shape
    bias = getattr(layer, "bias", None)
    assert base.bias is bias
    if bias is not None:
        bias.data.mul_(1e4)  # so that little of the product is left in the sum
        without = copy.deepcopy(layer)
        without.bias.data.zero_()
        assert torch.equal(base.product(x), without(x))
    assert getattr(layer, "bias", None) is bias
    assert base.restore() is layer
    assert not base.stored


def test_what_needs_the_weight_says_whose_it_is(layer: nn.Module) -> None:
    base, at, name = Opaque.over(layer), torch.tensor([0]), maker(layer)
    asks: list[Callable[[], object]] = [
        base.rows, base.dense, base.plainly, lambda: base.packed, lambda: base.columns(at, slice(0, 6)),
        lambda: base.put_(at, torch.zeros(6, 1)), lambda: base.add_(lambda rows: torch.zeros(6, 8)[rows]),
        lambda: base.rewrite_(lambda weight: None),
    ]  # fmt: skip
    for ask in asks:
        with pytest.raises(UnsupportedLayer, match=name):
            ask()
    assert not base.changed
    assert not base.exact


def test_moves_modes_and_names_are_those_of_the_layer(layer: nn.Module) -> None:
    model, twin = Model(layer), Model(copy.deepcopy(layer))
    names = model.state_dict().keys()
    site = place(model, spec_of(model, "layer"))
    assert isinstance(site, Site)
    assert {name.replace("layer.base.", "layer.") for name in model.state_dict()} == names
    model.eval()
    assert not layer.training
    model.train()
    assert layer.training
    for tensor in site.base.state_dict().values():
        tensor.copy_(tensor * 0)
    site.base.load_state_dict(twin.layer.state_dict())
    x = seeded(3, 8)
    assert torch.equal(site(x), twin.layer(x))
    copied = copy.deepcopy(model)
    assert copied.layer.base.layer is not layer
    assert torch.equal(copied.layer(x), twin.layer(x))
    model.to(torch.float64)
    moved, tensors = twin.to(torch.float64).layer, site.base.layer.state_dict()
    assert {k: v.dtype for k, v in tensors.items()} == {k: v.dtype for k, v in moved.state_dict().items()}


def test_hooks_run_once(layer: nn.Module) -> None:
    model, calls = Model(layer), []
    layer.register_forward_hook(lambda *args: calls.append(1))
    run = rs.attach(model, rs.LoRA(rank=2, targets=["layer"]))
    model(seeded(3, 8))
    assert len(calls) == 1
    with run.disabled():
        model(seeded(3, 8))
    assert len(calls) == 2


@pytest.mark.parametrize("method", [rs.LoRA(rank=2, targets=["layer"]), rs.VeRA(rank=4, targets=["layer"]),
                                    rs.MELoRA(rank=2, blocks=2, targets=["layer"]),
                                    rs.LoRA(rank=2, dropout=0.3, targets=["layer"]),
                                    rs.PaCA(rank=2, targets=["layer"])],
                         ids=["lora", "vera", "melora", "dropout", "paca"])  # fmt: skip
def test_what_stands_beside_it_trains(layer: nn.Module, method: rs.Method, tmp_path: Path) -> None:
    model, x = Model(layer), seeded(16, 8)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with torch.no_grad():
        was = model(x)
    run = rs.attach(model, method)
    torch.manual_seed(0)
    optimizer = run.optimizer(lr=0.05)
    losses = []
    for _ in range(10):
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.99 * losses[0]
    with run.disabled():
        assert torch.equal(model(x), was)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())
    model.eval()
    with torch.no_grad():
        now = model(x)
        with pytest.raises(UnsupportedLayer, match=maker(layer)):
            run.merge()
        with pytest.raises(UnsupportedLayer, match=r"layer\.weight"), run.merged():
            pass
        run.save(tmp_path / "saved")
        assert torch.equal(model(x), now), "a merge that was refused changed the function"


@pytest.mark.parametrize("method", [rs.LoRA(rank=2, dora=True, targets=["layer"]),
                                    rs.LoRA(rank=2, init="pissa", targets=["layer"]),
                                    rs.FlatLoRA(rank=2, targets=["layer"]),
                                    rs.ReLoRA(rank=2, every=10, lossy=True, targets=["layer"]),
                                    rs.SwitchLoRA(rank=2, targets=["layer"]),
                                    rs.PaCA(rank=2, select="weight_norm", targets=["layer"]),
                                    rs.PaCA(rank=2, redraw_every=5, targets=["layer"]),
                                    rs.GaLore(rank=2, targets=["layer"]),
                                    rs.Full()],
                         ids=["dora", "pissa", "flat", "relora", "switch", "norm", "redraw", "galore", "full"],
                         )  # fmt: skip
def test_what_needs_the_weight_is_refused_before_training(layer: nn.Module, method: rs.Method) -> None:
    model = Model(layer)
    with pytest.raises(rs.RankshiftError, match=maker(layer)):
        rs.attach(model, method)
    assert model.layer is layer, "the model is as it was"


def test_what_is_not_a_linear_layer_of_theirs_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Table(nn.Module):
        pass

    monkeypatch.setattr(Table, "__module__", "hqq.core.embedding")
    assert storage_of(Table()) is None
    monkeypatch.setattr(Told, "__module__", "transformers.integrations.finegrained_fp8")
    grouped = Told()
    assert storage_of(grouped) is Opaque
    grouped.n_groups = 2  # several matrices
    assert storage_of(grouped) is None
    monkeypatch.setattr(Told, "__module__", "somebody.hqq")
    assert storage_of(Told()) is None
    monkeypatch.setattr(Told, "__module__", "hqq")
    replaced = Told()
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    assert storage_of(replaced) is None, "accelerate's offloading calls the old forward by itself"
    monkeypatch.setattr(Tagged, "__module__", "torchao.dtypes")
    embedding = nn.Embedding(6, 8, _weight=seeded(6, 8).as_subclass(Tagged))
    assert storage_of(embedding) is None
