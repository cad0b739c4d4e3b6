"""Where errors end: two lines on stderr and an exit code.

0    done
1    something that is not the user's doing; --debug shows where
2    a setting, a file or a model is not as it must be
130  Ctrl-C
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

_INTERRUPTED = 130


@contextlib.contextmanager
def errors(debug: bool) -> Iterator[None]:
    """Leave the process as the table above says; with ``debug`` exceptions pass through with their traceback."""
    import typer

    # typer carries its own copy of click, or needs click, depending on its version
    usage: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "UsageError")
    try:
        yield
    except typer.Exit as stop:
        sys.exit(stop.exit_code)
    except usage as error:
        text = error.format_message()
        if type(error).__name__ == "NoArgsIsHelpError":
            print(text)
            sys.exit(2)
        path = error.ctx.command_path if error.ctx else "rankshift"
        _leave(2, f"{text.rstrip('.')}{'' if text.endswith(('?', '?.')) else '.'}\nSee {path} --help")
    except (KeyboardInterrupt, typer.Abort):
        leave(_INTERRUPTED)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader left: nothing to say, nowhere to
        sys.exit(1)
    except Exception as error:
        from rankshift.core.errors import RankshiftError

        if debug:
            raise
        if isinstance(error, RankshiftError):
            text = two_lines(str(error))
            _leave(2, text if "\n" in text else f"{text}\n{_see()}")
        first = (str(error).strip() or type(error).__name__).split("\n")[0]
        what = f"{type(error).__name__}: {first}"
        _leave(1, f"{what}\nThis was not foreseen. Run again with --debug to see where it comes from.")


def leave(code: object) -> None:
    """End with a number that a command returned instead of raising it."""
    if code == _INTERRUPTED:
        _leave(_INTERRUPTED, "Stopped.")
    if isinstance(code, int) and code != 0:
        sys.exit(code)


def two_lines(text: str) -> str:
    """An error's text with what happened on the first line and what to do on the second."""
    if "\n" in text:
        return text
    return re.sub(r"(?<=[.!?])\s+(?=[A-Z])", "\n", text, count=1)


def _see() -> str:
    """Where to look when an error does not say what to do: the help of the command that was given."""
    command = next((a for a in sys.argv[1:] if not a.startswith("-")), "")
    if command == "train":
        return "See rankshift train --keys, and rankshift methods NAME for the settings of a method."
    return f"See rankshift {command} --help" if command else "See rankshift --help"


def _leave(code: int, text: str) -> None:
    what, _, rest = two_lines(text).partition("\n")
    print(what if code == _INTERRUPTED else f"error: {what}", file=sys.stderr)
    for line in rest.splitlines():
        print(f"       {line}", file=sys.stderr)
    sys.exit(code)
