"""Settings of every test run, and the way to the shared data."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MKL_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["MPLBACKEND"] = "Agg"

import pytest
import torch

torch.set_num_threads(1)  # tiny models are slower on more, and test processes share the machine


def shared(*parts: str) -> Path:
    """A path under the shared data directory; the test is skipped if it is not there."""
    root = Path(os.environ.get("RANKSHIFT_SHARED", Path(__file__).parents[2] / "shared"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"shared data is not here: {path.name}")
    return path


@pytest.fixture(name="shared")
def shared_fixture():
    """:func:`shared` as a fixture."""
    return shared
