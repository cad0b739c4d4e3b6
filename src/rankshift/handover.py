"""Handover: what one phase of a run leaves to the next. From the run that ends the one of the next phase is made."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rankshift import lower as lowering
from rankshift.core.adapter import Adapter
from rankshift.core.errors import AttachError, ConfigError, TiedWeights
from rankshift.core.method import Estate, Method
from rankshift.core.phase import Phase, Then, check_phases
from rankshift.core.site import base_parameters
from rankshift.methods import to_dict
from rankshift.optim import Optimizer
from rankshift.placement import DEFAULT, WITHOUT_BIAS, Member, check_foldable, refuse_sharded, weight_names

if TYPE_CHECKING:
    from rankshift.run import Run

_log = logging.getLogger(__name__)
_UNCHANGED = (
    "run.shift({method}(…)) has changed nothing: this run can be saved, and its phase goes on once nothing is due, as "
    "after run.coming = ()."
)


# ---- beforehand


def foresee(run: Run, method: Method) -> None:
    """Raise, before the first, where a phase to come does not fit the model, where its end could not be seen, or where
    it could not go on as the next."""
    check_lengths(run, method, run.coming, run.step, run._listed)
    need_total(run, [then.method for then in run.coming])
    before = None
    for now, after in zip([method, *(then.method for then in run.coming)], [*run.coming, None], strict=True):
        if before is not None and _takes_over(before, now):
            continue  # what takes over tensors of its own kind is known only then
        with contextlib.suppress(TiedWeights):  # likewise what the phases before untie
            if before is not None:
                run._on.plan(now, ())
            if before is not None or after is not None:
                _check_end(run, now, after)
        before = now


def _takes_over(before: Method, after: Method) -> bool:
    """Whether one may go on with the tensors of the other."""
    return type(before) is type(after) and type(after).inherit is not Method.inherit


def _check_end(run: Run, method: Method, then: Then | None) -> None:
    """Raise where the end of a phase of this method could not be seen, or what it trained not be folded where ``then``
    begins."""
    sites = {spec.name for spec in run._on.plan(method, ())[0]}
    frozen = run._on.frozen if method.trains_base else frozenset()
    names = {name for name, _, _ in base_parameters(run.model)}
    trained = {name for name in names if method.in_place(name, name.rpartition(".")[0] in sites)}
    run._wish(method, then, (trained | method.projects(run.model).keys()) - frozen)
    if then is not None and method.own_bias and not _takes_over(method, then.method):
        for spec in run._on.plan(method.final, ())[0]:
            if f"{spec.name}.bias" not in names:
                raise AttachError(
                    f"{spec.name} has no bias to merge that of {type(method).__name__} into, as is done where "
                    f"{type(then.method).__name__} begins. Train without it: {WITHOUT_BIAS}."
                )


def check_lengths(run: Run, method: Method, coming: Sequence[Then], began: int, listed: int) -> None:
    """Raise ConfigError where a phase cannot begin within the run or is too short for its method; warn of what will not
    be reached. See :func:`check_phases`."""
    for told in check_phases(method, coming, began, listed, run.total_steps):
        if told not in run._warned:
            run._warned.add(told)
            _log.warning("%s", told)


def need_total(run: Run, methods: Iterable[Method]) -> None:
    """Raise ConfigError where one of these has a schedule over the whole run, and nobody has said how long that is."""
    for method in methods:
        if method.needs_total and run.total_steps is None:
            raise ConfigError(
                f"{type(method).__name__} as configured follows a schedule over the whole run, whose length is not "
                "known. Pass total_steps= to attach(), or set run.total_steps: the number of optimizer steps."
            )


# ---- the change


def shift(run: Run, method: Method, data: Iterable[Any] | None) -> Run:
    """See :meth:`Run.shift`."""
    run._open()
    if not isinstance(method, Method):
        raise ConfigError(f"shift needs a method such as rs.LoRA(rank=16); got {type(method).__name__}.")
    refuse_sharded(run.model, "shift()")
    _note_frozen(run)
    # what cannot begin, or could not go on from there, must not end this phase
    listed, coming = _left(run, method)
    estates = _inherited(run, method)
    with run._on.bare():
        if estates is None:
            run._on.plan(method, data)
        if coming or estates is None:
            _check_end(run, method, coming[0] if coming else None)
    if estates is None:
        check_foldable(run.sites.values())
        _check_exact(run)
    try:
        need_total(run, [method])
        check_lengths(run, method, coming, run.step, listed)
    except ConfigError as error:
        error.add_note(_UNCHANGED.format(method=type(method).__name__))
        raise
    heirs = None if estates is None else run._on.heirs(run._on.active[0], method, estates)
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


def _note_frozen(run: Run) -> None:
    """What this phase was to train in place, and somebody has frozen since, stays so, as if it had been before the run;
    and the other way round."""
    method, copied = run.method, tuple(f"{name}." for name in run._on.replicas())
    chosen = {
        name: p.requires_grad
        for name, p, adapted in base_parameters(run.model)
        if (name in run._on.projected or method.in_place(name, adapted)) and not name.startswith(copied)
    }
    trains = {name for name, learns in chosen.items() if learns}
    # a method that does not train the base trains a bias that it is told to, whatever that was before
    run._on.frozen = (run._on.frozen - trains if method.trains_base else run._on.frozen) | (chosen.keys() - trains)


def _check_exact(run: Run) -> None:
    """Raise AttachError where folding what was trained into the weights would round the function away."""
    for name, site in run.sites.items():
        if site.active and not site.base.exact:
            raise AttachError(
                f"{name} is held in {site.base.kind}, and shift() would round what was trained into it: most of a "
                "small change would be lost. Go on by hand: model = run.merge(), which gives dense weights, then "
                f'rs.attach(model, method), with base="{site.base.kind}" if they are to be rounded anew.'
            )


def _anew(run: Run, method: Method, data: Iterable[Any] | None) -> Run:
    """The next phase on the merged model."""
    changed = run.changed
    for name, site in run.sites.items():
        if site.active:
            changed.update(weight_names(name, site))
            if any(adapter.delta_bias() is not None for adapter in site.acting()):
                changed.add(f"{name}.bias")
    for name, replica in run._on.replicas().items():
        changed.update(f"{name}.{leaf}" for leaf, _ in replica.base.named_parameters())
    before, states = {name for name, _, _ in base_parameters(run.model)}, _states(run)
    new = type(run)(run.model, seed=run.seed, total_steps=run.total_steps, start=run.step)
    new._frozen, new._on.frozen = run._frozen, run._on.frozen  # the base is not as it came now
    new._parted = _parted(run, states)
    lr = _hand_on(run, new, method)
    new._driver.skips = run.skipped
    lowered = lowering.how(run.model)
    model = run.merge()
    run._closed, run._moments = "shift()", {}  # who keeps this run keeps no moments with it
    names = {name for name, _, _ in base_parameters(model)}
    new._changed = changed | (names - before)  # tied to what was trained as a copy
    new._moments = {name: state for name, state in states.items() if name in names}
    new._begin(method, data, lr=lr)
    if lowered is not None:
        lowering.lower(model, **lowered)
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
    changed, states = run.changed, _states(run)  # what a site that goes now knows of its base too
    name = run._on.active[0]
    prefix = "" if name == DEFAULT else f"{name}:"
    before = {f"{prefix}{site}.{leaf}": p for site, a in run.adapter(name).items() for leaf, p in a.named_parameters()}
    parted = _parted(run, states, before.keys())
    new = type(run)(run.model, seed=run.seed, total_steps=run.total_steps, start=run.step)
    new._on, new._frozen, new._parted, new._held = run._on, run._frozen, parted, run._held
    run._on.succeed(name, heirs, member)
    new._changed = changed | run._on.train_in_place(method)
    if method.holds is not None and new._held is None:
        new._hold(method, method.holds, fresh=False)
    new._driver.audience, new._driver.trainable = run._on.audience, run._on.required
    new._driver.skips, new._driver.began = run.skipped, run.step
    lr = _hand_on(run, new, method)
    moments: dict[str, Mapping[str, Tensor]] = {k: state for k, state in states.items() if k not in before}
    for site, heir in run.adapter(name).items():
        for leaf, now in heir.named_parameters():
            other = f"{prefix}{site}.{leaf}"
            if other in before and other in states:
                moved = _moved(states[other], before[other], now, heir.slots.get(leaf), estates[site].slots)
                if isinstance(moved, str):
                    parted[other] = moved
                else:
                    moments[other] = moved
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


def _states(run: Run) -> dict[str, Mapping[str, Tensor]]:
    """Adam's moments by the name of a tensor; of a phase without an update those of the phase before. What another
    optimizer keeps in its own way is no matter."""
    kept = run._moments if run._moments is not None and run.step == run.phases[-1].start else {}
    foreign = run._driver.ridden is not None and not isinstance(run._driver.ridden, Optimizer)
    return {**kept, **({} if foreign else run._driver.states())}


def _parted(run: Run, states: Mapping[str, Mapping[str, Tensor]], taken: Set[str] = frozenset()) -> dict[str, str]:
    """Why moments of what was there do not go on, as a clause by name, where that is known now.

    Args:
        states: of the optimizer, by name.
        taken: adapters' tensors whose values are taken over.
    """
    optimizer = run._driver.ridden
    foreign = optimizer is not None and not isinstance(optimizer, Optimizer)
    none = f"whose moments {type(optimizer).__name__} kept in its own way" if foreign else "which had none yet"
    base = {name for name, _, _ in base_parameters(run.model)}
    found = dict.fromkeys(base, "which were frozen before")
    for name, _ in run.trainable():
        found.pop(name, None)
        if name not in base | taken:
            found[name] = "which are others than those of that name before, whose part is in the weights now"
        elif name not in states:
            found[name] = none
    return found


def _hand_on(run: Run, new: Run, method: Method) -> float | None:
    """Let the run of the next phase know what was and what is to come; the learning rate that was said for it."""
    new.phases = [*run.phases[:-1], run.phases[-1].ended(run.step)]
    new._listed, new._coming = _left(run, method)
    new._warned = run._warned
    if new.coming == run.coming:  # by hand
        new._seconds = run._seconds
        return run.phases[-1].lr
    return run.coming[0].lr or run.phases[-1].lr


def _left(run: Run, method: Method) -> tuple[int, tuple[Then, ...]]:
    """Where counting begins once this method does, and what comes then. A shift by hand leaves both as they are."""
    if run.coming and run.coming[0].method == method:
        return run.step, run.coming[1:]
    return run._listed, run.coming


def _moved(
    state: Mapping[str, Tensor], old: Tensor, now: Tensor, axis: int | None, slots: Tensor | None
) -> Mapping[str, Tensor] | str:
    """The optimizer's state of a tensor that took over another's rank ``slots``; or why it is not that tensor's."""
    if slots is not None and axis is not None:
        state = {k: v.index_select(axis, slots.to(v.device)) if v.shape == old.shape else v for k, v in state.items()}
        old = old.detach().index_select(axis, slots.to(old.device))
    if old.shape != now.shape:
        return f"which were {tuple(old.shape)} and are {tuple(now.shape)}"
    return state if torch.equal(old, now) else "which begin with other values"
