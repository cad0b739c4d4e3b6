"""The two pools of a session, and the methods that exist for the laws only."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from laws.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Two ranks."""
    pool = Pool(2)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def pool_of_four() -> Iterator[Pool]:
    """Four ranks, for what was saved on two."""
    pool = Pool(4)
    yield pool
    pool.stop()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "capability(*columns): what a test shows a method to do, in the capability table")
