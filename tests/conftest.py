"""Fixtures for all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from tests.support.ranks import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Worker processes with a gloo group, kept for the whole session: `pool.run(function, *args, world=2)`."""
    ranks = Pool()
    yield ranks
    ranks.stop()
