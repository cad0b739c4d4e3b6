"""A base that lends columns: what it holds, what it says that it holds, and what others write into it meanwhile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankshift as rs
from rankshift.core.base import Base, Dense, Slab
from rankshift.core.form import ExpertsForm
from rankshift.core.site import form_of

F64 = torch.float64


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "linear": nn.Linear(6, 4),
        "transposed": Conv1D(4, 6),
        "conv": nn.Conv2d(3, 4, (1, 2)),
        "channels last": nn.Conv2d(3, 4, (1, 2)).to(memory_format=torch.channels_last),
    }


KINDS = list(layers())


class Guest:
    """A tenant without a method: some columns, and what it writes there."""

    def __init__(self, base: Base, at: Tensor):
        self.base, self.occupied = base, at
        self.origin = nn.Parameter(base.columns(at, slice(0, base.out_features)), False)

    def enter(self) -> None:
        if self.base.tenant is None:
            self.origin.data.copy_(self.base.columns(self.occupied, slice(0, self.base.out_features)))
        self.base.put_(self.occupied, self.origin + 1.0)
        self.base.house(self)

    def leave(self) -> None:
        self.base.put_(self.occupied, self.origin)
        self.base.house(None)


def matrix(layer: nn.Module) -> Tensor:
    """The (out, in) weight, by hand."""
    weight = layer.weight.detach()
    return (weight.t() if isinstance(layer, Conv1D) else weight.flatten(1)).clone()


@pytest.mark.parametrize("kind", KINDS)
def test_columns_are_read_and_written(kind: str):
    layer = layers()[kind]
    form = form_of(layer)
    assert form is not None
    base, W, at = Dense(layer, form), matrix(layer), torch.tensor([0, 3, 5])
    got = base.columns(at, slice(1, 3))
    assert torch.equal(got, W[1:3][:, at])
    version, place = layer.weight._version, layer.weight.data_ptr()
    values = torch.arange(12.0, dtype=F64).reshape(4, 3)
    base.put_(at, values)
    assert torch.equal(got, W[1:3][:, at]), "columns() is a copy"
    W[:, at] = values.float()
    assert torch.equal(matrix(layer), W)
    assert torch.equal(base.rows(), W)
    assert layer.weight.data_ptr() == place
    assert layer.weight._version > version, "a write that autograd does not see would corrupt a backward"
    assert not base.changed, "who writes columns gives them back"


@pytest.mark.parametrize("kind", KINDS)
def test_the_weight_is_that_without_the_tenants_columns(kind: str):
    """rows() does not see them, add_() works below them, and what stood there comes back to the bit."""
    layer = layers()[kind]
    form = form_of(layer)
    assert form is not None
    base, W, at = Dense(layer, form), matrix(layer), torch.tensor([1, 2])
    guest = Guest(base, at)
    guest.enter()
    guest.enter()
    stored = W.clone()
    stored[:, at] += 1
    assert torch.equal(matrix(layer), stored)
    assert torch.equal(base.rows(), W)
    assert torch.equal(base.rows(slice(1, 3)), W[1:3])
    assert "tenant" not in dict(base.named_modules())
    change = torch.randn(W.shape, generator=torch.Generator().manual_seed(1))
    base.add_(lambda rows: change[rows])
    assert base.changed
    assert base.tenant is guest
    assert torch.equal(base.rows(), W + change)
    stored = W + change
    stored[:, at] += 1
    assert torch.equal(matrix(layer), stored)
    guest.leave()
    assert base.tenant is None
    assert torch.equal(matrix(layer), W + change)


def test_who_can_be_a_host():
    assert Dense.hosts
    assert not Slab.hosts
    stack = nn.Module()
    stack.w = nn.Parameter(torch.zeros(2, 3, 4))
    slab = Slab(stack, "w", ExpertsForm(2))
    with pytest.raises(NotImplementedError):
        slab.columns(torch.tensor([0]), slice(0, 3))
    with pytest.raises(NotImplementedError):
        slab.put_(torch.tensor([0]), torch.zeros(3, 1))


def test_a_convolution_in_channels_last_runs_as_it_came():
    """To the bit, with no copy of its weight in another layout."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(6, 8, 3)).to(memory_format=torch.channels_last)
    x = torch.randn(2, 6, 9, 9).to(memory_format=torch.channels_last)
    plain = model(x)
    run = rs.attach(model, rs.LoRA(rank=2, targets=("0",)))
    with run.disabled():
        assert torch.equal(model(x), plain)
        assert model(x).is_contiguous(memory_format=torch.channels_last)


def placed() -> tuple[nn.Sequential, rs.Run, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    W = model[0].weight.detach().clone()
    run = rs.attach(model, rs.PaCA(rank=2))
    with torch.no_grad():
        for adapter in run.adapter().values():
            adapter.D.normal_(generator=torch.Generator().manual_seed(3))  # type: ignore[operator, union-attr]
    model(torch.zeros(1, 6))
    assert not torch.equal(run.sites["0"].base.weight, W)
    return model, run, W


def test_columns_are_given_back_for_the_length_of_a_block():
    _, run, W = placed()
    weight = run.sites["0"].base.weight
    lent = weight.detach().clone()
    with run._on.returned():
        assert torch.equal(weight, W)
        with run._on.returned():
            assert torch.equal(weight, W)
        assert torch.equal(weight, W), "the end of an inner block does not end the outer one"
    assert torch.equal(weight, lent)
    with pytest.raises(ZeroDivisionError), run._on.returned():
        raise ZeroDivisionError
    assert torch.equal(weight, lent)


def test_what_a_state_holds_of_the_base_stays_without_the_columns():
    """The state's tensors are the live ones, but for a weight that is about to get its columns back."""
    _, run, W = placed()
    run.sites["0"].base.add_(lambda rows: torch.zeros(5, 6)[rows])
    assert run.changed == {"0.weight"}
    state = run.state_dict()["tensors"]
    assert torch.equal(state["base/0.weight"], W)
    assert not any("origin" in name for name in state), "what follows from the base is not saved"
