"""`rankshift train`."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from rich.console import Console

from rankshift.core.errors import ConfigError


def run(settings: list[str], resume: Path | None) -> None:
    """Train by a config file and overrides, or go on with a run."""
    files = [text for text in settings if "=" not in text]
    overrides = [text for text in settings if "=" in text]
    if len(files) > 1:
        raise ConfigError(f"{files[1]!r} is a second config file. Give one file, and settings as key=value.")
    other = next((text for text in settings if not text.startswith("method.")), None)
    if resume is not None and other is not None:
        raise ConfigError(
            f"--resume goes on with the settings of {resume}, but for those of its method. Leave {other!r} out, or "
            "start a new run."
        )
    if "LOCAL_RANK" not in os.environ:  # one process uses one GPU; several are torchrun's business
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    # peft loads it where it is installed, and on a CPU it misses kernels that nothing here uses
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from rankshift.train import config

    wanted = None if resume is not None else config.read(files[0] if files else None, overrides)
    from rankshift.train import recipe  # after the settings, whose errors need nothing of it

    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of several processes the first one speaks
    _say(console)
    try:
        if wanted is not None:
            recipe.train(wanted, console)
        elif resume is not None:
            recipe.resume(resume, console, overrides)
    except recipe.Interrupted as stop:
        if not recipe.resumable(stop.directory):
            console.print(f"\nStopped after update {stop.step}, before anything was saved.", highlight=False)
            console.print(recipe.anew(stop.directory), highlight=False, markup=False, soft_wrap=True)
            sys.exit(130)
        console.print(f"\nStopped after update {stop.step}; the state is saved. Go on with:", highlight=False)
        console.print(f"  rankshift train --resume {stop.directory}", highlight=False, soft_wrap=True)
        sys.exit(130)


def list_keys() -> None:
    """Every setting of a config with its meaning and default."""
    import dataclasses

    from rich.table import Table

    from rankshift.core.config import describe as words
    from rankshift.core.config import hints
    from rankshift.train.config import DataConfig, LoopConfig, TrainConfig, describe

    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("key", "default", "meaning"):
        table.add_column(title, no_wrap=title == "key", overflow="fold")
    sections = {"": TrainConfig, "data": DataConfig, "train": LoopConfig}
    for key, meaning in describe().items():
        section, _, leaf = key.rpartition(".")
        if key in ("data", "train"):
            continue
        field = next(f for f in dataclasses.fields(sections[section]) if f.name == leaf)
        if key == "method":
            default = "lora"
        elif field.default is dataclasses.MISSING:
            default = "[dim]needed[/dim]" if field.default_factory is dataclasses.MISSING else "[dim]none[/dim]"
        else:
            default = "[dim]none[/dim]" if field.default in (None, ()) else str(field.default).lower()
        kind = words(hints(sections[section])[leaf]) if "one of" in words(hints(sections[section])[leaf]) else ""
        table.add_row(key, default, f"{meaning}{f' [dim]({kind})[/dim]' if kind and key != 'method' else ''}")
    console = Console()
    console.print(table, highlight=False)
    console.print("\nSettings of a method: rankshift methods NAME; write them as method.rank=32.", highlight=False)


class _Notes(logging.Handler):
    """What the library has to say, as a line. How to resume is told by the command, in its own words."""

    def __init__(self, console: Console):
        super().__init__(logging.WARNING)
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        if not record.getMessage().startswith("Interrupted at"):
            self.console.print(record.getMessage(), highlight=False, markup=False, soft_wrap=True)


def _say(console: Console) -> None:
    logger = logging.getLogger("rankshift")
    logger.addHandler(_Notes(console))
    logger.propagate = False
