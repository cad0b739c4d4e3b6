"""The command line. Commands are thin: they call the library and print. Heavy imports stand inside the commands."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of `rankshift`: run a command, and turn what goes wrong into two lines and an exit code."""
    from rankshift.cli import boundary
    from rankshift.cli.app import app

    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    with boundary.errors(debug):
        code = app(args=[a for a in arguments if a != "--debug"], prog_name="rankshift", standalone_mode=False)
        boundary.leave(code)  # typer turns its own exits, and Ctrl-C, into a returned number
