"""`rankshift merge` and `rankshift export`: the base is loaded again, the adapter put on it, and the result written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from rich.console import Console

from rankshift.core.errors import ConfigError, NotWritable, nearest
from rankshift.io.atomic import COMPRESSED, MODEL, PEFT, Kind, check

FORMATS: dict[str, Kind] = {"peft": PEFT, "merged": MODEL, "compressed": COMPRESSED}
PROFILES = ("exact", "portable")


def export_run(directory: Path, out: Path, model: str | None, format: str, profile: str) -> None:
    """Write what other programs load, and say how they load it."""
    for what, value, known in (("format", format, FORMATS), ("profile", profile, PROFILES)):
        if value not in known:
            hint = nearest(value, known)
            hint = hint if hint.startswith("Did") else f"Write --{what} {next(iter(known))}, say."
            raise ConfigError(f"--{what} {value!r} is none of {', '.join(known)}. {hint}")
    if out.exists() and directory.exists() and out.samefile(directory):
        raise NotWritable(f"{out} is the run itself. Name another directory to write to.")
    check(out, FORMATS[format])  # before minutes go into loading a base
    from rankshift.run import load
    from rankshift.train import bases, models

    base = bases.load(directory, model)
    run = load(base.model, base.adapter)
    with models.quiet():
        run.export(
            out,
            format=cast(Literal["peft", "merged", "compressed"], format),
            profile=cast(Literal["exact", "portable"], profile),
        )
        if base.reader is not None:
            base.reader.save_pretrained(out)
    console, kind = Console(), type(base.model).__name__
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 2**20
    if format == "merged":
        use = f"transformers.{kind}.from_pretrained({str(out)!r})"
    elif format == "compressed":
        use = f"rankshift.load_compressed({str(out)!r})"
    else:
        use = f"peft.PeftModel.from_pretrained(base, {str(out)!r})"
    console.print(f"{out}: {format}, {size:.1f} MiB", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Load it: {use}", highlight=False, markup=False, soft_wrap=True)
