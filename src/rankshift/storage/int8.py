"""8 bits a weight in the layout of bitsandbytes (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339).

    Ŵ = q · a / 127      q: int8      a: largest magnitude in a row of W in fp16

What is held is what bitsandbytes' ``Linear8bitLt`` makes, bit for bit: its layers are taken as they are and given back.

Only the weight is in 8 bits: x Ŵᵀ is a product in the dtype of x. ``Linear8bitLt`` rounds x to 8 bits too, with columns
of large values apart, and multiplies by the dequantised weight in backward, so that its gradient is not that of its
forward. Here training, evaluation and gradient are one function; a layer that was given back rounds x again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import bitsandbytes
import torch
from torch import Tensor, nn

from rankshift.core.errors import UnsupportedLayer
from rankshift.ops.row_scaled import row_scaled
from rankshift.storage.quantised import Held, Layout, fresh


@dataclass(frozen=True)
class Int8Layout(Layout):
    """Tensors: codes (out, in) int8; a, (out,), the bits of fp32 as int32. bitsandbytes calls them CB and SCB."""

    stacks: ClassVar[int] = 2
    threshold: float = 6.0
    """Of the layer that is given back: columns of x with a larger value stay in 16 bits there."""

    @property
    def computes(self) -> None:
        """As ``Linear8bitLt``, in the dtype of the input."""
        return None

    def dense(self, *packed: Tensor) -> Tensor:
        codes, absmax = packed
        wide = torch.promote_types(self.dtype, torch.float32)
        return row_scaled(codes, absmax.view(torch.float32).to(wide) / 127, self.dtype)

    def times(self, x: Tensor, bias: Tensor | None, *packed: Tensor) -> Tensor:
        return super(Int8Layout, replace(self, dtype=x.dtype)).times(x, bias, *packed)

    def back(self, dY: Tensor, *packed: Tensor) -> Tensor:
        return super(Int8Layout, replace(self, dtype=dY.dtype)).back(dY, *packed)


class Int8(Held):
    """A linear layer's weight in 8 bits."""

    kind: ClassVar[str] = "int8"
    via: ClassVar[torch.dtype] = torch.float16
    layout: Int8Layout
    names: ClassVar[tuple[str, ...]] = ("codes", "absmax")

    @classmethod
    def describe(cls, module: nn.Module) -> dict[str, Any] | None:
        """Whether a layer is of this storage: not one of bitsandbytes that still holds 16 bits."""
        held = isinstance(module, bitsandbytes.nn.Linear8bitLt) and module.weight.dtype is torch.int8
        return {"kind": cls.kind} if held and _absmax(module) is not None else None

    @classmethod
    def quantised(  # type: ignore[override]
        cls, weight: Tensor, kind: str = kind, threshold: float = 6.0
    ) -> tuple[Layout, list[Tensor]]:
        codes, absmax, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16).contiguous())
        if not bool(absmax.isfinite().all()):
            raise UnsupportedLayer(
                "it has weights that are not finite in fp16, which bitsandbytes makes of them first."
            )
        out, into = weight.shape
        return Int8Layout((out, into), weight.dtype, threshold), [codes, absmax.view(torch.int32)]

    @property
    def options(self) -> dict[str, Any]:
        return {"threshold": self.layout.threshold}

    @classmethod
    def taken(cls, module: nn.Module) -> tuple[Layout, list[Tensor]]:
        """What the layer computes in, it does not say: the dtype of its bias, else fp16."""
        assert isinstance(module, bitsandbytes.nn.Linear8bitLt)
        codes, absmax = module.weight.data, _absmax(module)
        assert absmax is not None
        dtype = torch.float16 if module.bias is None else module.bias.dtype
        out, into = codes.shape
        return Int8Layout((out, into), dtype, module.state.threshold), [codes, absmax.view(torch.int32)]

    @classmethod
    def says_dtype(cls, module: nn.Module) -> bool:
        return module.bias is not None

    def plain(self) -> Any:
        """A layer of bitsandbytes with these codes."""
        out, into = self.layout.shape
        layer = bitsandbytes.nn.Linear8bitLt(into, out, False, False, self.layout.threshold, device="meta")
        codes, absmax = (tensor.detach() for tensor in self.settled())
        layer.weight = bitsandbytes.nn.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=absmax.view(torch.float32)
        )
        return fresh(layer, self)


def _absmax(module: Any) -> Tensor | None:
    """SCB, which a first forward moves from the weight to the layer's state."""
    found: Tensor | None = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    return found
