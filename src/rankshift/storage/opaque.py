"""Layers that another quantiser made and that keep their weight to themselves: GPTQ, AWQ, HQQ, torchao and others.

What can be asked of such a layer is y = W x + bias, as it computes it. That is enough for what stands beside it: LoRA,
VeRA, MELoRA. What reads the weight (DoRA, PiSSA) or writes it (a merge, ReLoRA) is refused. A layer is known by the
package that its class, or the class of its weight, is from.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, NoReturn, Self

import torch
from torch import Tensor, nn

from rankshift.core.base import Base
from rankshift.core.errors import UnsupportedLayer
from rankshift.core.form import Form

MAKERS: dict[str, str] = {
    "aqlm": "AQLM",
    "auto_gptq": "GPTQ",
    "auto_round": "AutoRound",
    "awq": "AWQ",
    "compressed_tensors": "compressed-tensors",
    "eetq": "EETQ",
    "fp_quant": "FP-Quant",
    "gptqmodel": "GPTQ",
    "hqq": "HQQ",
    "optimum.quanto": "quanto",
    "quanto": "quanto",
    "spqr_quant": "SpQR",
    "torchao": "torchao",
    "transformers.integrations.bitnet": "BitNet",
    "transformers.integrations.compressed_tensors": "compressed-tensors",
    "transformers.integrations.eetq": "EETQ",
    "transformers.integrations.fbgemm_fp8": "FBGEMM",
    "transformers.integrations.finegrained_fp8": "block-wise fp8",
    "transformers.integrations.gemma_quant": "Gemma",
    "transformers.integrations.higgs": "HIGGS",
    "transformers.integrations.metal_quantization": "Metal",
    "transformers.integrations.nvfp4": "NVFP4",
    "vptq": "VPTQ",
}
"""Package of a layer's class, or of its weight's, and who made it."""

_SIZES = (("out_features", "in_features"), ("outfeatures", "infeatures"))


class Opaque(Base):
    """A layer that is called and not looked into. Takes its tensors over; copies nothing."""

    exact: ClassVar[bool] = False
    storage: ClassVar[bool] = False

    def __init__(self, module: nn.Module):
        super().__init__()
        self.form = Form()
        self._layer = (module,)  # in a tuple, hidden from nn.Module: it must not appear in names
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self.out_features, self.in_features, _, _ = self.measure(module)

    @classmethod
    def describe(cls, module: nn.Module) -> dict[str, Any] | None:
        """Who quantised a layer; None if it is not one of these, or its forward was replaced on the instance."""
        if "forward" in vars(module):
            return None
        maker = _maker(type(module))
        if maker is None and isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
            maker = _maker(type(module._parameters.get("weight")))
        return None if maker is None or _sizes(module) is None else {"kind": maker}

    @classmethod
    def name_of(cls, module: nn.Module) -> str:
        described = cls.describe(module)
        assert described is not None
        return str(described["kind"])

    @classmethod
    def over(cls, module: nn.Module, dtype: torch.dtype | None = None) -> Self:
        return cls(module)

    @classmethod
    def measure(cls, module: nn.Module, dtype: torch.dtype | None = None) -> tuple[int, int, torch.dtype, torch.device]:
        """What the layer computes in is a guess: the dtype of its bias, what it says, or that of its first tensor in 16
        bits or more; else fp16."""
        sizes = _sizes(module)
        assert sizes is not None
        bias, said = getattr(module, "bias", None), getattr(module, "compute_dtype", None)
        floats = [t for t in _tensors(module) if t.is_floating_point() and t.element_size() > 1]
        dtype = bias.dtype if isinstance(bias, Tensor) else said
        if not isinstance(dtype, torch.dtype):
            dtype = floats[0].dtype if floats else torch.float16
        return *sizes, dtype, next(_tensors(module), torch.empty(0)).device

    @property
    def kind(self) -> str:  # type: ignore[override]
        return self.name_of(self.layer)

    @property
    def layer(self) -> nn.Module:
        return self._layer[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.measure(self.layer)[2]

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """What the layer calls so, else the first of its tensors: for their device."""
        named = self._parameters.get("weight")
        return next(_tensors(self.layer)) if named is None else named

    @property
    def bias(self) -> Tensor | None:  # type: ignore[override]
        bias: Tensor | None = getattr(self.layer, "bias", None)
        return bias

    @property
    def stored(self) -> dict[str, Tensor]:
        """None: nothing here is ever written."""
        return {}

    def linear(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer.forward(x)
        return y

    def product(self, x: Tensor) -> Tensor:
        """By a layer of the same tensors without bias: what was added and rounded does not come off again."""
        if self.bias is None:
            return self.linear(x)
        bare: Any = copy.copy(self.layer)
        bare._parameters, bare._buffers = dict(self._parameters), dict(self._buffers)
        bare.bias = None
        y: Tensor = bare.forward(x)
        return y

    # ---- what needs the weight

    def _refuse(self, why: str, what: str = "This layer's weight") -> NoReturn:
        raise UnsupportedLayer(
            f"{what} was quantised by {self.kind}, which keeps it to itself: {why}. What stands beside it works (LoRA, "
            'VeRA, MELoRA). For the rest load the model in 16 bits and attach with base="nf4", "int8" or "fp8".'
        )

    def check_open(self, name: str) -> None:
        self._refuse("it can be neither read nor written", f"{name}.weight")

    @property
    def packed(self) -> tuple[Tensor, ...]:
        self._refuse("it cannot be read")

    def dense(self) -> Tensor:
        self._refuse("it cannot be read")

    def rows(self, rows: slice = slice(None)) -> Tensor:
        self._refuse("it cannot be read")

    def columns(self, at: Tensor, rows: slice) -> Tensor:
        self._refuse("its columns cannot be read")

    def put_(self, at: Tensor, values: Tensor) -> None:
        self._refuse("its columns cannot be written")

    def add_(self, delta: Callable[[slice], Tensor]) -> None:
        self._refuse("nothing can be merged into it")

    def rewrite_(self, how: Callable[[Tensor], None]) -> None:
        self._refuse("it cannot be trained")

    def plainly(self) -> Base:
        self._refuse("nothing can be merged into it")

    # ---- the layer again, and what nn.Module asks of it meanwhile

    def restore(self) -> nn.Module:
        return self.layer

    def train(self, mode: bool = True) -> Self:
        self.training = mode
        self.layer.train(mode)
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        self.layer._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.layer._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.layer._load_from_state_dict(*args)


def _maker(kind: type) -> str | None:
    parts = kind.__module__.split(".")
    return next((MAKERS[name] for name in itertools.accumulate(parts, "{}.{}".format) if name in MAKERS), None)


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """Out and in, as the layer calls them; None if it says nothing of them, or multiplies by several matrices."""
    if hasattr(module, "n_groups"):
        return None
    for names in _SIZES:
        out, into = (getattr(module, name, None) for name in names)
        if isinstance(out, int) and isinstance(into, int):
            return out, into
    weight, scales = (module._parameters.get(name) for name in ("weight", "weight_scales"))
    if weight is not None and scales is not None and weight.dim() == 2 and scales.dim() == 1:
        return len(scales), weight.numel() // len(scales)  # transformers' EETQ layers: (in, out)
    return None


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
