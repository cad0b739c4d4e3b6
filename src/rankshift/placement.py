"""Placement: what of a run stands on its model. Adapters at sites, modules copied whole, tensors trained in place."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.base import Base, storage_of
from rankshift.core.errors import (
    AttachError,
    ConfigError,
    RankTooLarge,
    TargetError,
    UnmatchedTarget,
    UnsupportedLayer,
    nearest,
)
from rankshift.core.event import Event, Needs
from rankshift.core.kin import kin
from rankshift.core.method import Estate, Method, Shared, Subspace
from rankshift.core.random import Key
from rankshift.core.site import (
    Replica,
    Site,
    Spec,
    base_parameters,
    check_tied,
    matches,
    perhaps_tied,
    place,
    place_replica,
    prefixes,
    remove,
    returned,
    running_statistics,
    spec_of,
    untie,
    walk,
)

_log = logging.getLogger(__name__)

DEFAULT = "default"
WITHOUT_BIAS = 'LoRA(lora_bias=False), PCLoRA(bias="match")'  # whose change is one of weights alone, where those are
_RESERVED = ("base", "buffer", "original", "watch")  # kinds of tensors in a state, beside the adapters


@dataclass
class Member:
    """One adapter of a run: its method, and the rank at each of its sites."""

    method: Method
    ranks: dict[str, int]
    shared: Shared | None = None  # what its sites share
    projected: Mapping[str, Spec] = field(default_factory=dict)  # weights whose gradients it projects, by name


class Placement:
    """The adapters of a model by name, which of them act, and everything that trains."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.members: dict[str, Member] = {}
        self.active: tuple[str, ...] = ()
        self.sites: dict[str, Site] = {}  # by the name of the layer
        self.projected: Mapping[str, Spec] = {}  # weights whose gradients are projected, by name
        self._audience: tuple[Any, list[tuple[Event, Sequence[Adapter]]]] | None = None
        self.originals: dict[str, Tensor] = {}  # of base tensors that train in place and can be put back
        self.undo: list[Callable[[], None]] | None = None  # what build did to the base; where it is a list, it is kept
        self._kept: list[Base] = []
        self.frozen = frozenset(name for name, p, _ in base_parameters(model) if not p.requires_grad)  # before the run

    # ---- placing

    def plan(
        self, method: Method, data: Iterable[Any] | None = None, ranks: Mapping[str, int] | None = None
    ) -> tuple[list[Spec], dict[str, Spec], tuple[str, ...]]:
        """The layers, projected weights and whole modules a method will take. Every refusal comes here; nothing is
        changed."""
        model = self.model
        specs = [spec_of(model, site) for site in (method.sites(model) if ranks is None else ranks)]
        projected = method.projects(model)
        copies = _copies(model, method)
        specs = [s for s in specs if not any(s.name == c or s.name.startswith(c + ".") for c in copies)]
        if method.trains_base:
            check_dense(model, method)
        if method.trains_base:
            self._check_frozen(method, {spec.weight for spec in specs} | projected.keys())
            specs = [spec for spec in specs if spec.weight not in self.frozen]
        for spec in specs:
            try:
                method.fit(spec)
            except RankTooLarge:
                if ranks is None:  # what was trained elsewhere may have a rank that is merely of no use
                    raise
        if method.needs_data and data is None and ranks is None:
            raise ConfigError(
                f"{type(method).__name__} as configured looks at data before it starts: pass batches, data= of "
                "attach(), run.add() and run.shift(), or calibration= of rs.Trainer."
            )
        if method.tied == "refuse":
            for spec in perhaps_tied(model, [*specs, *projected.values()]):
                check_tied(model, spec)
        return specs, projected, copies

    def _in_place(self, method: Method) -> set[str]:
        """Weights of the base that a method trains where they are, those aside that it projects."""
        return {name for name, _, adapted in base_parameters(self.model) if method.in_place(name, adapted)}

    def _check_frozen(self, method: Method, targets: set[str]) -> None:
        """Raise where a method that trains the base was told to train what is frozen, or finds nothing else."""
        kind, in_place = type(method).__name__, self._in_place(method)
        patterns = [method.targets] if isinstance(method.targets, str) else method.targets
        named = targets or {n for n in in_place if any(matches(part, t) for part in prefixes(n) for t in patterns)}
        told = named & self.frozen if method.targets != type(method).targets else ()
        if told:
            raise TargetError(
                f"{min(told)} is frozen (requires_grad=False), and targets of {kind} name it to be trained in place. "
                "Call requires_grad_(True) on it before attach(), or leave it out of targets."
            )
        if self.frozen and in_place | targets <= self.frozen:
            raise TargetError(
                f"{kind} trains the weights of the model, and all that it would train are frozen "
                "(requires_grad=False). Call model.requires_grad_(True) before attach()."
            )

    def build(
        self,
        name: str,
        method: Method,
        seed: int,
        data: Iterable[Any] | None = None,
        ranks: Mapping[str, int] | None = None,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        """Place an adapter at its sites; with ``ranks`` its values are not filled, because they will be loaded.

        ``saved``: what the run that is being loaded says of what its sites share.
        """
        model, fill = self.model, ranks is None
        refuse_sharded(model, "Placing an adapter")
        specs, projected, copies = self.plan(method, data, ranks)
        found = method.survey(model, specs, data, seed) if fill else {}
        if shared_weights := perhaps_tied(model, [*specs, *projected.values()]):
            for spec in shared_weights:
                tie = untie(model, spec)
                if self.undo is not None:
                    self.undo.append(tie)
            projected = method.projects(model)  # with names of their own
        if method.trains_base:
            if fill and (left := sorted(self.frozen & (self._in_place(method) | projected.keys()))):
                _log.warning(
                    "%s leaves frozen what was so before attach() (requires_grad=False): %s. To train that too, call "
                    "requires_grad_(True) on it before.",
                    type(method).__name__, ", ".join(left[:3]) + (f" and {len(left) - 3} more" if left[3:] else ""),
                )  # fmt: skip
            projected = {name: spec for name, spec in projected.items() if name not in self.frozen}
        elif fill and (woken := sorted(n for n in self.frozen & self._in_place(method) if not n.endswith("bias"))):
            _log.warning(
                '%s trains what was frozen before attach() (requires_grad=False): %s. rest="freeze" leaves it so.',
                type(method).__name__, ", ".join(woken[:3]) + (f" and {len(woken) - 3} more" if woken[3:] else ""),
            )  # fmt: skip
        ranks = dict(ranks) if ranks is not None else {s.name: method.rank_at(s.name, found.get(s.name)) for s in specs}
        shared = method.share(specs, ranks, saved)
        self.members[name] = member = Member(method, {}, shared, projected)
        try:
            for spec in specs:
                site = self.sites[spec.name] = place(model, spec)
                if self.undo is not None:
                    site.base.kept = []
                    self._kept.append(site.base)
                    self.undo.append(site.base.revert_)
                adapter = self._stand(name, site, method, ranks[spec.name], shared)
                if adapter is None:
                    continue
                if fill and spec.device.type != "meta":
                    method.start(adapter, Key(seed) / name / spec.name, found.get(spec.name))
                site.adapters[name] = adapter
                member.ranks[spec.name] = ranks[spec.name]
            for copied in copies:
                replica = place_replica(model, copied)
                replica.copies[name] = copy.deepcopy(replica.base).requires_grad_(True)
                replica.base.requires_grad_(False)
        except BaseException:  # out of memory, Ctrl-C: the model goes back as it came
            self.drop(name)
            raise
        for site in list(self.sites.values()):
            if not site.adapters:
                self._remove(site)
        _introduce(self.adapter(name))

    def settle(self) -> None:
        """What was built stays: keep nothing any more to undo it."""
        self.undo = None
        for base in self._kept:
            base.kept = None
        self._kept = []

    def revert(self) -> None:
        """Once everything is taken off: the base as it was before it was built on, bits and what was one tensor."""
        for step in reversed(self.undo or ()):
            step()
        self.settle()

    def _stand(self, name: str, site: Site, method: Method, rank: int, shared: Shared | None) -> Adapter | None:
        """A new adapter for a site, knowing where it stands and what of it trains."""
        adapter = method.adapt(site.base, site.spec, rank, shared)
        if adapter is not None:
            adapter.site, adapter.label = site.spec.name, name
            adapter.trains = frozenset(leaf for leaf, p in adapter.named_parameters() if p.requires_grad)
            adapter.train(self.model.training)
        return adapter

    def heirs(self, name: str, method: Method, estates: Mapping[str, Estate]) -> tuple[dict[str, Adapter], Member]:
        """Adapters of another method for the places of one, with the values they take over; nothing is placed."""
        for site_name in estates:
            method.fit(self.sites[site_name].spec)
        shared = method.share(
            [self.sites[s].spec for s in estates], {site: estate.rank for site, estate in estates.items()}
        )
        heirs: dict[str, Adapter] = {}
        for site_name, estate in estates.items():
            heir = self._stand(name, self.sites[site_name], method, estate.rank, shared)
            assert heir is not None
            heirs[site_name] = heir
            places = _saved(heir)
            assert places.keys() == estate.tensors.keys(), (
                f"{site_name}: {sorted(places.keys() ^ estate.tensors.keys())}"
            )
            for leaf, tensor in places.items():
                shard.assign_(tensor, estate.tensors[leaf])
        _introduce(heirs)
        ranks = {site: estate.rank for site, estate in estates.items()}
        return heirs, Member(method, ranks, shared, method.projects(self.model))

    def succeed(self, name: str, heirs: Mapping[str, Adapter], member: Member) -> None:
        """Put them in the place of one. Copies stay."""
        for site_name, site in list(self.sites.items()):
            adapters, heir = site.adapters, heirs.get(site_name)
            if name in adapters:
                site.link(other for other in site.active if other != name)
            if heir is not None:
                adapters[name] = heir  # at no time is there neither
            elif name in adapters:
                del adapters[name]
            if not adapters:
                self._remove(site)
        self.members[name] = member

    def drop(self, name: str) -> None:
        """Take an adapter out of every site, and out of the model what then stands empty."""
        del self.members[name]
        for site in list(self.sites.values()):
            if name in site.adapters:
                site.link(other for other in site.active if other != name)
                del site.adapters[name]
            if not site.adapters:
                self._remove(site)
        for path, replica in self.replicas().items():
            if name in replica.copies:
                del replica.copies[name]
            if not replica.copies:
                self._put(path, replica.base)

    def _remove(self, site: Site) -> None:
        remove(self.model, site)
        del self.sites[site.spec.name]

    def strip(self) -> None:
        """Take everything off the model: plain layers, and of whole modules the one that acts."""
        self._audience = None
        for site in self.sites.values():
            site.leave()
            remove(self.model, site)
        for name, replica in self.replicas().items():
            self._put(name, replica.top)

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """Whole modules as they would be after merging, for the length of a ``with`` block."""
        replicas = self.replicas()
        for name, replica in replicas.items():
            self._put(name, replica.top)
        try:
            yield
        finally:
            for name, replica in replicas.items():
                self._put(name, replica)

    def _put(self, name: str, module: nn.Module) -> None:
        parent, _, leaf = name.rpartition(".")
        setattr(self.model.get_submodule(parent), leaf, module)

    def train_in_place(self, method: Method) -> set[str]:
        """Freeze the base but for what the method trains where it is; the names of that."""
        names = set()
        frozen = self.frozen if method.trains_base else frozenset()
        self.projected = next(member.projected for member in self.members.values() if member.method is method)
        copied = tuple(f"{name}." for name in self.replicas())  # there the copies train
        for name, parameter, adapted in base_parameters(self.model):
            chosen = name in self.projected or method.in_place(name, adapted)
            trains = chosen and name not in frozen and not name.startswith(copied)
            parameter.requires_grad_(trains)
            if trains:
                names.add(name)
                if method.reversible and name not in self.originals:
                    self.originals[name] = parameter.detach().clone()
        if method.reversible:  # running statistics move in every forward, whatever trains
            for name, buffer in running_statistics(self.model):
                if name not in self.originals:
                    self.originals[name] = buffer.detach().clone()
        return names

    def movable(self) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of what can be put back to its original."""
        tensors = [*((name, p) for name, p, _ in base_parameters(self.model)), *running_statistics(self.model)]
        return ((name, tensor) for name, tensor in tensors if name in self.originals)

    # ---- switching

    def use(self, *names: str) -> None:
        """Make these adapters act and train, and no other."""
        names = tuple(dict.fromkeys(names))
        for name in names:
            self.known(name)
        if not names and any(p.requires_grad for _, p, _ in base_parameters(self.model)):
            raise AttachError("This run trains biases in place. For the base as it came use run.disabled().")
        for copied, replica in self.replicas().items():
            both = [name for name in names if name in replica.copies]
            if len(both) > 1:
                raise AttachError(f"adapters {both[0]!r} and {both[1]!r} each hold a whole {copied}: use one of them.")
        self.active = names
        for site in self.sites.values():
            site.link(self.active)
            for name in site.adapters:
                for leaf, parameter in site[name].named_parameters():
                    parameter.requires_grad_(name in self.active and leaf in site[name].trains)
        for replica in self.replicas().values():
            replica.link(self.active)
            for name, module in replica.copies.items():
                module.requires_grad_(name in self.active)

    def link(self, active: Sequence[str]) -> None:
        """Let these adapters act, and leave what trains as it is."""
        for site in self.sites.values():
            site.link(active)
        for replica in self.replicas().values():
            replica.link(active)

    def free(self, name: str) -> None:
        """Raise AttachError unless a new adapter can have this name."""
        if name in self.members or name in _RESERVED or not name.isidentifier():
            why = "exists" if name in self.members else "is not a free name like french_v2"
            raise AttachError(f"adapter {name!r} {why}. Adapters here: {', '.join(self.members)}.")

    def known(self, name: str) -> None:
        """Raise AttachError unless there is an adapter of this name."""
        if name not in self.members:
            raise AttachError(f"There is no adapter {name!r}. {nearest(name, self.members)}")

    @contextlib.contextmanager
    def returned(self) -> Iterator[None]:
        """The base's own bits where acting adapters keep columns in it, for the length of a ``with`` block."""
        with returned(self.model):
            yield

    @contextlib.contextmanager
    def original(self) -> Iterator[None]:
        """The model as it came, in eval mode, for a forward while the backward of another is still to come.

        No value is written: adapters are unlinked, and where batch norms keep running statistics stand the original
        ones, as other tensors. (What trains in place has no such form; methods that do it are not asked.)
        """
        training = [module for module in self.model.modules() if module.training]
        moved = {id(tensor): name for name, tensor in running_statistics(self.model) if name in self.originals}
        swapped = [
            (module._buffers, leaf, tensor)
            for module in self.model.modules()
            for leaf, tensor in module._buffers.items()
            if id(tensor) in moved
        ]
        try:
            for module in training:
                module.training = False
            for buffers, leaf, tensor in swapped:
                assert tensor is not None
                buffers[leaf] = self.originals[moved[id(tensor)]].to(tensor.device)
            self.link(())
            yield
        finally:
            self.link(self.active)
            for buffers, leaf, tensor in swapped:
                buffers[leaf] = tensor
            for module in training:
                module.training = True

    # ---- what is here

    def replicas(self) -> dict[str, Replica]:
        """Modules trained whole, by name."""
        return {name: m for name, m, _ in walk(self.model) if isinstance(m, Replica)}

    def adapter(self, name: str) -> dict[str, Adapter]:
        """One adapter's part at each of its sites."""
        self.known(name)
        return {layer: site[name] for layer, site in self.sites.items() if name in site.adapters}

    @property
    def method(self) -> Method:
        """The method of the current phase: that of the first adapter."""
        return self.members[DEFAULT if DEFAULT in self.members else next(iter(self.members))].method

    def trainable(self) -> Iterator[tuple[str, nn.Parameter, Method, str]]:
        """(name, tensor, whose, its name in the adapter or "") of everything that trains: sites, whole copies, base
        parameters in place."""
        for name in self.active:
            prefix, method = "" if name == DEFAULT else f"{name}:", self.members[name].method
            for site, adapter in self.adapter(name).items():
                for leaf, parameter in adapter.named_parameters():
                    if parameter.requires_grad:
                        yield f"{prefix}{site}.{leaf}", parameter, method, leaf
            for site, replica in self.replicas().items():
                if name in replica.copies:
                    for leaf, parameter in replica.copies[name].named_parameters():
                        yield f"{prefix}{site}.{leaf}", parameter, method, ""
        for base_name, parameter, _ in base_parameters(self.model):
            if parameter.requires_grad:
                yield base_name, parameter, self.method, ""

    def required(self) -> Iterator[tuple[str, Tensor, Needs]]:
        """(name, tensor, what its first gradient must be) of everything that trains."""
        for name in self.active:
            for site, adapter in self.adapter(name).items():
                for leaf, parameter in adapter.named_parameters():
                    if parameter.requires_grad:
                        yield f"{site}.{leaf}", parameter, Needs.GRADIENT if leaf in adapter.silent else Needs.NONZERO
            for site, replica in self.replicas().items():
                if name in replica.active:
                    for leaf, parameter in replica.copies[name].named_parameters():
                        yield f"{site}.{leaf}", parameter, Needs.GRADIENT
        for base_name, parameter, _ in base_parameters(self.model):
            if parameter.requires_grad:
                must = self.method.must_learn(base_name)
                yield base_name, parameter, Needs.GRADIENT if must else Needs.NOTHING

    def subspaces(self, states: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Subspace]:
        """Where gradients are projected to, by the name of the weight; ``states``: of the optimizer, by name."""
        adapters = self.adapter(self.active[0]) if self.active else {}
        return self.method.subspaces(self.projected, states, adapters)

    def audience(self) -> Sequence[tuple[Event, Sequence[Adapter]]]:
        """The events of the acting adapters, and where they apply."""
        stands = self.active, [id(member) for member in self.members.values()], len(self.sites)
        if self._audience is None or self._audience[0] != stands:
            found: list[tuple[Event, Sequence[Adapter]]] = []
            for name in self.active:
                if events := self.members[name].method.events():
                    adapters = list(self.adapter(name).values())
                    found += [(event, adapters) for event in events]
            self._audience = stands, found  # it is asked three times an update
        return self._audience[1]

    def added(self) -> dict[str, Tensor]:
        """Every tensor that the base does not have, by ``adapter/layer.tensor``, as it is held here."""
        places: dict[str, Tensor] = {}
        for name in self.members:
            for site, adapter in self.adapter(name).items():
                places.update({f"{name}/{site}.{leaf}": t for leaf, t in _saved(adapter).items()})
            for site, replica in self.replicas().items():
                if name in replica.copies:
                    state = replica.copies[name].state_dict(keep_vars=True)
                    places.update({f"{name}/{site}.{leaf}": tensor for leaf, tensor in state.items()})
        return places

    def kept(self) -> dict[str, Tensor]:
        """Tensors of the base that move or may be put back: ``base/…``, ``buffer/…`` and ``original/…``."""
        tensors: dict[str, Tensor] = {f"base/{name}": p for name, p, _ in base_parameters(self.model)}
        tensors |= {f"buffer/{name}": buffer for name, buffer in running_statistics(self.model)}
        return tensors | {f"original/{name}": tensor for name, tensor in self.originals.items()}


# ---- the weights of a site -------------------------------------------------------------------------------------------


def weight_names(name: str, site: Site) -> list[str]:
    """The names of what holds a site's weight, as parameters of the model."""
    stored = list(site.base.stored)
    return [site.spec.weight] if stored == ["weight"] else [f"{name}.{leaf}" for leaf in stored]


def refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise AttachError on a sharded model: a tensor added to it would not be sharded, nor its gradient reduced."""
    if any(shard.is_sharded(parameter) for parameter in model.parameters()):
        raise AttachError(
            f"{what} adds tensors, and this {type(model).__name__} is sharded already. Attach first, then fully_shard, "
            "then run.optimizer(). In mid-run: state = run.state_dict() on every rank, then on a fresh model "
            "run = rs.restore(model, state), run.shift(method) or run.add(name, method), fully_shard, run.optimizer()."
        )


def check_dense(model: nn.Module, method: Method) -> None:
    """Raise UnsupportedLayer for a method that trains weights, where some are held in fewer bits."""
    for name, module in model.named_modules():
        if (storage := storage_of(module)) is not None:
            raise UnsupportedLayer(
                f"{name} is held in {storage.name_of(module)}, and {type(method).__name__} trains the weights of the "
                "model. Load it in 16 or 32 bits, or train beside its weights: LoRA, VeRA, PaCA, MELoRA."
            )


def check_dtypes(sites: Mapping[str, Site]) -> None:
    """Raise ConfigError where FSDP2 would fail in the first forward: it reduces a group of gradients in one dtype."""
    for name, site in sites.items():
        kinds = {p.dtype for p in site.parameters() if p.requires_grad and shard.is_sharded(p)}
        if len(kinds) > 1:
            both = " and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
            raise ConfigError(
                f"{name} trains tensors in {both}, and FSDP2 takes one dtype: a bias trained in place has the dtype of "
                'the base, factors are wider. Use bias="none", or load the model in fp32 and pass fully_shard a '
                "MixedPrecisionPolicy(param_dtype=torch.bfloat16)."
            )


def fold(site: Site, onto: Base | None = None) -> Callable[[], None]:
    """W += Σ ΔW of the active adapters, in the adapters' dtype, rounded once; the bias likewise; then none acts.

    Where something interrupts it, the site is as it was.

    Args:
        onto: the base to add to, which is the site's from then on; by default its own, or where that rounds to fewer
            bits the same weight as a dense one.

    Returns:
        What puts the base back as it was, bit for bit.
    """
    site.leave()
    active, before, changed = site.active, site.base, site.base.changed
    dense = before.plainly() if onto is None else onto
    written = [*(before.stored.values() if dense is before else ()), before.bias]
    tensors = [tensor for tensor in written if tensor is not None]
    kept = [shard.local(tensor)[0].clone() for tensor in tensors]

    def undo() -> None:
        with torch.no_grad():
            for tensor, was in zip(tensors, kept, strict=True):
                shard.local(tensor)[0].copy_(was)
        before.changed = changed
        if site.base is not before:
            site.rest_on(before)

    try:
        biases = [b for b in (a.delta_bias() for a in site.acting()) if b is not None]
        dense.add_(site.change())
        with torch.no_grad():
            for bias in biases:
                assert before.bias is not None
                before.bias.copy_(before.bias.to(bias.dtype) + bias)
        site.link(())
        if (dense := dense.rounded()) is not before:
            site.rest_on(dense)
    except BaseException:
        undo()
        site.link(active)
        raise
    return undo


def check_foldable(sites: Iterable[Site]) -> None:
    """Raise before the first weight changes if one cannot be written, or an adapter's bias has none to be added to."""
    for site in sites:
        if site.active:
            site.base.check_open(site.spec.name)
        if site.base.bias is None and any(adapter.delta_bias() is not None for adapter in site.acting()):
            raise AttachError(
                f"{site.spec.name} has no bias to merge the adapter's bias into. Nothing was merged. Go on unmerged, "
                f"or train without it: {WITHOUT_BIAS}."
            )


def _introduce(adapters: Mapping[str, Adapter]) -> None:
    """Let adapters know of those that probably read the same input."""
    for names in kin(adapters):
        adapters[names[0]].meet([adapters[name] for name in names])


def _saved(adapter: Adapter) -> dict[str, Tensor]:
    """The tensors of an adapter that do not follow from others."""
    state = adapter.state_dict(keep_vars=True) | adapter.aside()
    return {leaf: tensor for leaf, tensor in state.items() if leaf not in adapter.derived}


def _copies(model: nn.Module, method: Method) -> tuple[str, ...]:
    names = [name for name, _, parameter in walk(model) if parameter is None]
    chosen: list[str] = []
    for pattern in method.copies():
        hits = [name for name in names if matches(name, pattern)]
        if not hits:
            raise UnmatchedTarget(
                f"modules_to_save {pattern!r} matches no module of {type(model).__name__}. "
                f"{nearest(pattern, {n.rpartition('.')[2] for n in names})}"
            )
        chosen.extend(hits)
    return tuple(dict.fromkeys(chosen))
