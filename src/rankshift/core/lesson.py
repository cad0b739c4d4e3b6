"""What a model's layers put out, for losses that compare it with the model as it came: the student and its teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Heard:
    """One forward of the model."""

    features: dict[str, list[Tensor]]  # module → what it put out, call by call
    output: Any  # what the model returned


@dataclass(frozen=True)
class Lesson:
    """The same batch through the model as it trains, and through the model as it came, without dropout or gradient."""

    student: Heard
    teacher: Heard


@dataclass(eq=False)
class Ear:
    """Hears named modules of one model during its training forwards, and keeps what the last of them put out.

    It listens from the model's own forward pre-hook to its forward hook and at no other time, so what gradient
    checkpointing runs again in backward is not heard. One for life: compiled code keeps the hooks it was traced with.
    """

    waiting: bool = False  # a training forward was heard, and nobody has taken it
    missed: bool = False  # one was heard while another was waiting
    _open: bool = False
    _features: dict[str, list[Tensor]] = field(default_factory=dict)
    _output: Any = None
    _hooks: list[Any] = field(default_factory=list)

    @property
    def listening(self) -> bool:
        """Whether there is anything to hear."""
        return bool(self._hooks)

    def attend(self, model: nn.Module, modules: Mapping[str, nn.Module] | None) -> None:
        """Hear these modules of this model, and what it returns, from now on; with None nothing at all."""
        for hook in self._hooks:
            hook.remove()
        self.unanswered()
        self._hooks = []
        if modules is not None:
            self._hooks = [
                model.register_forward_pre_hook(self._begin),
                *(m.register_forward_hook(functools.partial(self._hear, name)) for name, m in modules.items()),
                model.register_forward_hook(self._end),
            ]

    def take(self) -> Heard:
        """What was heard last; kept here no longer."""
        heard = Heard(self._features, self._output)
        self._features, self._output = {}, None
        self.waiting = self._open = False
        return heard

    def unanswered(self) -> bool:
        """Whether a training forward was not taken since this was last asked."""
        found = self.waiting or self.missed
        self.take()
        self.missed = False
        return found

    def overhear(self, call: Callable[[], Any]) -> Heard:
        """What is put out while ``call`` runs the model, in whatever mode."""
        self._open = True
        try:
            output = call()
            return Heard(self._features, output)
        finally:
            self.take()

    def _begin(self, model: nn.Module, args: object) -> None:
        if model.training and torch.is_grad_enabled():
            if self.waiting:
                self.missed = True
            self._features = {}
            self._open = True

    def _hear(self, name: str, module: nn.Module, args: object, output: Any) -> None:
        if self._open:
            if isinstance(output, Mapping):  # as transformers returns it: the hidden states come first
                output = next(iter(output.values()))
            self._features.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

    def _end(self, model: nn.Module, args: object, output: Any) -> None:
        if self._open and model.training and torch.is_grad_enabled():
            self._output = output
            self._open = False
            self.waiting = True
