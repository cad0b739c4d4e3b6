"""Learning-rate schedules: pure functions of the update to a factor on the peak rate, in [0, 1].

Updates are counted from 0, so a warm-up begins at 0 and has reached 1 after ``warmup`` updates.
"""

from __future__ import annotations

import math

from rankshift.core.errors import ConfigError


def cosine(update: int, total: int, warmup: int = 0, floor: float = 0.0) -> float:
    """Up along a line over ``warmup`` updates, then along half a cosine to ``floor`` at ``total``, and there on."""
    if update < warmup:
        return update / warmup
    part = min(1.0, (update - warmup) / max(1, total - warmup))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * part))


def jagged_cosine(update: int, total: int, warmup: int, cycle: int, rewarm: int, floor: float = 0.0) -> float:
    """:func:`cosine`, and at the start of every ``cycle`` updates but the first one up from 0 again, along a line that
    meets it after ``rewarm`` updates. ReLoRA's schedule (Lialin et al. 2023, arXiv 2307.05695)."""
    into = update % cycle
    if update < cycle or into >= rewarm:
        return cosine(update, total, warmup, floor)
    return into / rewarm * cosine(update - into + rewarm, total, warmup, floor)


def check_warmup(warmup: int, total: int) -> None:
    """Raise ConfigError unless a schedule of ``total`` updates can begin with this warm-up."""
    if not 0 <= warmup < total:
        raise ConfigError(
            f"warmup = {warmup}: updates over which the learning rate rises, at least 0 and fewer than the {total} "
            "that there are."
        )
