"""Which base a run was trained on: a few values of every weight that the run does not hold itself.

Values are kept as bf16, so that the same model in fp32, fp16 or bf16 is the same base, and a fine-tuned sibling is not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.base import storage_of
from rankshift.core.errors import CorruptFile, WrongBase, nearest
from rankshift.core.site import Replica, Site, base_parameters, walk

_SAMPLES = 16  # values per tensor, evenly spread over it


def take(model: nn.Module, skip: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Shape, dtype and samples of the base's parameters by name. Under sharding every rank must call this.

    Left out are the parameters in ``skip`` and those of modules that are trained as copies: they do not act.
    """
    held = set(skip)
    copied = tuple(f"{name}." for name, module, _ in walk(model) if isinstance(module, Replica))
    storages = _storages(model)
    return {
        name: {"shape": list(p.shape), "dtype": str(p.dtype).removeprefix("torch."), "values": _hex(_sample(p))}
        | ({"storage": storages[name]} if name in storages else {})
        for name, p, _ in base_parameters(model)
        if name not in held and not name.startswith(copied)
        if p.device.type != "meta" and p.numel()
    }


def _storages(model: nn.Module) -> dict[str, str]:
    """What the tensors of quantised weights are held in, by their names."""
    found = {}
    for name, module, _ in walk(model):
        if isinstance(module, Site):
            stored = list(module.base.stored) if module.base.kind != "dense" else []
            found.update({f"{name}.{leaf}": module.base.kind for leaf in stored})
        elif (storage := storage_of(module)) is not None:
            kind = storage.name_of(module)
            found.update({f"{name}.{leaf}": kind for leaf, _ in module.named_parameters() if leaf != "bias"})
    return found


def compare(model: nn.Module, taken: Mapping[str, Mapping[str, Any]], where: object) -> None:
    """Raise WrongBase naming the first weight of ``model`` that is not the one whose fingerprint was taken."""
    here: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))  # untied there may be tied here
    here |= {name: p for name, p, _ in base_parameters(model)}  # a run's own model knows its base by these names
    for name, print_ in taken.items():
        if "storage" in print_ and (name not in here or list(here[name].shape) != list(print_["shape"])):
            raise WrongBase(
                f"{where} was trained on a base in {print_['storage']}, and {name.rpartition('.')[0]} is not held so "
                f"here.\nLoad the model as it was loaded there."
            )
        if name not in here:
            raise WrongBase(
                f"{where} was trained on a model that has {name}; this {type(model).__name__} does not. "
                f"{nearest(name, here)}\nLoad the model that it was trained on."
            )
        if list(here[name].shape) != list(print_["shape"]):
            raise WrongBase(
                f"{where} was trained on a model whose {name} is {tuple(print_['shape'])}; here it is "
                f"{tuple(here[name].shape)}.\nLoad the model that it was trained on."
            )
    for name, print_ in taken.items():
        p = here[name]
        if p.device.type == "meta":
            continue
        if not _same(_sample(p), _values(print_["values"], where), str(p.dtype), str(print_["dtype"])):
            raise WrongBase(
                f"{where} was trained on a base with other values in {name} (the first that differs).\n"
                "Load the model that it was trained on, or pass check_base=False if the difference is meant."
            )


def _sample(p: Tensor) -> Tensor:
    """bf16 values on the CPU at positions spread evenly over the whole tensor."""
    count = min(_SAMPLES, p.numel())
    at = (torch.arange(count, dtype=torch.int64) * (p.numel() - 1)).div(max(1, count - 1), rounding_mode="floor")
    return shard.pick(p, at).to(torch.bfloat16).cpu()


def _hex(values: Tensor) -> str:
    return values.view(torch.uint8).numpy().tobytes().hex()


def _values(text: str, where: object) -> Tensor:
    try:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.bfloat16)
    except (TypeError, ValueError) as error:
        raise CorruptFile(f"The fingerprint of the base in {where} cannot be read: {error}.") from error


def _same(here: Tensor, there: Tensor, here_dtype: str, there_dtype: str) -> bool:
    if here.shape != there.shape:
        return False
    if _is_half(here_dtype) == _is_half(there_dtype):
        return torch.equal(here.view(torch.int16), there.view(torch.int16))
    # fp16 flushes what is below 6e-8 and rounds subnormals; two roundings may differ by one step of bf16
    return torch.allclose(here.float(), there.float(), rtol=2.0**-7, atol=2.0**-24)


def _is_half(dtype: str) -> bool:
    return dtype.removeprefix("torch.") == "float16"
