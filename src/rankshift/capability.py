"""What a method can do, found out by asking it: its own verbs, and a run on one small layer. None is known by name.

Reasons why not are the library's own refusals. What a setting changes (``init="eva"`` looks at data) is found by trying
each value of the fields that have a few, one at a time.
"""

from __future__ import annotations

import dataclasses
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, Literal, Union, get_args, get_origin

import torch
from torch import Tensor, nn

from rankshift.core.config import hints
from rankshift.core.errors import ConfigError, RankshiftError, RankTooLarge, UnsupportedLayer
from rankshift.core.event import Moment
from rankshift.core.form import ConvForm, EmbeddingForm, ExpertsForm, Form, TransposedForm
from rankshift.core.method import Method
from rankshift.core.random import Key, normal
from rankshift.core.site import Spec
from rankshift.holding import check_method
from rankshift.run import Run, attach

LAYERS: Mapping[str, tuple[str, Form]] = {  # kind → a name that such a layer has, and its form
    "Linear": ("q_proj", Form()),
    "Conv1D": ("c_attn", TransposedForm()),  # transformers'
    "Conv": ("conv", ConvForm(channels=1024, kernel=(2, 2), stride=(1, 1), padding=(0, 0), dilation=(1, 1))),
    "Embedding": ("embed_tokens", EmbeddingForm()),
    "experts": ("experts.gate_up_proj", ExpertsForm(8)),
}
_WHEN = {
    Moment.WINDOW: "before each update's forward",
    Moment.GRADS: "on the gradients",
    Moment.UPDATED: "after each update",
}
_SIDE = 4096  # of the layers asked about: no rank exceeds it, and powers of two divide it
_STEPS = 8  # updates of the small run


@dataclass(frozen=True)
class Capability:
    """What one configuration can do. A text is the reason why not; empty if nothing stands in the way."""

    layers: Mapping[str, str]  # by kind of layer
    projects: bool  # trains layers where they are, by projected gradients, instead of adapting them
    lora: str  # export as one plain LoRA, exactly
    merge: str  # end as plain weights of the same shapes
    disable: str  # the base, bit for bit, in mid-run
    quantised: str  # stand on weights in 4 bits
    second: str  # another adapter of the same method beside it
    total: bool  # needs total_steps
    data: bool  # looks at data before it starts
    shared: Mapping[str, Any] | None  # what all its layers share, as plain values
    events: tuple[str, ...]  # what changes between steps


def probe(method: Method) -> Capability:
    """Ask one configuration."""
    run = _half_way(method)
    with tempfile.TemporaryDirectory() as folder:
        lora = _refusal(lambda: run.export(f"{folder}/lora", profile="portable"))
    disable = _refusal(lambda: _enter(run))
    second = _refusal(lambda: run.add("second", method, data=_Batches(run.model)))
    return Capability(
        layers=layers(method),
        projects=bool(method.projects(run.model)),
        lora=lora,
        merge=_refusal(_half_way(method).merge),
        disable=disable,
        quantised=_refusal(lambda: check_method(method, "nf4")),
        second=second,
        total=method.needs_total,
        data=method.needs_data,
        shared=run.describe()["adapters"]["default"].get("shared"),
        events=tuple(f"{_WHEN[event.moment]}: {_first_line(event)}" for event in method.events()),
    )


def layers(method: Method) -> dict[str, str]:
    """Why not, for every kind of layer."""
    cpu = torch.device("cpu")
    specs = {kind: Spec(name, _SIDE, _SIDE, form, torch.float32, cpu) for kind, (name, form) in LAYERS.items()}
    return {kind: _refusal(partial(method.fit, spec), UnsupportedLayer) for kind, spec in specs.items()}


def variants(kind: type[Method]) -> Iterator[tuple[str, Method]]:
    """(setting, method): the default but for one field, for every value of fields that have a few."""
    types_of = hints(kind)  # type: ignore[arg-type]
    for field in dataclasses.fields(kind):
        for value in _values(types_of[field.name]):
            default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
            if value != default or type(value) is not type(default):
                try:
                    yield f"{field.name}={value!r}".replace("'", '"'), kind(**{field.name: value})
                except ConfigError:  # it needs another setting besides
                    continue


def _values(hint: Any) -> tuple[Any, ...]:
    if hint is bool:
        return (True, False)
    if get_origin(hint) is Literal:
        return get_args(hint)
    if get_origin(hint) is tuple and get_args(hint)[0] is float:  # a schedule of numbers, such as SoRA's stages
        return ((0.1, 0.2),)
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(value for option in get_args(hint) for value in _values(option))
    return ()


# ---- a small run -----------------------------------------------------------------------------------------------------


class _Net(nn.Module):
    """One linear layer."""

    def __init__(self, side: int) -> None:
        super().__init__()
        layer = nn.Linear(side, side, device="meta")  # there nothing is drawn from the global generator
        self.layer = layer.to_empty(device="cpu")
        with torch.no_grad():
            self.layer.weight.copy_(_noise(side, side) / side**0.5)
            self.layer.bias.zero_()

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = self.layer(x)
        return SimpleNamespace(logits=y, loss=None if labels is None else (y - labels).square().mean())


@dataclass(frozen=True)
class _Batches:
    """One batch, of 64 rows."""

    model: Any

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        x = _noise(64, self.model.layer.in_features)
        yield {"x": x, "labels": x.roll(1)}


@cache
def _noise(*shape: int) -> Tensor:
    return normal(Key(0), shape)


def _attached(method: Method) -> Run:
    """A run on the smallest layer that takes the method's rank."""
    side = 256
    while True:
        model = _Net(side)
        try:
            return attach(model, method, total_steps=_STEPS if method.needs_total else None, data=_Batches(model))
        except RankTooLarge:
            if side >= _SIDE:
                raise
            side *= 4


def _half_way(method: Method) -> Run:
    """A run in the middle of its schedule."""
    run = _attached(method)
    run.load_state_dict({**run.state_dict(), "step": _STEPS // 2})
    return run


def _enter(run: Run) -> None:
    with run.disabled():
        pass


def _refusal(act: Callable[[], object], kind: type[RankshiftError] = RankshiftError) -> str:
    """The text of the error that an act meets; empty if it meets none."""
    try:
        act()
    except kind as error:
        return str(error)
    return ""


def _first_line(value: object) -> str:
    return (type(value).__doc__ or "").strip().partition("\n")[0]
