"""Jobs for the test of the pool, in a file of their own that loads nothing: their processes start at once."""

from __future__ import annotations

import os
import time

_HERE: dict[str, int] = {}


def begin(rank: int, size: int, store: str) -> None:
    """In place of joining a group."""
    _HERE["rank"] = rank


def whoami(offset: int) -> tuple[int, int]:
    return os.getpid(), _HERE["rank"] + offset


def fail_on_one() -> None:
    if _HERE["rank"] == 1:
        raise ValueError("rank one is ill")
    time.sleep(30)  # as in a collective that the other will not come to


def sleep() -> None:
    time.sleep(30)


def die() -> None:
    if _HERE["rank"] == 0:
        os._exit(3)
