"""Full fine-tuning: every weight trains, in place. The reference that every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from rankshift.core.errors import ConfigError, UnmatchedTarget, nearest
from rankshift.core.method import Method
from rankshift.core.site import matches, prefixes


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """W ← W − lr · AdamW(∂L/∂W) for every parameter, or for those that ``targets`` names."""

    name: ClassVar[str] = "full"
    paper: ClassVar[str] = "Loshchilov & Hutter 2019, arXiv 1711.05101 (AdamW)"
    summary: ClassVar[str] = "every weight, in place, with AdamW"
    formula: ClassVar[str] = "out·in"
    reversible: ClassVar[bool] = False
    trains_base: ClassVar[bool] = True
    default_lr: ClassVar[float] = 2e-5

    targets: str | tuple[str, ...] = "all"
    """What to train: "all", or names of modules or parameters, matched as in other methods. "all-linear" is no name."""

    def check(self) -> None:
        if "all-linear" in self._patterns():
            raise ConfigError(
                'Full(targets="all-linear"): Full takes names of modules and parameters. Use "all", or name the '
                'layers, e.g. ("q_proj", "v_proj").'
            )
        if self.modules_to_save:
            raise ConfigError("Full trains modules where they are, without copies. Name them in targets instead.")

    def sites(self, model: nn.Module) -> list[str]:
        names = [name for name, _ in model.named_parameters()]
        parts = {prefix for name in names for prefix in prefixes(name)}
        for pattern in (*self._patterns(), *self.exclude):
            if not any(matches(part, pattern) for part in parts):
                known = {part.rpartition(".")[2] for part in parts}
                raise UnmatchedTarget(
                    f"{pattern!r} matches no parameter of {type(model).__name__}. {nearest(pattern, known)}"
                )
        return []

    def in_place(self, name: str, adapted: bool) -> bool:
        named = [[matches(part, p) for part in prefixes(name)] for p in self._patterns()]
        out = [matches(part, p) for part in prefixes(name) for p in self.exclude]
        return (self.targets == "all" or any(map(any, named))) and not any(out)

    def must_learn(self, name: str) -> bool:
        return False  # models own parameters that a task never reaches, such as BERT's pooler

    def _patterns(self) -> tuple[str, ...]:
        if self.targets == "all":
            return ()
        return (self.targets,) if isinstance(self.targets, str) else self.targets
