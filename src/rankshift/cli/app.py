"""The commands and their help. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Train PyTorch models in small subspaces: LoRA and its relatives.",
    epilog="Start with [bold]rankshift train[/bold]: it needs nothing and takes a minute or two.",
)

Run = Annotated[Path, typer.Argument(metavar="DIR", help="A run, its adapter directory, or a PEFT adapter.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Directory to write.")]
Base = Annotated[
    str | None, typer.Option("--model", metavar="PATH_OR_HUB_ID", help="The base, if it is no longer where it was.")
]


def _version(wanted: bool) -> None:
    if wanted:
        from rankshift import __version__

        typer.echo(f"rankshift {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks. May stand anywhere.")] = False,
) -> None:
    """Options of every command; the two are handled before a command runs."""


@app.command(
    epilog="Examples:\n\n"
    "rankshift train\n\n"
    "rankshift train method.rank=32 train.steps=500\n\n"
    "rankshift train recipe.yaml model=PATH_OR_HUB_ID data=train.jsonl data.validation=dev.jsonl\n\n"
    "rankshift train --resume runs/babyllama-lora-1"
)
def train(
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[CONFIG.yaml] [KEY=VALUE]...", help="A recipe, and settings that replace its own."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="DIR", help="Go on with an interrupted run.")
    ] = None,
    keys: Annotated[bool, typer.Option("--keys", help="List every setting with its meaning, and exit.")] = False,
) -> None:
    """Fine-tune a model. Without settings: a small bundled model on a bundled text."""
    from rankshift.cli.train import list_keys, run

    if keys:
        list_keys()
    else:
        run(settings or [], resume)


@app.command()
def merge(
    directory: Run,
    out: Out,
    model: Base = None,
    onto: Annotated[
        str,
        typer.Option(
            help="Of a base in fewer bits. dequantised: as it was trained on. original: as it was before it was "
            "rounded. requantised: in as few bits again."
        ),
    ] = "dequantised",
    original: Annotated[
        str | None,
        typer.Option(metavar="PATH_OR_HUB_ID", help="With --onto original: that base. By default where it was."),
    ] = None,
    lossy: Annotated[bool, typer.Option("--lossy", help="Write it, though most of what was trained is lost.")] = False,
) -> None:
    """Fold an adapter into its base: a plain transformers model. Of a base in fewer bits, show first what is lost."""
    from rankshift.cli.files import export_run

    export_run(directory, out, model, "merged", "exact", onto, original, lossy)


@app.command()
def export(
    directory: Run,
    out: Out,
    format: Annotated[
        str, typer.Option(help="peft: an adapter. merged: a plain model. compressed: what PC-LoRA leaves.")
    ] = "peft",
    profile: Annotated[
        str, typer.Option(help="exact: as it is. portable: one plain LoRA of uniform rank, as servers take it.")
    ] = "exact",
    model: Base = None,
) -> None:
    """Write an adapter for PEFT and servers, or a model."""
    from rankshift.cli.files import export_run

    export_run(directory, out, model, format, profile)


@app.command()
def inspect(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A run, a checkpoint, an adapter, a merged or a compressed model.")
    ],
) -> None:
    """Say what a directory holds and check its files."""
    from rankshift.cli.inspect import show

    show(directory)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method, for its settings.")] = None,
) -> None:
    """List the methods, or the settings of one."""
    from rankshift.cli.methods import show_all, show_one

    if name is None:
        show_all()
    else:
        show_one(name)
