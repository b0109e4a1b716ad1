"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.support.ranks import Pool


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slow` runs everything."""
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker."""
    config.addinivalue_line("markers", "slow: a combination that the faster tests nearly cover; runs with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave slow tests out unless asked for."""
    if config.getoption("--slow"):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes with a gloo group, kept for the whole session: `pool.run(function, *args, world=2)`."""
    ranks = Pool()
    yield ranks
    ranks.stop()
