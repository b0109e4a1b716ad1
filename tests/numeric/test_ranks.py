"""Ranks as threads that take turns."""

from __future__ import annotations

import time

import pytest
import torch

from autotp.numeric.ranks import CutOff, TimedOut, run_ranks


def test_collectives_sum_and_gather_in_rank_order() -> None:
    def work(comm):
        own = torch.full((2,), float(comm.rank + 1))
        total = comm.all_reduce(own)
        own.zero_()  # what was given is no longer this tensor
        return total, torch.cat(comm.all_gather(torch.full((1,), comm.rank))), comm.broadcast_(torch.full((1,), comm.rank))

    for total, gathered, first in run_ranks(3, work, 20.0):
        assert total.tolist() == [6.0, 6.0] and gathered.tolist() == [0, 1, 2] and first.tolist() == [0]


def test_every_rank_draws_the_same_numbers_and_the_caller_none() -> None:
    def work(comm):
        first = torch.rand(())
        comm.all_reduce(torch.zeros(()))
        return first, torch.rand(())

    torch.manual_seed(3)
    drawn = run_ranks(2, work, 20.0)
    assert drawn[0] == drawn[1]
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.rand(()) == after


@pytest.mark.parametrize("odd", ["other", "missing", "error"])
def test_ranks_that_do_not_meet_end_with_an_error(odd: str) -> None:
    def work(comm):
        if comm.rank == 1 and odd == "missing":
            return
        if comm.rank == 1 and odd == "error":
            raise KeyError("here")
        comm.all_reduce(torch.zeros(2 if comm.rank and odd == "other" else 3))

    with pytest.raises(KeyError if odd == "error" else CutOff):
        run_ranks(2, work, 20.0)


def test_a_rank_that_hangs_is_left_behind() -> None:
    with pytest.raises(TimedOut):
        run_ranks(2, lambda comm: time.sleep(0.8 if comm.rank else 0.0), 0.2)
