"""Ranks are started, answered for and always ended."""

from __future__ import annotations

import multiprocessing
import time

import pytest

from autotp.launch import RankError, run_ranks, values


def add_ranks(emit, start):
    import torch
    import torch.distributed as dist

    total = torch.tensor(start + dist.get_rank())
    dist.all_reduce(total)
    emit("reduced")
    return int(total)


def fail_on_rank_one(emit):
    import torch.distributed as dist

    if dist.get_rank() == 1:
        raise ValueError("rank one gives up")
    dist.barrier()


def sleep(emit):
    time.sleep(600)


def left_running():
    return [process.name for process in multiprocessing.active_children() if process.name.startswith("rank ")]


def test_values_and_events_come_back_in_rank_order():
    events = []
    outcomes = run_ranks(add_ranks, 2, 10, timeout=120, on_event=lambda rank, value: events.append((rank, value)))
    assert values(outcomes) == [21, 21]
    assert sorted(events) == [(0, "reduced"), (1, "reduced")]
    assert not left_running()


def test_a_failing_rank_ends_all_and_is_named():
    outcomes = run_ranks(fail_on_rank_one, 2, timeout=120)
    with pytest.raises(RankError, match=r"(?s)rank 1 failed.*rank one gives up"):
        values(outcomes)
    assert outcomes[0].error == "stopped: rank 1 failed"
    assert not left_running()


@pytest.mark.sweep
def test_a_rank_that_never_answers_is_ended_at_the_timeout():
    outcomes = run_ranks(sleep, 1, timeout=40)
    assert outcomes[0].error is not None and outcomes[0].error.startswith(
        "no result within 40 s; it is at\nStack (most recent call first):"
    )
    assert "in sleep" in outcomes[0].error
    assert not left_running()
