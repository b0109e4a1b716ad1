"""The pool itself: results, errors, hangs and deaths."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.support.ranks import Pool, RankError, mesh


def total(value: int) -> tuple[int, float]:
    tensor = torch.tensor(float(value + dist.get_rank()))
    dist.all_reduce(tensor, group=mesh().get_group())
    return dist.get_rank(), float(tensor)


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one says no")
    dist.barrier()


def one_hangs() -> None:
    if dist.get_rank() == 1:
        time.sleep(60)


def one_dies() -> None:
    if dist.get_rank() == 0:
        os._exit(3)


def test_results_come_in_rank_order(pool: Pool) -> None:
    assert pool.run(total, 1) == [(0, 3.0), (1, 3.0)]


def test_the_same_processes_serve_again(pool: Pool) -> None:
    assert pool.run(os.getpid) == pool.run(os.getpid)


def test_a_rank_that_raises_is_reported_and_the_pool_recovers(pool: Pool) -> None:
    with pytest.raises(RankError, match="rank one says no"):
        pool.run(one_raises)
    assert pool.run(total, 1) == [(0, 3.0), (1, 3.0)]


def test_a_hang_ends(pool: Pool) -> None:
    with pytest.raises(RankError, match=r"ranks \[1\] did not finish"):
        pool.run(one_hangs, timeout=1.0)
    assert pool.run(total, 2) == [(0, 5.0), (1, 5.0)]


def test_a_death_is_reported(pool: Pool) -> None:
    with pytest.raises(RankError, match="died"):
        pool.run(one_dies)
