"""Holding: a model's frozen linear layers in another storage (``attach(base="nf4")``), and back.

Layers are taken one after the other, and each dense weight is let go before the next is read: there is never a second
copy of the model. Adapters are placed on the dense weights first, so that what they take from them is taken before
anything is rounded: PaCA its columns, PiSSA what it subtracts.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Literal, get_args

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.base import Base, Dense, storage_of
from rankshift.core.errors import (
    AttachError,
    ConfigError,
    MissingFile,
    TargetError,
    UnsupportedLayer,
    WrongBase,
)
from rankshift.core.form import Form
from rankshift.core.method import Method
from rankshift.core.phase import Then
from rankshift.core.site import Site, Spec, linear_layers, perhaps_tied, spec_of, walk
from rankshift.placement import Placement
from rankshift.storage import check_known, held_as
from rankshift.storage.quantised import Held, held_in, marks

_log = logging.getLogger(__name__)

_TAKEN = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_method(method: Method, kind: str, coming: Sequence[Then] = ()) -> None:
    """Raise where a method, or what is to follow it, cannot do with weights held like this whatever the model is; or
    there is no such storage."""
    _check_trains(method, kind, coming)
    side = 1 << 20  # of a layer that no rank is too large for
    spec = Spec("A linear layer", side, side, Form(), torch.float32, torch.device("cpu"))
    with contextlib.suppress(TargetError):  # where such a layer is refused in 32 bits too, the storage is not why
        method.fit(spec)
        spec = replace(spec, storage=kind)
    if spec.storage == kind:
        method.fit(spec)


def _check_trains(method: Method, kind: str, coming: Sequence[Then]) -> None:
    check_known(kind)
    if method.trains_base:
        raise ConfigError(
            f'{type(method).__name__} trains the weights of the model, and base="{kind}" holds them rounded, for good. '
            "Leave base=None, or train beside them: LoRA, VeRA, PaCA, MELoRA."
        )
    if coming:
        raise ConfigError(
            f"{type(method).__name__} is to go on as {type(coming[0].method).__name__}, and a phase that ends folds "
            f'what it trained into the weights: base="{kind}" would round most of that away. Give one method, or leave '
            "base=None."
        )


def check(placement: Placement, method: Method, kind: str, coming: Sequence[Then] = ()) -> None:
    """Raise, before anything changes, where a method or the model cannot do with weights held like this."""
    model, storage = placement.model, held_as(kind)
    _check_trains(method, kind, coming)
    specs = [spec_of(model, name) for name in method.sites(model)]
    for spec in specs:
        method.fit(replace(spec, storage=kind) if type(spec.form) is Form else spec)
    layers = _layers(model, specs)
    if not layers:
        raise ConfigError(f'base="{kind}" holds linear layers, and there is none in {type(model).__name__}.')
    for spec in layers:
        if spec.storage not in ("dense", kind):
            raise UnsupportedLayer(
                f'{spec.name} is held in {spec.storage} already, and base="{kind}" would round it once more. Leave '
                "base=None to train on it as it is, or load the model in 16 bits."
            )
        if spec.storage == "dense" and spec.device.type == "meta":
            raise ConfigError(
                f'{spec.name} has no values yet (device meta). Load the weights, then attach base="{kind}".'
            )
        if spec.storage == "dense" and spec.dtype not in _TAKEN:
            raise UnsupportedLayer(f'{spec.name} is in {spec.dtype}: base="{kind}" takes weights in 16 or 32 bits.')
    storage.check({spec.device for spec in layers})


def check_kind(model: nn.Module, kind: str) -> None:
    """Raise ConfigError where there is no such storage, or the model's device cannot compute with it."""
    held_as(kind).check({parameter.device for parameter in model.parameters()})


def check_values(placement: Placement, method: Method, kind: str) -> None:
    """Raise where a weight that :func:`hold` would put into a storage has values that it cannot, before it does."""
    held_as(kind).check_values(_to_hold(placement, method), kind)


def _to_hold(placement: Placement, method: Method) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of the dense layers that a storage is to take."""
    sites = placement.sites
    for spec in _layers(placement.model, [site.spec for site in sites.values()]):
        site = sites.get(spec.name)
        if site is not None and isinstance(site.base, Dense):
            yield spec.name, site.base.dense()
        elif site is None and spec.storage == "dense" and not method.in_place(spec.weight, adapted=False):
            yield spec.name, placement.model.get_parameter(spec.weight)


def hold(
    placement: Placement, method: Method, kind: str, fresh: bool, kept: Mapping[str, Sequence[int]] | None = None
) -> float:
    """Put the model's linear layers into a storage, adapted or not, but for what the method trains where it is. A layer
    without an adapter is the base itself. Interrupted, it leaves some layers in the storage.

    Args:
        fresh: adapters stand as they were made, and measure anew what they know of the weight.
        kept: columns that stay as they are, by site; by default those that adapters name.

    Returns:
        How far adapted layers are off now, ‖Ŵ − W‖ / ‖W‖ on average.
    """
    model, storage = placement.model, held_as(kind)
    sites, off = placement.sites, []
    for spec in _layers(model, [site.spec for site in sites.values()]):
        site = sites.get(spec.name)
        if site is None:
            parent, _, leaf = spec.name.rpartition(".")
            module = model.get_submodule(spec.name)
            if storage_of(module) is not None:
                setattr(model.get_submodule(parent), leaf, storage.over(module).alone())
            elif not method.in_place(spec.weight, adapted=False):
                setattr(model.get_submodule(parent), leaf, storage.of(Dense(module, Form()), kind).alone())
            del module  # and with it its weight, before the next is read
            continue
        if isinstance(site.base, Dense):
            adapters = [site[name] for name in site.adapters]
            if kept is None:
                named = [columns for adapter in adapters if (columns := adapter.keeps) is not None]
                keep = torch.unique(torch.cat(named)) if named else None
            else:
                keep = torch.tensor(kept.get(spec.name, ()), dtype=torch.int64, device=site.base.weight.device)
            site.leave()
            before = site.base.dense().detach()
            site.rest_on(storage.of(site.base, kind, keep))
            off.append(_off(before, site.base.dense()))
            del before
            for adapter in adapters if fresh else ():
                adapter.rebased()
    left = [name for name, site in sites.items() if not isinstance(site.base, Held)]
    if left:
        _log.warning(
            'base="%s" holds linear layers; %s%s stay as they are.',
            kind, ", ".join(left[:3]), f" and {len(left) - 3} more" if left[3:] else "",
        )  # fmt: skip
    return mean(off) if off else 0.0


Onto = Literal["dequantised", "original", "requantised"]


class Originals:
    """The weights that a base had before it was rounded, by the names of the model's parameters.

    Args:
        source: a model, a mapping, or a directory with the safetensors files of one.
    """

    def __init__(self, source: nn.Module | Mapping[str, Tensor] | str | Path):
        if isinstance(source, nn.Module):
            source = dict(source.named_parameters(remove_duplicate=False))
        self._tensors = source if isinstance(source, Mapping) else None
        self._files: dict[str, Path] = {}
        if isinstance(source, (str, Path)):
            for file in sorted(Path(source).glob("*.safetensors")):
                with safe_open(file, "pt") as tensors:
                    self._files.update(dict.fromkeys(tensors.keys(), file))
            if not self._files:
                raise MissingFile(f"There are no safetensors files in {source}.\nName the directory of the base.")

    def check(self, name: str, shape: tuple[int, int]) -> None:
        """Raise WrongBase unless there is a weight of this name and shape."""
        found = tuple(self[name].shape) if name in (self._files or self._tensors or {}) else None
        if found != shape:
            has = "lacks it" if found is None else f"has {found} there"
            raise WrongBase(f"{name} is {shape} here, and the original base {has}: it is another model.")

    def __getitem__(self, name: str) -> Tensor:
        if self._tensors is not None:
            return self._tensors[name]
        with safe_open(self._files[name], "pt") as tensors:
            tensor: Tensor = tensors.get_tensor(name)
            return tensor


def targets(
    placement: Placement, onto: Onto, original: nn.Module | Mapping[str, Tensor] | str | Path | None
) -> tuple[Callable[[Site], Base | None], Originals | None]:
    """What each site is to be folded onto, see :func:`rankshift.placement.fold`. Every refusal comes here.

    Raises:
        ConfigError: no base is held in fewer bits, or the originals were not named.
        WrongBase: the originals are of another model.
    """
    held = {name: base for name, module, _ in walk(placement.model) if (base := held_in(module)) is not None}
    if onto not in get_args(Onto):
        raise ConfigError(f"onto={onto!r} is none of {', '.join(get_args(Onto))}.")
    if onto != "dequantised" and not held:
        raise ConfigError(f'onto="{onto}": no weight of this model is held in fewer bits. Leave onto out.')
    if (onto == "original") != (original is not None):
        raise ConfigError(
            'onto="original" and original= belong together: name the base as it was before it was rounded, a model, a '
            "mapping of its tensors or a directory."
        )
    originals = None if original is None else Originals(original)
    if originals is not None:
        for name, base in held.items():
            originals.check(f"{name}.weight", base.layout.shape)

    def target(site: Site) -> Base | None:
        if not isinstance(site.base, Held) or onto == "dequantised":
            return None
        if originals is None:
            return site.base
        return Dense(site.base.dequantised(originals[site.spec.weight]), site.base.form)

    return target, originals


def refuse_sharded(placement: Placement, onto: Onto) -> None:
    """Raise AttachError where dense weights would take the place of what FSDP2 has sharded."""
    model = placement.model
    if onto == "requantised" or not any(held_in(module) is not None for _, module, _ in walk(model)):
        return
    if any(map(shard.is_sharded, model.parameters())):  # whether codes are among what is sharded or were left out
        raise AttachError(
            "The base is held in fewer bits and sharded by FSDP2, which knows no dense weights in their place. Save "
            'the run and merge it in one process (rs.load, or "rankshift merge"), export it with format="merged", or '
            'merge onto="requantised".'
        )


def release(model: nn.Module, dense: bool, originals: Originals | None = None) -> None:
    """Put plain layers where bases stand by themselves; with ``dense``, dense ones, and for every quantised layer."""
    for name, module in list(model.named_modules()):
        base = held_in(module)
        if base is None or not (dense or isinstance(module, Held)):
            continue
        parent, _, leaf = name.rpartition(".")
        weight = None if originals is None else originals[f"{name}.weight"]
        setattr(model.get_submodule(parent), leaf, base.dequantised(weight) if dense else base.restore())
    for place, key in marks(model) if dense else ():  # saved as it is, it would be loaded wrongly
        del place[key]


def _off(before: Tensor, after: Tensor) -> float:
    """‖after − before‖ / ‖before‖."""
    wide = torch.promote_types(before.dtype, torch.float32)
    norm = torch.linalg.vector_norm(before, dtype=wide)
    return float(torch.linalg.vector_norm(after - before, dtype=wide) / norm.clamp_min(torch.finfo(wide).tiny))


def _layers(model: nn.Module, specs: Sequence[Spec]) -> list[Spec]:
    """The linear layers at sites, and of the body those that can be held: not what is read without being called, nor
    what shares its weight, nor what transformers says is to stay in 32 bits (T5's wo, which it never quantises)."""
    found = {spec.name: spec for spec in specs}
    alone = []
    for name in linear_layers(model):
        if name not in found:
            with contextlib.suppress(UnsupportedLayer):
                alone.append(_spec(model, name))
    tied = {spec.name for spec in perhaps_tied(model, [spec for spec in alone if spec.storage == "dense"])}
    wide = [name for module in model.modules() for name in getattr(module, "_keep_in_fp32_modules", None) or ()]
    return [
        spec
        for spec in (*specs, *alone)
        if type(spec.form) is Form and spec.name not in tied and not any(f".{w}." in f".{spec.name}." for w in wide)
    ]


def _spec(model: nn.Module, name: str) -> Spec:
    module = model.get_submodule(name) if name else model
    return module.spec if isinstance(module, Site) else spec_of(model, name)


def kept(placement: Placement) -> dict[str, list[int]]:
    """Which columns are held beside as the weights' own, by site."""
    bases = {name: site.base for name, site in placement.sites.items() if isinstance(site.base, Held)}
    return {name: base.at[base.own].tolist() for name, base in bases.items() if len(base.own)}
