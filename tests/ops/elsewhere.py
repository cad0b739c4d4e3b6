"""Processes for tests of kernels: under Triton's interpreter, or compiled for a GPU that is not here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(*command: str | Path, **environment: str) -> None:
    """Run Python with these arguments, and fail as it does."""
    done = subprocess.run(
        [sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
