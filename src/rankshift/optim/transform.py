"""Transform: how one tensor's gradient becomes a direction; Optimizer: one torch optimizer over many of them.

A transform makes the state of a tensor (``init``), steps all tensors of a group (``step``), and says what it
can make of another's state (``adopt``).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from rankshift.core.errors import ConfigError
from rankshift.core.random import Key

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Hyper:
    """The numbers of a parameter group at this step."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float  # decoupled: p ← (1 − lr·weight_decay) p before the step
    void: Tensor | None = None  # (), fp32: 1 if nothing may change after all, which only the device knows yet


def hyper_of(group: dict[str, Any], void: Tensor | None = None) -> Hyper:
    """The numbers of a parameter group as they are now."""
    return Hyper(float(group["lr"]), (group["betas"][0], group["betas"][1]), group["eps"], group["weight_decay"], void)


@runtime_checkable
class Transform(Protocol):
    """How gradients become steps.

    One that can be asked for a step before it is known whether the gradients are finite says ``defers = True``, heeds
    ``hyper.void``, and has ``retract(states, hyper)``, which takes back what the host has counted in such a step.
    """

    def init(
        self, p: Tensor, key: Key | None = None, rank: int | None = None, place: tuple[int, int] = (1, 1)
    ) -> dict[str, Tensor]:
        """State for a tensor like ``p``: every key. Nothing adds one later; of a shape only the rank may change.

        Args:
            key: of what the transform draws for this tensor.
            rank: of its subspace, where it is known from a saved run; else the largest.
            place: which it is, from 1, of how many tensors that share the transform.
        """
        ...

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor],
        states: Sequence[dict[str, Tensor]],
        hyper: Hyper,
    ) -> None:
        """p ← (1 − lr·weight_decay) p − lr·d for every parameter, in place, with its state advanced."""
        ...

    def adopt(self, p: Tensor, saved: dict[str, Tensor], fresh: dict[str, Tensor]) -> list[str]:
        """Fill ``fresh``, a new state in the saved one's rank, from a state that may be of another rule.

        Returns:
            What is not as it was saved, in words.

        Raises:
            ConfigError: it is of no use here.
        """
        ...


class Optimizer(torch.optim.Optimizer):
    """Runs one transform per parameter group; otherwise an ordinary ``torch.optim.Optimizer``.

    Groups are dictionaries with "params", optional "lr", "weight_decay", "betas", "eps" and "name", in the order of
    ``transforms``. State is made on the first step, tensors only, so ``state_dict`` loads with ``weights_only=True``;
    it has the dtype that the transform gave it, also after loading. (Adam's moments have that of their parameter, as in
    ``torch.optim.AdamW``; the tensors that a run trains are fp32 masters, except those that have the dtype of a bf16
    base: what trains in place, and modules_to_save.)
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        transforms: Sequence[Transform],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        seed: int = 0,
        ranks: Mapping[str, int] | None = None,
    ):
        if lr < 0:
            raise ConfigError(f"lr = {lr} is negative.")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise ConfigError(f"betas = {betas}: two numbers in [0, 1).")
        if eps < 0 or weight_decay < 0:
            raise ConfigError(f"eps = {eps} and weight_decay = {weight_decay} must not be negative.")
        super().__init__(list(groups), {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.transforms = tuple(transforms)
        self.seed = seed
        self.ranks = {} if ranks is None else ranks  # no copy: a run that is loaded later says what they are
        self.void: Tensor | None = None  # of the step to come, see Hyper
        self.settle: Callable[[], None] = _nothing  # count a step whose verdict is still out; the driver's
        self._table: dict[int, tuple[Tensor, Transform, str, tuple[int, int]]] = {}
        self.told: Sequence[str] = ()  # what a run has said of how its method differs from that of a loaded state
        if len(self.transforms) != len(self.param_groups):
            raise ConfigError(f"{len(self.transforms)} transforms for {len(self.param_groups)} parameter groups.")
        for group, transform in zip(self.param_groups, self.transforms, strict=True):
            group["rule"] = _rule(transform)  # saved with the state: whoever loads it is told what changed

    def initial(self, p: Tensor) -> dict[str, Tensor]:
        """The state of a parameter before its first step."""
        transform, name, place = self._where(p)
        return transform.init(p, Key(self.seed) / name, self.ranks.get(name), place)

    def place(self, p: Tensor) -> tuple[int, int]:
        """Which a parameter is, from 1, of how many whose transform is of that kind.

        Layers that have one role in all blocks, by their names, stand in a row: they have one shape.
        """
        return self._where(p)[2]

    def _where(self, p: Tensor) -> tuple[Transform, str, tuple[int, int]]:
        """A parameter's transform, its name, and its place."""
        count = sum(len(group["params"]) for group in self.param_groups)
        entry = self._table.get(id(p))
        if entry is None or entry[0] is not p or len(self._table) != count:  # a group was added, or this is a copy
            self._table = self._listed()
            entry = self._table.get(id(p))
        if entry is None:
            raise ConfigError(f"A tensor of shape {tuple(p.shape)} is not one that this optimizer steps.")
        return entry[1:]

    def _listed(self) -> dict[int, tuple[Tensor, Transform, str, tuple[int, int]]]:
        """What :meth:`_where` says of every parameter, by its id."""
        roles: dict[tuple[type, str], list[tuple[Tensor, Transform, str]]] = {}  # in the order of their first ones
        for group, transform in zip(self.param_groups, self.transforms, strict=True):
            for index, p in enumerate(group["params"]):
                name = group["param_names"][index] if "param_names" in group else str(index)
                roles.setdefault((type(transform), re.sub(r"\d+", "", name)), []).append((p, transform, name))
        kinds: dict[type, list[tuple[Tensor, Transform, str]]] = {}
        for (kind, _), entries in roles.items():
            kinds.setdefault(kind, []).extend(entries)
        return {
            id(entry[0]): (*entry, (place, len(entries)))
            for entries in kinds.values()
            for place, entry in enumerate(entries, 1)
        }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = [[p for p in group["params"] if p.grad is not None] for group in self.param_groups]
        together = [p for parameters in given for p in parameters]
        self._refuse(together)  # before the first of them changes
        self._begin(together)  # likewise: a state may be refused too
        for parameters, group, transform in zip(given, self.param_groups, self.transforms, strict=True):
            self._advance(parameters, group, transform)
        return loss

    @property
    def defers(self) -> bool:
        """Whether :meth:`step` may be called before it is known whether the gradients are finite."""
        return all(getattr(transform, "defers", False) for transform in self.transforms)

    def retract(self, stepped: Iterable[Tensor] | None = None) -> None:
        """Count back the step that was just taken, because it was :attr:`void`; the device changed nothing.

        Args:
            stepped: the tensors that it stepped; None: those that have a gradient.
        """
        held = None if stepped is None else {id(p) for p in stepped}
        for group, transform in zip(self.param_groups, self.transforms, strict=True):
            parameters = [p for p in group["params"] if (p.grad is not None if held is None else id(p) in held)]
            if states := [state for p in parameters if (state := self.state.get(p))]:
                transform.retract(states, hyper_of(group))  # type: ignore[attr-defined]

    def _refuse(self, parameters: Iterable[Tensor]) -> None:
        """Raise ConfigError for a gradient that no transform knows what to do with."""
        for p in parameters:
            g = p.grad
            if g is not None and (g.is_sparse or g.is_complex()):
                kind = "sparse (an embedding with sparse=True makes such)" if g.is_sparse else "complex"
                raise ConfigError(
                    f"The gradient of {self._where(p)[1]} {tuple(p.shape)} is {kind}: not supported. No tensor was "
                    "changed."
                )

    def advance(self, parameters: Sequence[Tensor], group: dict[str, Any], transform: Transform) -> None:
        """Update these parameters of one group, which have gradients."""
        self._refuse(parameters)
        self._begin(parameters)
        self._advance(parameters, group, transform)

    def _advance(self, parameters: Sequence[Tensor], group: dict[str, Any], transform: Transform) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        states = [self.state[p] for p in parameters]
        transform.step(parameters, gradients, states, hyper_of(group, self.void))

    def _begin(self, parameters: Iterable[Tensor]) -> None:
        """Make the states that are not there yet."""
        for p in parameters:
            if not self.state[p]:
                self.state[p].update(self.initial(p))

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over another optimizer's state. Where its rule was another, the log says what that changes.

        Raises:
            ConfigError: the state of a tensor is of no use under this rule; nothing was changed.
        """
        rules = [group["rule"] for group in self.param_groups]
        states, differences, changes = self._adopted(state_dict)
        super().load_state_dict({**state_dict, "state": states})
        for group, rule in zip(self.param_groups, rules, strict=True):
            group["rule"] = rule
        for index, p in zip(_indices(state_dict), _indices(self), strict=True):
            if index in states:
                self.state[p] = states[index]  # as they are: torch casts to the parameter's dtype and device
        told = []
        if differences and not self.told:
            told.append(f"The optimizer state was saved under another rule ({', '.join(differences)}).")
        elif changes:
            told.append("Of the saved optimizer state:")
        for change, names in changes.items():
            told.append(f"{change}: {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}.")
        if told:
            _log.warning("%s", " ".join(told))

    def _adopted(
        self, state_dict: dict[str, Any]
    ) -> tuple[dict[int, dict[str, Tensor]], list[str], dict[str, list[str]]]:
        """States by saved index, how the rules differ, and what becomes of which tensors for it."""
        mine, theirs = ([len(g["params"]) for g in of] for of in (self.param_groups, state_dict["param_groups"]))
        if theirs != mine:
            raise ConfigError(
                f"The saved optimizer has groups of {theirs} tensors, this one of {mine}: it was made for another "
                "method, other targets, or with other tensors that decay. Make it as it was, or begin a new state."
            )
        states: dict[int, dict[str, Tensor]] = {}
        differences: dict[str, None] = {}  # in order
        changes: dict[str, list[str]] = {}
        for group, own in zip(state_dict["param_groups"], self.param_groups, strict=True):
            before, now = (json.loads(g.get("rule", "{}")) for g in (group, own))
            saved_states = [state_dict["state"].get(index, {}) for index in group["params"]]
            begun = any(int(state.get("renewals", 0)) for state in saved_states)
            both = [key for key in now if key in before and before[key] != now[key]]
            differences |= dict.fromkeys(
                _told(key, before[key], now[key])
                for key in both
                if not (begun and key == "clock.stagger")  # which spreads what has been by then
            )
            for index, p in zip(group["params"], own["params"], strict=True):
                saved = {k: torch.as_tensor(v) for k, v in state_dict["state"].get(index, {}).items()}
                if not saved:
                    continue
                try:
                    states[index], said = self._adopt(p, saved)
                except ConfigError as error:
                    raise ConfigError(
                        f"The saved optimizer state of {self._where(p)[1]} {tuple(p.shape)} is of no use here: {error} "
                        "Make the optimizer as it was when that was saved, or begin a new state."
                    ) from None
                for change in said:
                    changes.setdefault(change, []).append(self._where(p)[1])
        return states, list(differences), changes

    def _adopt(self, p: Tensor, saved: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A parameter's state made of one that may be of another rule, and what is not as it was there.

        Raises:
            ConfigError: it is of no use here.
        """
        transform, name, place = self._where(p)
        rank = saved["basis"].shape[-1] if "basis" in saved else None
        fresh = transform.init(p, Key(self.seed) / name, rank, place)
        return fresh, transform.adopt(p, saved, fresh)

    def take_over(self, states: Mapping[str, Mapping[str, Tensor]], others: Mapping[str, str]) -> None:
        """Begin where the optimizer of the last phase ended, for every tensor whose moments mean the same here; the log
        says which those are, and why others are not.

        Args:
            states: of that one, by the names of tensors that go on as themselves.
            others: why not, as a clause, by the names of further tensors that were there. All else is new.
        """
        on: list[str] = []
        anew: dict[str, list[str]] = {}  # names by the reason
        changes: dict[str, list[str]] = {}
        for group in self.param_groups:
            for p, name in zip(group["params"], group["param_names"], strict=True):
                if name not in states:
                    anew.setdefault(others.get(name, "which are new"), []).append(name)
                    continue
                try:
                    self.state[p], said = self._adopt(p, dict(states[name]))
                except ConfigError as error:
                    anew.setdefault(f"whose state is of no use here: {error}".rstrip("."), []).append(name)
                    continue
                on.append(name)
                for change in said:
                    changes.setdefault(change, []).append(name)
        total = sum(len(group["params"]) for group in self.param_groups)
        which = f": {_some(on)}" if on else ""
        told = [f"Adam's moments go on for {len(on)} of {total} tensors from the phase before{which}"]
        told += [f"of {_some(names)}: {change}" for change, names in changes.items()]
        told += [f"they begin anew for {len(names)} ({_some(names)}), {reason}" for reason, names in anew.items()]
        _log.warning("%s.", "; ".join(told))

    def __getstate__(self) -> dict[str, Any]:
        self.settle()
        return {
            **super().__getstate__(),
            "transforms": self.transforms,
            "seed": self.seed,
            "ranks": self.ranks,
            "told": self.told,
            "void": None,
            "settle": _nothing,
            "_table": {},
        }  # torch's own names what is copied


def _nothing() -> None:
    """What nobody has to do."""


def _indices(of: Any) -> list[Any]:
    """What stands for the parameters, in the order of the groups."""
    groups = of["param_groups"] if isinstance(of, dict) else of.param_groups
    return [p for group in groups for p in group["params"]]


def _some(names: Sequence[str]) -> str:
    """The first of them, and how many more."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _told(key: str, before: str, now: str) -> str:
    """A difference between rules as users write them: "every: 200 → 50"."""
    if key == "store":
        bits = {"Blocks": "8bit"}
        return f"moments: {bits.get(before, 'float32')} → {bits.get(now, 'float32')}"
    return f"{key.rpartition('.')[2]}: {before} → {now}"


def _rule(transform: Transform) -> str:
    """The fields of a transform as JSON: {"clock.every": "200", …}."""

    def fields(value: Any, prefix: str) -> Iterable[tuple[str, str]]:
        for f in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
            inner = getattr(value, f.name)
            if dataclasses.is_dataclass(inner) and dataclasses.fields(inner):
                yield from fields(inner, f"{prefix}{f.name}.")
            yield f"{prefix}{f.name}", type(inner).__name__ if dataclasses.is_dataclass(inner) else str(inner)

    return json.dumps(dict(fields(transform, "")))
