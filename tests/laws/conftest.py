"""The two pools of a session, and the methods that exist for the laws only."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from laws import capabilities
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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--capabilities", metavar="PAGE", help="write what the laws have shown of each method there")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "capability(*columns): what a test shows a method to do; see laws/capabilities")
    page = config.getoption("--capabilities", None)
    if page is not None and not hasattr(config, "workerinput"):  # pytest-xdist: the first process hears of every report
        config.pluginmanager.register(capabilities.Recorder(Path(page)), "capabilities")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    capabilities.stamp(items)
