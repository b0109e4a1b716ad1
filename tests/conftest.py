"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["AUTOTP_CACHE"] = "0"  # also in the processes that tests start: no test takes a plan that a user keeps

import pytest

from tests.support.ranks import Pool


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--slow` runs everything, `--sweeps` and `--programs` what is marked so."""
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")
    parser.addoption("--sweeps", action="store_true", help="run the tests marked sweep, and nothing else")
    parser.addoption("--programs", action="store_true", help="run the examples and the commands of the documents, and nothing else")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    config.addinivalue_line("markers", "slow: a combination that the faster tests nearly cover; runs with --slow")
    config.addinivalue_line(
        "markers", "sweep: the same claim over more models, sizes, ranks or processes than `make test` has time for; see --sweeps"
    )
    config.addinivalue_line("markers", "programs: runs programs and commands in processes of their own, as a user does; see --programs")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is not asked for: a test is slow or not, and belongs to a sweep, to the programs or to neither."""
    slow = config.getoption("--slow")
    only = {marker for marker, option in (("sweep", "--sweeps"), ("programs", "--programs")) if config.getoption(option)}

    def runs(item: pytest.Item) -> bool:
        of = {marker for marker in ("sweep", "programs") if item.get_closest_marker(marker) is not None}
        return (slow or item.get_closest_marker("slow") is None) and (bool(of & only) if only else slow or not of)

    left_out = [item for item in items if not runs(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if runs(item)]


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes with a gloo group, kept for the whole session: `pool.run(function, *args, world=2)`."""
    ranks = Pool()
    yield ranks
    ranks.stop()
