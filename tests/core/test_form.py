"""Forms: one (out, in) matrix, every layer kind. The oracle is the layer itself with another weight."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from rankshift.core.form import ExpertsForm
from rankshift.core.site import form_of

D = torch.float64


def convs():
    for dims, mode, stride, dilation, padding in itertools.product(
        (1, 2, 3), ("zeros", "circular", "reflect", "replicate"), (1, 2), (1, 2), (0, 1, "same", "valid")
    ):
        if padding == "same" and stride != 1:
            continue
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        kernel = (3, 2, 1)[:dims]
        if padding == 1:
            padding = (1, 1, 0)[:dims]
        layer = kind(3, 5, kernel, stride=stride, dilation=dilation, padding=padding, padding_mode=mode, dtype=D)
        yield layer, torch.randn(2, 3, *(8, 7, 3)[:dims], dtype=D)


LAYERS = [
    (nn.Linear(6, 5, dtype=D), torch.randn(2, 3, 6, dtype=D)),
    (Conv1D(5, 6).double(), torch.randn(2, 3, 6, dtype=D)),
    (nn.Embedding(7, 5, dtype=D), torch.randint(0, 7, (2, 3))),
    *convs(),
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # torch's, for the plain layer too
@pytest.mark.parametrize(("layer", "x"), LAYERS, ids=lambda v: str(v) if isinstance(v, nn.Module) else "")
def test_a_form_is_the_layer(layer: nn.Module, x: torch.Tensor):
    form = form_of(layer)
    assert form is not None
    W = form.matrix(layer.weight)
    out, into = W.shape
    assert out == 5
    assert torch.equal(form.stored(W), layer.weight)
    bias = None if isinstance(layer, nn.Embedding) else layer.bias
    torch.testing.assert_close(form.apply(x, W, bias), layer(x), rtol=1e-10, atol=1e-10)
    # a product of two matrices acts as the layer with that weight
    A, B = torch.randn(2, into, dtype=D), torch.randn(out, 2, dtype=D)
    twin = form.expand(form.apply(x, A), B)
    with torch.no_grad():
        layer.weight.copy_(form.stored(B @ A))
    expected = layer(x)
    if bias is not None:
        expected = form.shift(expected, -bias)
    torch.testing.assert_close(twin, expected, rtol=1e-10, atol=1e-10)
    vector = torch.randn(out, dtype=D)
    torch.testing.assert_close(form.scale(twin, vector), form.expand(form.apply(x, A), vector[:, None] * B))
    torch.testing.assert_close(form.shift(twin, vector) - twin, form.shift(torch.zeros_like(twin), vector))


@pytest.mark.parametrize(
    ("layer", "x"), [pair for pair in LAYERS if not isinstance(pair[0], nn.Embedding)],
    ids=lambda v: str(v) if isinstance(v, nn.Module) else "",
)  # fmt: skip
def test_columns_are_what_the_matrix_multiplies(layer: nn.Module, x: torch.Tensor):
    form = form_of(layer)
    assert form is not None
    M = torch.randn(4, form.matrix(layer.weight).shape[1], dtype=D)
    y = form.apply(x, M)
    if y.dim() > 2 and not form.pointwise:
        y = y.movedim(1, -1)
    torch.testing.assert_close(form.columns(x) @ M.t(), y, rtol=1e-10, atol=1e-10)
    if not form.pointwise:
        torch.testing.assert_close(form.columns(x[0]), form.columns(x[:1]))  # a convolution takes an unbatched input


@pytest.mark.parametrize("transposed", [False, True])
def test_stacks(transposed: bool):
    form = ExpertsForm(3, transposed)
    weight = torch.randn(3, 6, 5, dtype=D) if transposed else torch.randn(3, 5, 6, dtype=D)
    assert form.matrix(weight).shape == (3, 5, 6)
    assert torch.equal(form.stored(form.matrix(weight)), weight)
    x = torch.randn(3, 4, 6, dtype=D)
    want = torch.stack([x[e] @ form.matrix(weight)[e].t() for e in range(3)])
    torch.testing.assert_close(form.apply(x, form.matrix(weight)), want)
    A, B = torch.randn(3, 2, 6, dtype=D), torch.randn(3, 5, 2, dtype=D)
    torch.testing.assert_close(form.expand(form.apply(x, A), B), form.apply(x, B @ A))


def test_kinds_without_a_form():
    class Louder(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    for layer in (nn.LayerNorm(3), nn.Conv2d(4, 4, 1, groups=4), nn.Embedding(3, 3, sparse=True), Louder(3, 3)):
        assert form_of(layer) is None
