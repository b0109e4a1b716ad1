"""Models that only a careless plan shards: the answer stays right, and what has no exact sharding stays whole."""

from __future__ import annotations

import pytest

from tests.models.entry import Entry
from tests.models.traps import TRAPS
from tests.support.equivalence import check
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
    report = check(pool, entry.factory, entry.inputs, world=world)
    if entry.refusable and "AutoTPError" in report.problems.get("parallelize", ""):
        return
    report.require("forward", "grad", "state_dict")
    assert not set(entry.kept) & report.sharded
