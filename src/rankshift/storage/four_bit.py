"""4 bits a weight: nf4 (QLoRA, Dettmers et al. 2023, arXiv 2305.14314) and fp4, in the layout of bitsandbytes.

    Ŵ = c_k · q[i]      q: 16 levels      c_k: largest magnitude in block k of 64 numbers along the flattened rows
    c_k = μ + ĉ_k       double quantisation: ĉ_k in 8 bits, blocks of 256 of them share a scale; μ their mean over W

4.127 bits a weight with double quantisation, 4.5 without. Codes, two a byte, the first in the high half. What is held
is what bitsandbytes makes, bit for bit: its own layers are taken as they are and given back. Numbers in fp32 are held
as their bits, because FSDP2's mixed precision would round what it takes for a weight; codes are sharded as they are.

Some columns may be held apart, in the compute dtype: those that PaCA trains (QPaCA). Where the weight came dense, they
are the original ones, and the codes are made with zeros in their place, so that they widen no block's range.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import bitsandbytes
import torch
from bitsandbytes.functional import QuantState
from torch import Tensor, nn

from rankshift.core.errors import UnsupportedLayer
from rankshift.ops.four_bit import NESTED, dequantised, levels_on, merged
from rankshift.storage.quantised import Held, Layout, fresh


@dataclass(frozen=True)
class FourBitLayout(Layout):
    """Tensors: codes (⌈out·in/2⌉, 1) uint8; absmax, uint8 with double quantisation, else bits of fp32; and with it
    scales, bits of fp32: μ, then one for each 256 of them."""

    adds: ClassVar[bool] = True
    quant_type: str
    block: int
    nested: bool

    def dense(self, *packed: Tensor) -> Tensor:
        dtype = torch.float32 if self.dtype is torch.float64 else self.dtype
        return self._unpacked(packed, dtype).to(self.dtype)

    def fill(self, out: Tensor, *packed: Tensor) -> None:
        if out.dtype is torch.float64:  # which bitsandbytes does not unpack to
            super().fill(out, *packed)
        else:
            self._unpacked(packed, out.dtype, out)

    def merged(self, B: Tensor, A: Tensor, *packed: Tensor) -> Tensor:
        if A.dtype.itemsize > 2:
            return super().merged(B, A, *packed)
        codes, absmax, *scales = packed
        return merged(codes, absmax, scales[0] if scales else None, self.shape, self.block, self.quant_type, B, A)

    def _unpacked(self, packed: tuple[Tensor, ...], dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        codes, absmax, *scales = packed
        return dequantised(
            codes, absmax, scales[0] if scales else None, self.shape, self.block, self.quant_type, dtype, out
        )

    def state(self, absmax: Tensor, scales: Tensor | None) -> QuantState:
        """As bitsandbytes wants it; no tensor is copied but μ and the scales' view."""
        code = bitsandbytes.functional.get_4bit_type(self.quant_type, device=absmax.device)
        common = {
            "shape": torch.Size(self.shape), "code": code, "blocksize": self.block, "quant_type": self.quant_type,
            "dtype": torch.float32 if self.dtype is torch.float64 else self.dtype,
        }  # fmt: skip
        if scales is None:
            return QuantState(absmax.view(torch.float32), **common)
        numbers = scales.view(torch.float32)
        inner = QuantState(
            numbers[1:], code=levels_on(absmax.device), blocksize=NESTED, dtype=torch.float32
        )  # of absmax − μ
        return QuantState(absmax, **common, offset=numbers[0], state2=inner)


class FourBit(Held):
    """A linear layer's weight in 4 bits."""

    layout: FourBitLayout
    names: ClassVar[tuple[str, ...]] = ("codes", "absmax", "scales")

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.layout.quant_type

    @classmethod
    def describe(cls, module: nn.Module) -> dict[str, Any] | None:
        """What quantisation a layer is in; None if it is none of these."""
        if not isinstance(module, bitsandbytes.nn.Linear4bit):
            return None
        state = getattr(module.weight, "quant_state", None)
        if state is None:
            return None
        return {"kind": state.quant_type, "block": state.blocksize, "nested": state.nested}

    @classmethod
    def quantised(  # type: ignore[override]
        cls, weight: Tensor, kind: str, block: int = 64, nested: bool = True
    ) -> tuple[Layout, list[Tensor]]:
        numbers = (weight.float() if weight.dtype is torch.float64 else weight).contiguous()
        if not bool(torch.linalg.vector_norm(numbers, torch.inf).isfinite()):
            raise UnsupportedLayer(
                "it has weights that are not finite in fp32, and they would be the scale of the others."
            )
        codes, state = bitsandbytes.functional.quantize_4bit(
            numbers, blocksize=block, compress_statistics=nested, quant_type=kind
        )
        layout, tensors = cls._opened(codes, state)
        return replace(layout, dtype=weight.dtype), tensors

    @property
    def options(self) -> dict[str, Any]:
        return {"block": self.layout.block, "nested": self.layout.nested}

    @classmethod
    def taken(cls, module: nn.Module) -> tuple[Layout, list[Tensor]]:
        assert isinstance(module, bitsandbytes.nn.Linear4bit)
        state = module.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            raise UnsupportedLayer(
                "A layer in 4 bits was called in eval() on the CPU, where bitsandbytes repacks its codes and rounds "
                "their scales to bf16. Attach before that: load the model again."
            )
        return cls._opened(module.weight.data.view(torch.uint8).reshape(-1, 1), state)

    @staticmethod
    def _opened(codes: Tensor, state: QuantState) -> tuple[FourBitLayout, list[Tensor]]:
        out, into = state.shape
        layout = FourBitLayout((out, into), state.dtype, state.quant_type, state.blocksize, state.nested)
        if not state.nested:
            return layout, [codes, state.absmax.view(torch.int32)]
        if state.state2.blocksize != NESTED or not torch.equal(state.state2.code, levels_on(codes.device)):
            raise UnsupportedLayer("its absmax values are quantised in another way than bitsandbytes does it.")
        scales = torch.cat([state.offset.reshape(1).float(), state.state2.absmax]).view(torch.int32)
        return layout, [codes, state.absmax, scales]

    def plain(self) -> Any:
        """A layer of bitsandbytes with these codes."""
        (out, into), dtype = self.layout.shape, self.layout.dtype
        layer = bitsandbytes.nn.Linear4bit(
            into, out, False, dtype, self.layout.nested, self.layout.quant_type, device="meta"
        )
        codes, absmax, *scales = self.settled()
        state = self.layout.state(absmax, scales[0] if scales else None)
        layer.weight = bitsandbytes.nn.Params4bit(
            codes.detach(), requires_grad=False, quant_state=state, blocksize=self.layout.block,
            compress_statistics=self.layout.nested, quant_type=self.layout.quant_type, module=layer, bnb_quantized=True,
        )  # fmt: skip
        layer.quant_state = state
        return fresh(layer, self)
