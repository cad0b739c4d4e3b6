"""Phases: what trained when. A change of the set of trainable tensors begins a new one, never happens inside one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rankshift.core.errors import ConfigError


@dataclass(frozen=True)
class Phase:
    """One method from one update to another."""

    method: dict[str, Any]  # as to_dict gives it
    start: int  # updates taken before its first
    stop: int | None = None  # updates taken when it ended; None while it runs

    def ended(self, step: int) -> Phase:
        """This phase, closed after ``step`` updates."""
        return Phase(self.method, self.start, step)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for a manifest."""
        return {"method": self.method, "start": self.start, "stop": self.stop}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any], where: str = "phase") -> Phase:
        """The inverse of :meth:`to_mapping`."""
        try:
            return cls(dict(values["method"]), int(values["start"]), values["stop"])
        except (KeyError, TypeError) as error:
            raise ConfigError(f"{where} is not a phase: {values!r}.") from error
