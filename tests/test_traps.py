"""Models that only a careless plan shards: the answer stays right, and what has no exact sharding stays whole."""

from __future__ import annotations

import pytest

from autotp.errors import AutoTPError, InputError
from autotp.testing import NotEquivalent
from tests.models.entry import Entry
from tests.models.traps import TRAPS
from tests.support.pooled import PLAIN, equivalent
from tests.support.ranks import Pool

#: Each has one number of ranks in turn, every second of them in `make sweeps`; the other numbers are slow.
CASES = [
    pytest.param(
        entry,
        world,
        id=f"{entry}-{world}",
        marks=pytest.mark.slow if world != entry.worlds[number % len(entry.worlds)] else pytest.mark.sweep if number // 2 % 2 else (),
    )
    for number, entry in enumerate(TRAPS)
    for world in entry.worlds
]


@pytest.mark.parametrize(("entry", "world"), CASES)
def test_trap(pool: Pool, entry: Entry, world: int) -> None:
    try:
        found = equivalent(pool, entry.factory, entry.inputs, tp=world, needs=PLAIN)
    except (NotEquivalent, InputError):
        raise
    except AutoTPError as error:
        if not entry.refusable or "(raised when" in str(error):  # by parallelize, not by a call later
            raise
        return
    assert not set(entry.kept) & found.sharded
