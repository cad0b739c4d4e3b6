"""`rankshift merge` and `rankshift export`: the base is loaded again, the adapter put on it, and the result written."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from rich.console import Console

from rankshift.core.errors import ConfigError, ExportError, NotWritable, nearest
from rankshift.io.atomic import COMPRESSED, MODEL, NATIVE, PEFT, Kind, check

if TYPE_CHECKING:
    from rankshift.run import Run
    from rankshift.train.bases import Base

FORMATS: dict[str, Kind] = {"peft": PEFT, "merged": MODEL, "compressed": COMPRESSED}
PROFILES = ("exact", "portable")
ONTO = ("dequantised", "original", "requantised")
_OPTIONS = {  # what an error says of Python → the same on the command line, longest first
    'run.merge() or format="merged"': "rankshift merge",
    'format="merged" for a plain model, or run.save()': "rankshift merge for a plain model",
    'format="merged"': "rankshift merge",
    'format="compressed"': "--format compressed",
    'profile="exact"': "--profile exact",
    "Export to another format": "Choose another --format",
    'onto="dequantised"': "--onto dequantised",
    'onto="requantised"': "--onto requantised",
    'onto="original"': "--onto original",
    'LoRA(lora_bias=False), PCLoRA(bias="match")': "method.lora_bias=false, or for PC-LoRA method.bias=match",
}


def export_run(
    directory: Path,
    out: Path,
    model: str | None,
    format: str,
    profile: str,
    onto: str = "dequantised",
    original: str | None = None,
    lossy: bool = False,
) -> None:
    """Write what other programs load, and say how they load it."""
    for what, value, known in (("format", format, FORMATS), ("profile", profile, PROFILES), ("onto", onto, ONTO)):
        if value not in known:
            hint = nearest(value, known)
            hint = hint if hint.startswith("Did") else f"Write --{what} {next(iter(known))}, say."
            raise ConfigError(f"--{what} {value!r} is none of {', '.join(known)}. {hint}")
    if out.exists() and directory.exists() and out.samefile(directory):
        raise NotWritable(f"{out} is the run itself. Name another directory to write to.")
    check(out, FORMATS[format])  # before minutes go into loading a base
    _refuse_model(directory)
    if original is not None and onto != "original":
        raise ConfigError(f"--original names the base for --onto original, not for --onto {onto}. Leave one out.")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what it misses on a CPU nothing here uses
    from rankshift.run import load
    from rankshift.train import bases, models

    base, console = bases.load(directory, model), Console()
    run = load(base.model, base.adapter)
    there: dict[str, Any] = {"onto": onto}
    if onto == "original":
        there["original"] = bases.load(directory, original or model).model
    with models.quiet():
        try:
            if format == "merged" and run.summary().held:
                _compare(run, base, there, lossy, console)
            run.export(
                out,
                format=cast(Literal["peft", "merged", "compressed"], format),
                profile=cast(Literal["exact", "portable"], profile),
                **there,
            )
        except (ExportError, ConfigError) as error:
            raise type(error)(on_command_line(str(error))) from error
        if base.reader is not None:
            base.reader.save_pretrained(out)
    kind = type(base.model).__name__
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file()) / 2**20
    if format == "merged":
        use = f"transformers.{kind}.from_pretrained({str(out)!r})"
    elif format == "compressed":
        use = f"rankshift.load_compressed({str(out)!r})"
    else:
        use = f"peft.PeftModel.from_pretrained(base, {str(out)!r})"
    console.print(f"{out}: {format}, {size:.1f} MiB", highlight=False, markup=False, soft_wrap=True)
    console.print(f"Load it: {use}", highlight=False, markup=False, soft_wrap=True)


def _compare(run: Run, base: Base, there: Mapping[str, Any], lossy: bool, console: Console) -> None:
    """Say what becomes of the model, before it is written.

    Raises:
        ExportError: most of what was trained would be rounded away, and nobody said that this is meant.
    """
    from rankshift.train.recipe import no_cache
    from rankshift.train.samples import samples

    found = samples(base)
    if found is None:
        console.print("Not compared: the run's data is not there, and the model reads no text.", highlight=False)
        return
    inputs, words = found
    with no_cache(run.model):
        parity = run.parity(inputs, **there)
    console.print(f"As it was trained and as it will be, on {words}:", highlight=False)
    for line in str(parity).splitlines():
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
    if there["onto"] == "requantised" and parity.lossy and not lossy:
        raise ExportError(
            f"Rounded again, what was trained is off by {100 * parity.median:.0f} % of itself at half of the layers: "
            'most of it is lost. Merge onto="dequantised", the base that it was trained on, or say with --lossy that '
            "this is meant."
        )


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
