"""Run: a model with a method attached. What a user holds: train, switch, save, merge, shift."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankshift.core import shard
from rankshift.core.adapter import Adapter
from rankshift.core.errors import (
    AttachError,
    ConfigError,
    ExportError,
    RankTooLarge,
    UnmatchedTarget,
    WrongBase,
    nearest,
)
from rankshift.core.event import Driver, Event, Needs
from rankshift.core.method import Method, from_dict, to_dict
from rankshift.core.phase import Phase
from rankshift.core.random import Key
from rankshift.core.site import (
    Replica,
    Site,
    Stack,
    base_parameters,
    check_tied,
    embeddings_untied,
    matches,
    place,
    place_replica,
    remove,
    running_statistics,
    separate,
    spec_of,
    untie,
    walk,
)
from rankshift.optim import Adam, Optimizer, Transform
from rankshift.summary import Summary, summarise

DEFAULT = "default"
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass
class _Member:
    """One adapter of a run: its method, and the rank at each of its sites."""

    method: Method
    ranks: dict[str, int]
    copies: tuple[str, ...]  # names of modules trained whole


def attach(
    model: nn.Module,
    method: Method,
    base: Literal["nf4", "int8", "fp8"] | None = None,
    seed: int = 0,
    total_steps: int | None = None,
    *,
    data: Iterable[Any] | None = None,
) -> Run:
    """Attach a method to a model, in place.

    Args:
        model: any ``nn.Module``. Its weights are frozen; what the method trains is added or unfrozen.
        method: what to train, e.g. ``rs.LoRA(rank=16)``.
        base: storage of the frozen weights; None leaves them as they are.
        seed: of everything the method draws. Global random state is neither read nor changed.
        total_steps: updates of the whole run, for methods whose schedule needs it.
        data: batches (keyword dictionaries or tensors) for methods that look at data before they start.

    Raises:
        AttachError: the model has a run already.
        TargetError: the method does not fit the model; nothing was changed.
    """
    if not isinstance(method, Method):
        raise ConfigError(f"attach needs a method such as rs.LoRA(rank=16); got {type(method).__name__}.")
    if base is not None:
        raise ConfigError(f"base={base!r} is not available in this version. Leave base=None.")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise AttachError(
            f"This is a {type(model).__name__}, which never learns of tensors that are added to it. Attach to the "
            "model inside, model.module, then wrap it anew."
        )
    if model in _ATTACHED or any(isinstance(module, (Site, Replica, Stack)) for module in model.modules()):
        raise AttachError(
            f"This {type(model).__name__} has a method attached. Use run.add(name, method) for a second adapter, "
            "run.shift(method) to go on with another method, or run.merge() to end the run."
        )
    run = Run(model, seed=seed, total_steps=total_steps)
    run._begin(method, data)
    return run


class Run:
    """A model with a method attached; made by :func:`attach`, :func:`load` and :meth:`shift`."""

    def __init__(self, model: nn.Module, *, seed: int = 0, total_steps: int | None = None, start: int = 0):
        self.model = model
        self.seed = seed
        self.total_steps = total_steps
        self.phases: list[Phase] = []
        self._changed: set[str] = set()
        self._members: dict[str, _Member] = {}
        self._active: tuple[str, ...] = ()
        self._sites: dict[str, Site] = {}
        self._frozen = {name: p.requires_grad for name, p, _ in base_parameters(model)}
        self._originals: dict[str, Tensor] = {}
        self._closed = ""
        self._driver = Driver(self._audience, seed, total_steps, self._required, start)

    # ---- building

    def _begin(
        self,
        method: Method,
        data: Iterable[Any] | None = None,
        name: str = DEFAULT,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """The first adapter; with ``ranks`` its values are not filled, because they will be loaded."""
        self._build(name, method, data, ranks)
        for _, parameter, _ in base_parameters(self.model):
            parameter.requires_grad_(False)
        for leaf, parameter, adapted in base_parameters(self.model):
            if method.in_place(leaf, adapted):
                if method.reversible:
                    self._originals[leaf] = parameter.detach().clone()
                parameter.requires_grad_(True)
                self._changed.add(leaf)
        self.use(name)
        if not any(True for _ in self.trainable()):
            self._strip()
            self._close("an error")
            raise ConfigError(f"{type(method).__name__} has nothing to train on this model.")
        self.phases.append(Phase(to_dict(method), self.step))
        _ATTACHED.add(self.model)
        self._driver.open_window()

    def _build(
        self,
        name: str,
        method: Method,
        data: Iterable[Any] | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """Place an adapter at its sites. Every refusal comes before the first change."""
        model, fill = self.model, ranks is None
        _refuse_sharded(model, "Placing an adapter")
        specs = [spec_of(model, site) for site in (method.sites(model) if ranks is None else ranks)]
        copies = _copies(model, method)
        specs = [s for s in specs if not any(s.name == c or s.name.startswith(c + ".") for c in copies)]
        for spec in specs:
            try:
                method.fit(spec)
            except RankTooLarge:
                if fill:  # what was trained elsewhere may have a rank that is merely of no use
                    raise
        for spec in specs:
            if method.tied == "refuse":
                check_tied(model, spec)
        found = method.survey(model, specs, data, self.seed) if fill else {}
        for spec in specs:
            untie(model, spec)
        ranks = dict(ranks) if ranks is not None else {s.name: method.rank_at(s.name, found.get(s.name)) for s in specs}
        self._members[name] = member = _Member(method, {}, copies)
        try:
            for spec in specs:
                site = self._sites[spec.name] = place(model, spec)
                adapter = method.adapt(site.base, spec, ranks[spec.name])
                if adapter is None:
                    continue
                adapter.site = spec.name
                adapter.trains = frozenset(leaf for leaf, p in adapter.named_parameters() if p.requires_grad)
                adapter.train(model.training)
                if fill and spec.device.type != "meta":
                    method.start(adapter, Key(self.seed) / name / spec.name, found.get(spec.name))
                site.adapters[name] = adapter
                member.ranks[spec.name] = ranks[spec.name]
            for copied in copies:
                replica = place_replica(model, copied)
                replica.copies[name] = copy.deepcopy(replica.base).requires_grad_(True)
                replica.base.requires_grad_(False)
        except BaseException:  # out of memory, Ctrl-C: the model goes back as it came
            self._drop(name)
            raise
        for site in list(self._sites.values()):
            if not site.adapters:
                self._remove(site)

    def _drop(self, name: str) -> None:
        """Take an adapter out of every site, and out of the model what then stands empty."""
        del self._members[name]
        for site in list(self._sites.values()):
            if name in site.adapters:
                del site.adapters[name]
            if not site.adapters:
                self._remove(site)
        for path, replica in self._replicas().items():
            if name in replica.copies:
                del replica.copies[name]
            if not replica.copies:
                parent, _, leaf = path.rpartition(".")
                setattr(self.model.get_submodule(parent), leaf, replica.base)

    def _remove(self, site: Site) -> None:
        remove(self.model, site)
        del self._sites[site.spec.name]

    # ---- what is here

    @property
    def method(self) -> Method:
        """The method of the current phase."""
        return self._members[DEFAULT if DEFAULT in self._members else next(iter(self._members))].method

    @property
    def step(self) -> int:
        """Updates taken so far, over all phases."""
        return self._driver.step

    @property
    def skipped(self) -> int:
        """Updates skipped because a gradient was NaN or Inf."""
        return self._driver.skipped

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the adapters, in the order they were added."""
        return tuple(self._members)

    @property
    def active(self) -> tuple[str, ...]:
        """Names of the adapters that act; their changes add up."""
        return self._active

    @property
    def sites(self) -> dict[str, Site]:
        """The sites by the name of the layer they stand at."""
        return dict(self._sites)

    @property
    def changed(self) -> set[str]:
        """Parameters of the base that no longer are what they came as: trained in place, or rewritten by an event."""
        rewritten = (_weight_name(name, site) for name, site in self._sites.items() if site.base.changed)
        return self._changed.union(rewritten)

    def _replicas(self) -> dict[str, Replica]:
        return {name: m for name, m, _ in walk(self.model) if isinstance(m, Replica)}

    def adapter(self, name: str = DEFAULT) -> dict[str, Adapter]:
        """The adapter's part at each of its sites."""
        self._known(name)
        return {site: s[name] for site, s in self.sites.items() if name in s.adapters}

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, tensor) of everything that trains, in a fixed order: sites, whole copies, base parameters in place."""
        for name in self._active:
            prefix = "" if name == DEFAULT else f"{name}:"
            for site, adapter in self.adapter(name).items():
                for leaf, parameter in adapter.named_parameters():
                    if parameter.requires_grad:
                        yield f"{prefix}{site}.{leaf}", parameter
            for site, replica in self._replicas().items():
                if name in replica.copies:
                    for leaf, parameter in replica.copies[name].named_parameters():
                        yield f"{prefix}{site}.{leaf}", parameter
        for base_name, parameter, _ in base_parameters(self.model):
            if parameter.requires_grad:
                yield base_name, parameter

    def _required(self) -> Iterator[tuple[str, Tensor, Needs]]:
        for name in self._active:
            for site, adapter in self.adapter(name).items():
                for leaf, parameter in adapter.named_parameters():
                    if parameter.requires_grad:
                        yield f"{site}.{leaf}", parameter, Needs.GRADIENT if leaf in adapter.silent else Needs.NONZERO
            for site, replica in self._replicas().items():
                if name in replica.active:
                    for leaf, parameter in replica.copies[name].named_parameters():
                        yield f"{site}.{leaf}", parameter, Needs.GRADIENT
        for base_name, parameter, _ in base_parameters(self.model):
            if parameter.requires_grad:
                must = self.method.must_learn(base_name)
                yield base_name, parameter, Needs.GRADIENT if must else Needs.NOTHING

    def _audience(self) -> Iterator[tuple[Event, Sequence[Adapter]]]:
        for name in self._active:
            for event in self._members[name].method.events():
                yield event, list(self.adapter(name).values())

    def summary(self) -> Summary:
        """Matched layers, trainable and total parameters, bytes; prints as a table."""
        shard.settle(self.model)
        return summarise(self)

    # ---- training

    def optimizer(
        self,
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        *,
        decay: Callable[[str, Tensor], bool] | None = None,
        check_gradients: bool = True,
    ) -> Optimizer:
        """AdamW over what trains, as the method transforms it; a ``torch.optim.Optimizer`` that carries the events.

        Make it after the model is on its device, wrapped and sharded. Making another one releases the first.

        Args:
            decay: which tensors weight decay applies to, by name; all of them by default.
            check_gradients: stop if a tensor that must learn has no gradient in the first update.
        """
        self._open()
        tensors = dict(self.trainable())
        _check_dtypes(self._sites)
        factors = self.method.learning_rates(list(tensors))
        groups: dict[tuple[Any, ...], dict[str, Any]] = {}
        for name, tensor in tensors.items():
            transform: Transform = self.method.transform(name, tensor) or Adam()
            factor, decays = factors.get(name, 1.0), decay is None or decay(name, tensor)
            group = groups.setdefault(
                (transform, factor, decays),
                {"params": [], "lr": lr * factor, "weight_decay": weight_decay if decays else 0.0},
            )
            group["params"].append((name, tensor))
        optimizer = Optimizer(groups.values(), [key[0] for key in groups], lr, betas, eps, weight_decay)
        self._driver.check_gradients = check_gradients
        self._driver.bind(optimizer, self.model, optimizer.initial)
        return optimizer

    def carry(self, optimizer: torch.optim.Optimizer) -> None:
        """Let any other torch optimizer over ``run.trainable()`` carry the events."""
        self._open()
        self._driver.bind(optimizer, self.model)

    # ---- adapters

    def add(self, name: str, method: Method, *, data: Iterable[Any] | None = None) -> None:
        """Add a second adapter, not active until :meth:`use`. The base is not touched."""
        self._open()
        self._new(name)
        for other in (method, *(member.method for member in self._members.values())):
            if any(other.in_place(n, adapted) for n, _, adapted in base_parameters(self.model)):
                raise AttachError(
                    f"{type(other).__name__} as configured trains base weights in place, which all adapters would "
                    'share: it stands alone. Use bias="none", or run.shift(method) to go on with another method.'
                )
        self._build(name, method, data)
        self.use(*self._active)

    def use(self, *names: str) -> None:
        """Make these adapters act; the changes of several add up. Only they train; none of them: the base."""
        self._open()
        names = tuple(dict.fromkeys(names))
        for name in names:
            self._known(name)
        if not names and self._originals:
            raise AttachError("This run trains biases in place. For the base as it came use run.disabled().")
        for copied, replica in self._replicas().items():
            both = [name for name in names if name in replica.copies]
            if len(both) > 1:
                raise AttachError(f"adapters {both[0]!r} and {both[1]!r} each hold a whole {copied}: use one of them.")
        self._active = names
        for site in self.sites.values():
            site.link(self._active)
            for name in site.adapters:
                for leaf, parameter in site[name].named_parameters():
                    parameter.requires_grad_(name in self._active and leaf in site[name].trains)
        for replica in self._replicas().values():
            replica.link(self._active)
            for name, module in replica.copies.items():
                module.requires_grad_(name in self._active)

    def delete(self, name: str) -> None:
        """Remove an adapter. The base is not touched."""
        self._open()
        self._known(name)
        if len(self._members) == 1:
            raise AttachError(f"adapter {name!r} is the only one. End the run with run.merge(), or add another first.")
        self._active = tuple(other for other in self._active if other != name)
        self._drop(name)
        self.use(*self._active)

    def combine(self, names: Sequence[str], name: str, weights: Sequence[float] | None = None) -> None:
        """A new LoRA adapter equal to the weighted sum of others: exact, by concatenation, of rank Σ r.

        Raises:
            ExportError: one of them has no low-rank form.
        """
        from rankshift.io.combine import concatenate

        self._open()
        for other in names:
            self._known(other)
        self._new(name)
        weights = [1.0] * len(names) if weights is None else list(weights)
        if any(other in replica.copies for other in names for replica in self._replicas().values()):
            raise ExportError(
                f"One of {', '.join(names)} holds modules trained whole (modules_to_save), which have no low-rank sum."
            )
        method, ranks, tensors = concatenate([self.adapter(other) for other in names], weights)
        self._build(name, method, ranks=ranks)
        places = self._places()
        for leaf, tensor in tensors.items():
            shard.assign_(places[f"{name}/{leaf}"], tensor)
        self.use(*self._active)

    @contextlib.contextmanager
    def disabled(self) -> Iterator[None]:
        """The base, bit for bit, for the length of a ``with`` block."""
        self._open()
        if not self.method.reversible:
            raise AttachError(f"{type(self.method).__name__} trains the base itself: there is none to go back to.")
        trained: dict[str, Tensor] = {}
        for name, parameter, _ in base_parameters(self.model):
            if name in self._originals:
                trained[name] = shard.local(parameter)[0].clone()
                shard.assign_(parameter, self._originals[name])
        self._link(())
        try:
            yield
        finally:
            self._link(self._active)
            shard.settle(self.model)
            for name, parameter, _ in base_parameters(self.model):
                if name in trained:
                    shard.local(parameter)[0].copy_(trained[name])

    @contextlib.contextmanager
    def merged(self) -> Iterator[nn.Module]:
        """The active adapters folded into the base for a ``with`` block; after it the base's own bits again."""
        self._open()
        _check_foldable(self.sites.values())
        kept = {}
        for name, site in self.sites.items():
            if site.active:
                kept[name] = site.base.changed, [shard.local(p)[0].clone() for p in _tensors(site)]
                _fold(site)
        for site in self.sites.values():
            site.link(())
        try:
            yield self.model
        finally:
            shard.settle(self.model)
            for name, (changed, parts) in kept.items():
                site = self._sites[name]
                site.base.changed = changed
                for parameter, old in zip(_tensors(site), parts, strict=True):
                    shard.local(parameter)[0].copy_(old)
            self._link(self._active)

    def _link(self, active: Sequence[str]) -> None:
        for site in self.sites.values():
            site.link(active)
        for replica in self._replicas().values():
            replica.link(active)

    # ---- ends

    def merge(self) -> nn.Module:
        """Fold the active adapters into the weights and end the run: plain modules, no trace of rankshift.

        The sum is taken in fp32 (float64 on a float64 base) and rounded once.
        """
        self._open()
        _check_foldable(self.sites.values())
        for site in self.sites.values():
            if site.active:
                _fold(site)
        self._strip()
        if embeddings_untied(self.model):  # an embedding was trained as a copy: loading must not tie the two again
            self.model.config.tie_word_embeddings = False  # type: ignore[union-attr]
        self._close("merge()")
        return self.model

    def detach(self) -> nn.Module:
        """Take the adapters off without merging and end the run: the base as it came."""
        self._open()
        if not self.method.reversible:
            raise AttachError(f"{type(self.method).__name__} trains the base itself: nothing can be taken off it.")
        for name, parameter, _ in base_parameters(self.model):
            if name in self._originals:
                shard.assign_(parameter, self._originals[name])
        self._link(())
        self._strip()
        self._close("detach()")
        return self.model

    def shift(self, method: Method, *, data: Iterable[Any] | None = None) -> Run:
        """End this phase and begin the next with another method, in mid-run. The function stays; moments start anew.

        Make a new optimizer from the run that is returned; this one and its optimizer are closed.
        """
        self._open()
        if not isinstance(method, Method):
            raise ConfigError(f"shift needs a method such as rs.LoRA(rank=16); got {type(method).__name__}.")
        _refuse_sharded(self.model, "shift()")
        changed = self.changed
        for name, site in self.sites.items():
            if site.active:
                changed.add(_weight_name(name, site))
                if any(adapter.delta_bias() is not None for adapter in site.acting()):
                    changed.add(f"{name}.bias")
        for name, replica in self._replicas().items():
            changed.update(f"{name}.{leaf}" for leaf, _ in replica.base.named_parameters())
        step, skipped, phases = self.step, self.skipped, [*self.phases[:-1], self.phases[-1].ended(self.step)]
        before = {name for name, _, _ in base_parameters(self.model)}
        model = self.merge()
        self._closed = "shift()"
        changed |= {name for name, _, _ in base_parameters(model)} - before  # tied to what was trained as a copy
        run = Run(model, seed=self.seed, total_steps=self.total_steps, start=step)
        run.phases, run._changed, run._driver.skips = phases, changed, skipped
        run._begin(method, data)
        return run

    def due(self) -> Method | None:
        """The next phase's method, when the current one says that it is time."""
        return self.method.then(self)

    def _strip(self) -> None:
        for site in self.sites.values():
            remove(self.model, site)
        for name, replica in self._replicas().items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, replica.top)

    def _close(self, how: str) -> None:
        for name, parameter, _ in base_parameters(self.model):
            parameter.requires_grad_(self._frozen.get(name, True))
            parameter.grad = None
        self._driver.close()
        self._closed = how
        _ATTACHED.discard(self.model)

    def _open(self) -> None:
        if self._closed:
            raise AttachError(
                f"This run ended with {self._closed}. Attach again, or use the run that shift() returned."
            )
        shard.settle(self.model)

    def _new(self, name: str) -> None:
        reserved = ("base", "buffer", "original")
        if name in self._members or name in reserved or not name.isidentifier():
            why = "exists" if name in self._members else "is not a free name like french_v2"
            raise AttachError(f"adapter {name!r} {why}. Adapters here: {', '.join(self._members)}.")

    def _known(self, name: str) -> None:
        if name not in self._members:
            raise AttachError(f"There is no adapter {name!r}. {nearest(name, self._members)}")

    # ---- as data

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values. With the model's and the optimizer's state: an exact resume.

        Under FSDP2 every rank must call this; tensors are whole.
        """
        return {**self.describe(), "tensors": dict(self.tensors())}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """(name, whole tensor) of everything the base as it came does not tell, one gathered at a time.

        ``adapter/…`` for each adapter by its name; ``buffer/…``, running statistics, which move without being trained;
        ``original/…``, what :meth:`disabled` puts back; last ``base/…``, weights that are not what they came as.
        """
        self._open()
        for name in self._members:
            for site, adapter in self.adapter(name).items():
                for leaf, tensor in adapter.state_dict().items():
                    yield f"{name}/{site}.{leaf}", shard.whole(tensor)
            for site, replica in self._replicas().items():
                if name in replica.copies:
                    for leaf, tensor in replica.copies[name].state_dict().items():
                        yield f"{name}/{site}.{leaf}", shard.whole(tensor)
        for buffer_name, buffer in running_statistics(self.model):
            yield f"buffer/{buffer_name}", shard.whole(buffer)
        for base_name, original in self._originals.items():
            yield f"original/{base_name}", shard.whole(original)
        changed = self.changed
        for base_name, parameter, _ in base_parameters(self.model):
            if base_name in changed:
                yield f"base/{base_name}", shard.whole(parameter)

    def describe(self) -> dict[str, Any]:
        """The plain values of :meth:`state_dict`, as JSON knows them."""
        return {
            "format": 1,
            "adapters": {
                name: {"method": to_dict(m.method), "ranks": dict(m.ranks)} for name, m in self._members.items()
            },
            "active": list(self._active),
            "seed": self.seed,
            "total_steps": self.total_steps,
            "step": self.step,
            "phases": [phase.to_mapping() for phase in self.phases],
            "changed": sorted(self.changed),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of another run of the same method on the same base.

        Raises:
            WrongBase: a tensor is missing, unknown or of another shape; nothing was changed.
        """
        self._open()
        wanted = {name: from_dict(entry["method"]) for name, entry in state["adapters"].items()}
        for name, member in self._members.items():
            if name in wanted and wanted[name] != member.method:
                raise WrongBase(f"adapter {name!r} was trained as {wanted[name]}, but {member.method} is attached.")
        mine = {name: dict(m.ranks) for name, m in self._members.items()}
        for name, entry in state["adapters"].items():
            if name in mine and mine[name] != entry["ranks"]:
                odd = sorted(set(mine[name].items()) ^ set(entry["ranks"].items()))[0]
                raise WrongBase(f"adapter {name!r} has other layers or ranks than the one attached, e.g. {odd}.")
        for name in wanted:
            if name not in self._members:
                self._build(name, wanted[name], ranks=state["adapters"][name]["ranks"])
        places = self._places()
        base: dict[str, Tensor] = {f"base/{name}": p for name, p, _ in base_parameters(self.model)}
        base |= {f"buffer/{name}": buffer for name, buffer in running_statistics(self.model)}
        base |= {f"original/{name}": tensor for name, tensor in self._originals.items()}
        for name, tensor in state["tensors"].items():
            target = places.get(name, base.get(name))
            if target is None:
                raise WrongBase(f"the saved run has {name}, which this model does not. It belongs to another base.")
            if target.shape != tensor.shape:
                raise WrongBase(f"{name} is {tuple(tensor.shape)} in the saved run and {tuple(target.shape)} here.")
        missing = [name for name in places if name not in state["tensors"] and name.partition("/")[0] in wanted]
        if missing:
            raise WrongBase(f"the saved run lacks {missing[0]}. It belongs to another base or method.")
        for name, tensor in state["tensors"].items():
            target = places.get(name, base.get(name))
            assert target is not None
            shard.assign_(target, tensor.to(target.device))
        for name in [name for name in self._members if name not in wanted]:
            self.delete(name)
        self.seed = self._driver.seed = int(state["seed"])
        self.total_steps = self._driver.total = state["total_steps"]
        self.phases = [Phase.from_mapping(phase) for phase in state["phases"]]
        self._changed = set(state["changed"])
        self.use(*state["active"])
        self._driver.step = int(state["step"])
        self._driver.open_window()

    def _places(self) -> dict[str, Tensor]:
        places: dict[str, Tensor] = {}
        for name in self._members:
            for site, adapter in self.adapter(name).items():
                places.update({f"{name}/{site}.{leaf}": t for leaf, t in adapter.state_dict(keep_vars=True).items()})
            for site, replica in self._replicas().items():
                if name in replica.copies:
                    state = replica.copies[name].state_dict(keep_vars=True)
                    places.update({f"{name}/{site}.{leaf}": tensor for leaf, tensor in state.items()})
        return places

    def save(self, directory: str | Path) -> Path:
        """Write the run as a native directory, atomically; :func:`load` reads it. Every rank may call; one writes."""
        from rankshift.io.checkpoint import save

        self._open()
        return save(self, directory)

    def export(
        self,
        directory: str | Path,
        format: Literal["peft", "merged"] = "peft",
        profile: Literal["exact", "portable"] = "exact",
        adapter: str | None = None,
    ) -> Path:
        """Write what other programs load.

        "peft": an adapter directory in PEFT's format; with profile="portable" one plain LoRA of uniform rank, as
        servers accept it. "merged": a plain model directory. The run goes on unchanged.

        Args:
            adapter: which one; by default those that are active (for "peft" there must be exactly one).

        Raises:
            ExportError: the format cannot hold this method exactly.
            NotWritable: nothing was written, and what was there before is untouched.
        """
        from rankshift.io.export import export

        self._open()
        if adapter is not None:
            self._known(adapter)
        self._link(self._active if adapter is None else (adapter,))
        try:
            return export(self, directory, format=format, profile=profile, adapter=adapter)
        finally:
            self._link(self._active)


def load(
    model: nn.Module,
    directory: str | Path,
    seed: int = 0,
    *,
    check_base: bool = True,
    tied: Literal["refuse", "untie"] = "refuse",
) -> Run:
    """Attach what a directory holds: a native one of :meth:`Run.save`, or else a PEFT LoRA adapter.

    Args:
        model: the base that it was trained on.
        directory: where it is.
        seed: for a PEFT directory, which names none.
        check_base: refuse a base whose values are not those it was trained on (native directories know).
        tied: for a PEFT directory, what to do where it adapts a layer whose weight is shared; as in the methods.

    Raises:
        MissingFile, CorruptFile: the directory is not complete.
        WrongBase: it was trained on another base.
        ConfigError: a PEFT adapter with an option that has no equal here; named.
    """
    from rankshift.io.checkpoint import read

    _fresh(model, "load")
    return restore(model, read(model, directory, seed, check_base, tied))


def restore(model: nn.Module, state: Mapping[str, Any]) -> Run:
    """Attach to a fresh base the run whose :meth:`Run.state_dict` this is, with whatever adapters it had."""
    _fresh(model, "restore")
    separate(model, [name.removeprefix("base/") for name in state["tensors"] if name.startswith("base/")])
    run = Run(model, seed=int(state["seed"]), total_steps=state["total_steps"])
    first, entry = next(iter(state["adapters"].items()))
    run._begin(from_dict(entry["method"]), name=first, ranks=entry["ranks"])
    try:
        run.load_state_dict(state)
    except BaseException:  # the model goes back as it came
        run._link(())
        run._strip()
        run._close("an error")
        raise
    return run


def _fresh(model: nn.Module, verb: str) -> None:
    if model in _ATTACHED or any(isinstance(module, (Site, Replica, Stack)) for module in model.modules()):
        raise AttachError(
            f"This {type(model).__name__} has a method attached, and {verb} needs a fresh base. End that run with "
            "run.detach() or run.merge(), or load the model again."
        )


def _weight_name(name: str, site: Site) -> str:
    """The name of a site's weight in the model as it came."""
    return name if site.spec.form.stacked else f"{name}.weight"


def _refuse_sharded(model: nn.Module, what: str) -> None:
    """Raise AttachError on a sharded model: a tensor added to it would not be sharded, nor its gradient reduced."""
    if any(shard.is_sharded(parameter) for parameter in model.parameters()):
        raise AttachError(
            f"{what} adds tensors, and this {type(model).__name__} is sharded already. Attach first, then fully_shard, "
            "then run.optimizer(). In mid-run: state = run.state_dict() on every rank, then on a fresh model "
            "run = rs.restore(model, state), run.shift(method) or run.add(name, method), fully_shard, run.optimizer()."
        )


def _check_dtypes(sites: Mapping[str, Site]) -> None:
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


def _tensors(site: Site) -> list[Tensor]:
    return [site.base.weight] if site.base.bias is None else [site.base.weight, site.base.bias]


def _fold(site: Site) -> None:
    """W += Σ ΔW of the active adapters, in the adapters' dtype, rounded once; the bias likewise."""
    acting = site.acting()
    whole = [a.whole_delta() if any(map(shard.is_sharded, a.parameters())) else None for a in acting]

    def delta(rows: slice) -> Tensor:
        parts = [a.delta(rows) if w is None else w[..., rows, :] for a, w in zip(acting, whole, strict=True)]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    biases = [b for b in (a.delta_bias() for a in acting) if b is not None]
    site.base.add_(delta)
    with torch.no_grad():
        for bias in biases:
            assert site.base.bias is not None
            site.base.bias.copy_(site.base.bias.to(bias.dtype) + bias)


def _check_foldable(sites: Iterable[Site]) -> None:
    """Raise before the first weight changes if an adapter's bias has no bias to be added to."""
    for site in sites:
        if site.base.bias is None and any(adapter.delta_bias() is not None for adapter in site.acting()):
            raise AttachError(
                f"{site.spec.name} has no bias to merge the adapter's bias into. Nothing was merged. Go on unmerged, "
                "or train with lora_bias=False."
            )


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
