"""`rankshift merge` and `rankshift export`: the base is loaded again, the adapter put on it, and the result written."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast

from rich.console import Console

from rankshift.core.errors import ConfigError, ExportError, NotWritable, nearest
from rankshift.io.atomic import COMPRESSED, MODEL, NATIVE, PEFT, Kind, check

FORMATS: dict[str, Kind] = {"peft": PEFT, "merged": MODEL, "compressed": COMPRESSED}
PROFILES = ("exact", "portable")
_OPTIONS = {  # what an error says of Python → the same on the command line, longest first
    'run.merge() or format="merged"': "rankshift merge",
    'format="merged" for a plain model, or run.save()': "rankshift merge for a plain model",
    'format="merged"': "rankshift merge",
    'format="compressed"': "--format compressed",
    'profile="exact"': "--profile exact",
    "Export to another format": "Choose another --format",
    'LoRA(lora_bias=False), PCLoRA(bias="match")': "method.lora_bias=false, or for PC-LoRA method.bias=match",
}


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
    _refuse_model(directory)
    from rankshift.run import load
    from rankshift.train import bases, models

    base = bases.load(directory, model)
    run = load(base.model, base.adapter)
    with models.quiet():
        try:
            run.export(
                out,
                format=cast(Literal["peft", "merged", "compressed"], format),
                profile=cast(Literal["exact", "portable"], profile),
            )
        except ExportError as error:
            raise ExportError(on_command_line(str(error))) from error
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


def on_command_line(text: str) -> str:
    """The library's advice, which is written for Python, in the words of the commands."""
    for python, option in _OPTIONS.items():
        text = text.replace(python, option)
    return text


def _refuse_model(directory: Path) -> None:
    """A model that is whole already has nothing to be exported from."""
    if not directory.is_dir() or NATIVE.at(directory) or PEFT.at(directory):
        return
    if COMPRESSED.at(directory):
        raise ConfigError(
            f"{directory} is a compressed model, which stands without its base: there is no adapter in it. "
            f'Load it: rs.load_compressed("{directory}"); or name the run that it came from.'
        )
    if MODEL.at(directory):
        raise ConfigError(
            f"{directory} is a plain model: there is no adapter in it to merge or export. Use it as it is, or name "
            "the run that it came from."
        )
