"""8 bits a weight as floating-point numbers, e4m3 (Micikevicius et al. 2022, arXiv 2209.05433), multiplied as such.

    Ŵ = diag(s) Wq        s: largest magnitude in a row of W, or in W, / 448      Wq: e4m3, largest value 448
    y = x̂ Ŵᵀ + bias       x̂: x in e4m3, with a scale for each row (token)
    dX = ĝ Wq             ĝ: dY diag(s) in e4m3, likewise

Both factors are in 8 bits, so tensor cores multiply at twice the rate of bf16. This is another function than that of a
16-bit base: rounding x, W and dY costs about 3 % of each number. Evaluation and training are one.

In dX the sum runs over the rows of W, so their scales do not come out of it: they go into dY before that is rounded,
which is the same product. dY is in e4m3 too, not in e5m2: with a scale for each row the range of e4m3 is enough, 2¹⁷
down from the largest number, and a bit of mantissa more halves the error.

Hopper multiplies numbers in 8 bits only where the summed axis is innermost in both factors: rows of W in the forward,
columns in the backward. So Wq is held twice, once transposed, 2 bytes a weight, as in bf16. ``backward="bf16"`` does
without: 1 byte, and dX = dY Ŵ in 16 bits, from Ŵ unpacked for each backward.

Where x is in fp32 or float64, there is no 16-bit product to replace: it is multiplied by Ŵ as it is. Where 16-bit x
meets no such tensor cores (a CPU; rows or columns that are no multiple of 16), both are rounded all the same and their
product is taken in fp32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from rankshift.core.errors import ConfigError, UnsupportedLayer
from rankshift.ops.fp8 import E4M3, check, product, rounded_rows, rounded_whole
from rankshift.ops.frozen_linear import frozen_linear
from rankshift.ops.products import accumulate
from rankshift.ops.row_scaled import row_scaled
from rankshift.storage.quantised import Beside, Held, Layout, fresh, shown

Scaling = Literal["row", "tensor"]
Backward = Literal["fp8", "bf16"]
_LARGEST = 448.0  # of e4m3
_TINY = 1e-30  # the scale of zeros


@dataclass(frozen=True)
class FP8Layout(Layout):
    """Tensors: codes (out, in), the bits of e4m3 as uint8; s, (out,) or (1,), the bits of fp32 as int32; with
    ``backward="fp8"`` the codes transposed, (in, out)."""

    scaling: Scaling = "row"
    backward: Backward = "fp8"

    @property
    def stacks(self) -> int:  # type: ignore[override]
        return 2 if self.scaling == "row" else 0

    def dense(self, *packed: Tensor) -> Tensor:
        wide = torch.promote_types(self.dtype, torch.float32)
        return row_scaled(packed[0], packed[1].view(torch.float32).to(wide), self.dtype)

    def times(self, x: Tensor, bias: Tensor | None, *packed: Tensor) -> Tensor:
        return self.times_without(None, x, bias, *packed) if rounds(x) else super().times(x, bias, *packed)

    def times_without(self, at: Tensor | None, x: Tensor, bias: Tensor | None, *packed: Tensor) -> Tensor:
        """x Wᵀ + bias in 8 bits, without the columns ``at`` of both."""
        if at is not None:
            x = x.index_fill(1, at, 0)
        rounded, sizes = rounded_rows(x) if self.scaling == "row" else rounded_whole(x)
        codes, scales = packed[0].view(E4M3), packed[1].view(torch.float32)
        return product(rounded, codes, sizes, scales, bias, x.dtype)

    def back(self, dY: Tensor, *packed: Tensor) -> Tensor:
        if self.backward == "bf16" or not rounds(dY):
            return super().back(dY, *packed)
        scales, transposed = packed[1].view(torch.float32), packed[2].view(E4M3)
        if self.scaling == "row":
            rounded, sizes = rounded_rows(dY, scales)
            scales = torch.ones(len(transposed), dtype=torch.float32, device=dY.device)
        else:
            rounded, sizes = rounded_whole(dY)
        return product(rounded, transposed, sizes, scales, None, dY.dtype)

    @property
    def beside(self) -> FP8Beside:
        return FP8Beside(self)


@dataclass(frozen=True)
class FP8Beside(Beside):
    """The columns beside are multiplied by themselves, in 16 bits; what the codes have in their place is left out."""

    layout: FP8Layout

    def times(self, x: Tensor, bias: Tensor | None, *packed: Tensor) -> Tensor:
        if not rounds(x):
            return super().times(x, bias, *packed)
        columns, at, *rest = packed
        y = self.layout.times_without(at, x, bias, *rest)
        return accumulate(y, x.index_select(1, at), columns.to(x.dtype).t())

    def back(self, dY: Tensor, *packed: Tensor) -> Tensor:
        if self.layout.backward == "bf16" or not rounds(dY):
            return super().back(dY, *packed)
        columns, at, *rest = packed
        return self.layout.back(dY, *rest).index_copy_(1, at, dY @ columns.to(dY.dtype))


def rounds(x: Tensor) -> bool:
    """Whether a factor of this dtype is rounded to 8 bits."""
    return x.dtype in (torch.bfloat16, torch.float16)


class FP8(Held):
    """A linear layer's weight in e4m3."""

    kind: ClassVar[str] = "fp8"
    layout: FP8Layout
    names: ClassVar[tuple[str, ...]] = ("codes", "scales", "transposed")

    @classmethod
    def check(cls, devices: set[torch.device]) -> None:
        for device in devices:
            check(device)

    @classmethod
    def describe(cls, module: nn.Module) -> dict[str, Any] | None:
        if not isinstance(module, FP8Linear):
            return None
        return {"kind": cls.kind, "scaling": module.layout.scaling, "backward": module.layout.backward}

    @classmethod
    def quantised(  # type: ignore[override]
        cls, weight: Tensor, kind: str = kind, scaling: Scaling = "row", backward: Backward = "fp8"
    ) -> tuple[Layout, list[Tensor]]:
        out, into = weight.shape
        layout = FP8Layout((out, into), weight.dtype, *_known(scaling, backward))
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        largest = torch.linalg.vector_norm(wide, torch.inf, dim=1 if scaling == "row" else None).reshape(-1)
        if not bool(largest.isfinite().all()):
            raise UnsupportedLayer("it has weights that are not finite, and they would be the scale of the others.")
        scales = (largest / _LARGEST).clamp_min_(_TINY).to(torch.float32)
        codes = (wide / scales.to(wide.dtype)[:, None]).to(E4M3).view(torch.uint8)
        tensors = [codes, scales.view(torch.int32)]
        return layout, tensors if backward == "bf16" else [*tensors, codes.t().contiguous()]

    @property
    def options(self) -> dict[str, Any]:
        return {"scaling": self.layout.scaling, "backward": self.layout.backward}

    @classmethod
    def taken(cls, module: nn.Module) -> tuple[Layout, list[Tensor]]:
        assert isinstance(module, FP8Linear)
        cls.check({module.codes.device})
        return module.layout, [tensor.detach() for tensor in module.packed]

    def plain(self) -> FP8Linear:
        """A layer of our own, since there is no other of this kind."""
        out, into = self.layout.shape
        layer = FP8Linear(into, out, False, self.layout.dtype, **self.options, device="meta")
        for name, tensor in zip(self.names, self.settled(), strict=False):
            setattr(layer, name, nn.Parameter(tensor.detach(), requires_grad=False))
        fresh(layer, self)
        return layer


class FP8Linear(nn.Module):
    """A frozen linear layer in e4m3, as this storage gives it back and takes it.

    Its state_dict holds the tensors of :class:`FP8Layout`; make one of the same shape and options to load them.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        scaling: Scaling = "row",
        backward: Backward = "fp8",
        device: torch.device | str | None = None,
    ):
        super().__init__()
        dtype = torch.get_default_dtype() if dtype is None else dtype
        self.in_features, self.out_features = in_features, out_features
        self.layout = FP8Layout((out_features, in_features), dtype, *_known(scaling, backward))

        def zeros(*shape: int, of: torch.dtype = torch.uint8) -> nn.Parameter:
            return nn.Parameter(torch.zeros(shape, dtype=of, device=device), requires_grad=False)

        self.codes = zeros(out_features, in_features)
        self.scales = zeros(out_features if scaling == "row" else 1, of=torch.int32)
        self.transposed = zeros(in_features, out_features) if backward == "fp8" else None
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=dtype, device=device)) if bias else None

    @property
    def packed(self) -> tuple[Tensor, ...]:
        """The tensors of the layout."""
        return (self.codes, self.scales) if self.transposed is None else (self.codes, self.scales, self.transposed)

    @property
    def weight(self) -> Tensor:
        """Its shape, dtype and device; see :func:`rankshift.storage.quantised.shown`."""
        return shown(self.layout, self.codes.device)

    def forward(self, x: Tensor) -> Tensor:
        return frozen_linear(x, self.bias, self.layout, self.packed)

    def extra_repr(self) -> str:
        layout = self.layout
        return f"{self.in_features}, {self.out_features}, scaling={layout.scaling!r}, backward={layout.backward!r}"


def _known(scaling: Scaling, backward: Backward) -> tuple[Scaling, Backward]:
    for name, value, kind in (("scaling", scaling, Scaling), ("backward", backward, Backward)):
        if value not in get_args(kind):
            raise ConfigError(f"fp8 has {name}={value!r}; it knows {' and '.join(map(repr, get_args(kind)))}.")
    return scaling, backward
