"""Hand-written models: equal, and really sharded."""

from __future__ import annotations

import pytest

from tests.models.custom import CUSTOM
from tests.models.entry import Entry
from tests.support.equivalence import check
from tests.support.ranks import Pool

CASES = [pytest.param(entry, world, id=f"{entry}-{world}") for entry in CUSTOM for world in entry.worlds]


@pytest.mark.parametrize(("entry", "world"), CASES)
def test_custom(pool: Pool, entry: Entry, world: int) -> None:
    aspects = ("forward", "grad", "state_dict", "step")
    report = check(pool, entry.factory, entry.inputs, world=world, aspects=aspects)
    report.require(*aspects)
    assert not set(entry.kept) & report.sharded
    assert set(entry.shards) <= report.sharded
