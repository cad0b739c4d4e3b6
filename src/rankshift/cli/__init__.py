"""The command line. Commands are thin: they call the library and print. Heavy imports stand inside the commands."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Entry point of `rankshift`: run a command, and turn what goes wrong into two lines and an exit code."""
    from rankshift.cli import boundary
    from rankshift.cli.app import app

    # read by OpenMP when torch is imported: threads that wait by spinning take the cores from those that compute, as
    # soon as anything else runs here (small model, 2 threads, load 6: 1,400 tokens/s spinning, 3,400 sleeping)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    with boundary.errors(debug):
        code = app(args=[a for a in arguments if a != "--debug"], prog_name="rankshift", standalone_mode=False)
        boundary.leave(code)  # typer turns its own exits, and Ctrl-C, into a returned number
