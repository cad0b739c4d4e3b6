"""Handover: what one phase of a run leaves to the next. From the run that ends the one of the next phase is made."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankshift.core.adapter import Adapter
from rankshift.core.errors import ConfigError, TiedWeights
from rankshift.core.method import Estate, Method
from rankshift.core.phase import Phase
from rankshift.core.site import base_parameters
from rankshift.methods import to_dict
from rankshift.placement import DEFAULT, Member, refuse_sharded, weight_name

if TYPE_CHECKING:
    from rankshift.run import Run


# ---- beforehand


def foresee(run: Run, method: Method) -> None:
    """Raise, before the first, where a phase to come does not fit the model or its end could not be seen."""
    for then, after in itertools.zip_longest(run.coming, run.coming[1:]):
        before, method = method, then.method
        if type(method) is type(before):
            continue  # what takes over tensors of its own kind is known only then
        with contextlib.suppress(TiedWeights):  # likewise what the phases before untie
            sites = {spec.name for spec in run._on.plan(method, ())[0]}
            if after is not None:
                trained = {n for n, _, _ in base_parameters(run.model) if method.in_place(n, _layer(n) in sites)}
                run._wish(method, after, trained | method.projects(run.model).keys())


def _layer(parameter: str) -> str:
    return parameter.rpartition(".")[0]


# ---- the change


def shift(run: Run, method: Method, data: Iterable[Any] | None) -> Run:
    """See :meth:`Run.shift`."""
    run._open()
    if not isinstance(method, Method):
        raise ConfigError(f"shift needs a method such as rs.LoRA(rank=16); got {type(method).__name__}.")
    refuse_sharded(run.model, "shift()")
    estates = _inherited(run, method)
    if estates is None:
        with run._on.bare():
            run._on.plan(method, data)  # what cannot begin must not end this phase
        heirs = None
    else:
        heirs = run._on.heirs(run._on.active[0], method, estates)
    try:
        if estates is None or heirs is None:
            return _anew(run, method, data)
        return _succeed(run, method, estates, *heirs)
    except BaseException as error:
        if not run._closed:
            if heirs is not None:  # before and after them the function is the same
                run._on.link(run._on.active)
            run.merge()
        run._closed = "shift(), which failed half way"
        error.add_note(
            f"run.shift({type(method).__name__}(…)) had ended the phase before when this happened. The model is a "
            "plain one now, with what was trained merged into its weights: go on with rs.attach() and a new "
            "optimizer, or from the last checkpoint with a fresh model."
        )
        raise


def _anew(run: Run, method: Method, data: Iterable[Any] | None) -> Run:
    """The next phase on the merged model."""
    changed = run.changed
    for name, site in run.sites.items():
        if site.active:
            changed.add(weight_name(name, site))
            if any(adapter.delta_bias() is not None for adapter in site.acting()):
                changed.add(f"{name}.bias")
    for name, replica in run._on.replicas().items():
        changed.update(f"{name}.{leaf}" for leaf, _ in replica.base.named_parameters())
    before, states = {name for name, _, _ in base_parameters(run.model)}, run._driver.states()
    new = type(run)(run.model, seed=run.seed, total_steps=run.total_steps, start=run.step)
    new._frozen, new._on.frozen = run._frozen, run._on.frozen  # the base is not as it came now
    lr = _hand_on(run, new, method)
    new._driver.skips = run.skipped
    model = run.merge()
    run._closed, run._moments = "shift()", {}  # who keeps this run keeps no moments with it
    names = {name for name, _, _ in base_parameters(model)}
    new._changed = changed | (names - before)  # tied to what was trained as a copy
    new._moments = {name: state for name, state in states.items() if name in names}
    new._begin(method, data, lr=lr)
    return new


def _inherited(run: Run, method: Method) -> Mapping[str, Estate] | None:
    """What the next method takes over, where it takes over anything."""
    if len(run._on.members) > 1 or not run._on.active or method.copies() != run.method.copies():
        return None
    base = list(base_parameters(run.model))
    if (run.method.reversible or method.reversible) and any(  # what stood there before is known of what trains now
        method.in_place(name, adapted) != run.method.in_place(name, adapted) for name, _, adapted in base
    ):
        return None
    return method.inherit(run.method, run.adapter(run._on.active[0]))


def _succeed(
    run: Run, method: Method, estates: Mapping[str, Estate], heirs: Mapping[str, Adapter], member: Member
) -> Run:
    """The next phase with adapters that take over this one's values; the base is not touched."""
    changed, states = run.changed, run._driver.states()  # what a site that goes now knows of its base too
    name = run._on.active[0]
    prefix = "" if name == DEFAULT else f"{name}:"
    before = {f"{prefix}{site}.{leaf}": p for site, a in run.adapter(name).items() for leaf, p in a.named_parameters()}
    new = type(run)(run.model, seed=run.seed, total_steps=run.total_steps, start=run.step)
    new._on, new._frozen = run._on, run._frozen
    run._on.succeed(name, heirs, member)
    new._changed = changed | run._on.train_in_place(method)
    new._driver.audience, new._driver.trainable = run._on.audience, run._on.required
    new._driver.skips, new._driver.began = run.skipped, run.step
    lr = _hand_on(run, new, method)
    moments: dict[str, Mapping[str, Tensor]] = {k: state for k, state in states.items() if k not in before}
    for site, heir in run.adapter(name).items():
        for leaf, now in heir.named_parameters():
            other = f"{prefix}{site}.{leaf}"
            if other in before and other in states:
                moved = _moved(states[other], before[other], now, heir.slots.get(leaf), estates[site].slots)
                moments |= {} if moved is None else {other: moved}
    run.model.zero_grad()
    run._driver.close()
    run._deafen()
    new._on.use(*new._on.active)
    new.phases.append(Phase(to_dict(method), run.step, lr=lr, trainable=new._count_trainable()))
    new._keep_moments(moments)
    new._look_out()
    new._driver.open_window()
    new._listen()
    run._closed, run._moments = "shift()", {}  # who keeps this run keeps no moments with it
    return new


def _hand_on(run: Run, new: Run, method: Method) -> float | None:
    """Let the run of the next phase know what was and what is to come; the learning rate that was said for it."""
    new.phases = [*run.phases[:-1], run.phases[-1].ended(run.step)]
    new.coming, new._listed, new._seconds = run.coming, run._listed, run._seconds
    if not run.coming or run.coming[0].method != method:
        return run.phases[-1].lr
    new.coming, new._listed, new._seconds = run.coming[1:], run.step, 0.0
    return run.coming[0].lr or run.phases[-1].lr


def _moved(
    state: Mapping[str, Tensor], old: Tensor, now: Tensor, axis: int | None, slots: Tensor | None
) -> Mapping[str, Tensor] | None:
    """The optimizer's state of a tensor that took over another's rank ``slots``; None if it is not that tensor's."""
    if slots is not None and axis is not None:
        state = {k: v.index_select(axis, slots.to(v.device)) if v.shape == old.shape else v for k, v in state.items()}
        old = old.detach().index_select(axis, slots.to(old.device))
    return state if old.shape == now.shape and torch.equal(old, now) else None
