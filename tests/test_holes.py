"""Idioms in which a plan can go wrong unseen: equal or refused; a list of them equal and sharded, so that refusing is no way out."""

from __future__ import annotations

import pytest

from autotp.testing.outcome import Outcome, equal_or_refused
from tests.models.holes import HOLES, Hole

NAMES = {hole.name: hole for hole in HOLES}
#: One of each kind, on real processes.
PROCESSES = [
    "rms_norm_3x4",
    "matrix_norm",
    "scatter_short",
    "batch_norm",
    "twice_nested",
    "repeats_nested_differ",
    "relu_module_in_place",
    "function_mixing",
]


#: Without the planner's check of numbers too: what it would find must not be there.
CERTIFICATES = {2: "numbers", 3: "graph"}
#: Each hole has one of them in turn, the other in `make sweeps`.
CASES = [
    pytest.param(hole, tp, id=f"{hole}-{tp}", marks=pytest.mark.slow if hole.alike else pytest.mark.sweep if (number + tp) % 2 else ())
    for number, hole in enumerate(HOLES)
    for tp in CERTIFICATES
]


def holds(hole: Hole, tp: int, backend: str = "local") -> Outcome:
    certificate = CERTIFICATES[tp]
    outcome = equal_or_refused(hole.build, inputs=hole.inputs, tp=tp, more=hole.more, backend=backend, certificate=certificate)
    if hole.sharded:
        assert outcome.sharded, f"wanted equal and sharded, got {outcome}"
    return outcome


@pytest.mark.parametrize(("hole", "tp"), CASES)
def test_equal_or_refused(hole: Hole, tp: int) -> None:
    holds(hole, tp)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROCESSES)
def test_equal_or_refused_on_processes(name: str) -> None:
    holds(NAMES[name], 2, "gloo")


def test_there_are_many_and_refusing_is_no_way_out() -> None:
    assert len(NAMES) == len(HOLES) >= 150 and sum(not hole.alike for hole in HOLES) >= 60
    assert sum(hole.sharded for hole in HOLES) >= 25 and sum(hole.sharded and not hole.alike for hole in HOLES) >= 15
