"""Ranks as threads: results, errors, hangs, and collectives that do not fit together."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Shard

from autotp.launch import RankError
from autotp.testing.ranks.threads import ThreadRanks
from tests.support.ranks import mesh


@pytest.fixture(scope="module", params=[False, True], ids=["free", "turns"])
def ranks(request: pytest.FixtureRequest) -> Iterator[ThreadRanks]:
    made = ThreadRanks(3, timeout=30.0, turns=request.param)
    yield made
    made.stop()


def total(value: int) -> tuple[int, float, float, float]:
    """This rank, a sum, and what DTensor and object collectives give."""
    rank, line = dist.get_rank(), mesh()
    tensor = torch.tensor(float(value + rank))
    dist.all_reduce(tensor, group=line.get_group())
    local = torch.full((2, 2), float(rank + 1), requires_grad=True)
    whole = DTensor.from_local(local * 1.0, line, (Shard(0),))
    (whole**2).sum().full_tensor().backward()
    objects = [None] * 3
    dist.all_gather_object(objects, {"rank": rank}, group=line.get_group())
    assert objects == [{"rank": r} for r in range(3)]
    assert local.grad is not None
    return rank, float(tensor), float(whole.full_tensor().detach().sum()), float(local.grad.sum())


WANTED = [(0, 6.0, 24.0, 8.0), (1, 6.0, 24.0, 16.0), (2, 6.0, 24.0, 24.0)]


def test_results_come_in_rank_order_and_threads_serve_again(ranks: ThreadRanks) -> None:
    assert ranks.run(total, 1) == WANTED
    idents = ranks.run(threading.get_ident)
    assert len(set(idents)) == 3 and ranks.run(threading.get_ident) == idents


def test_the_process_is_left_as_it_was(ranks: ThreadRanks) -> None:
    hook = sys.excepthook
    ranks.run(total, 1)
    assert sys.excepthook is hook and not dist.is_initialized()


def one_raises() -> None:
    if dist.get_rank() == 1:
        raise ValueError("rank one says no")
    dist.barrier()


def test_a_rank_that_raises_is_reported_alone(ranks: ThreadRanks) -> None:
    with pytest.raises(RankError, match="rank one says no") as found:
        ranks.run(one_raises)
    assert "one_raises" in str(found.value) and "rank 0" not in str(found.value)
    assert ranks.run(total, 1) == WANTED


def one_ends_early() -> None:
    if dist.get_rank() != 2:
        dist.barrier()


def one_sleeps() -> None:
    if dist.get_rank() == 2:
        time.sleep(3)
        dist.barrier()


@pytest.mark.parametrize(("function", "says"), [(one_ends_early, "rank 0 was .*one_ends_early"), (one_sleeps, "rank 2 was .*one_sleeps")])
def test_a_hang_ends(function: object, says: str) -> None:
    short = ThreadRanks(3, timeout=1.0)
    started = time.monotonic()
    with pytest.raises(RankError, match="(?s)" + says):
        short.run(function)  # type: ignore[arg-type]
    assert time.monotonic() - started < 6
    assert short.run(total, 1) == WANTED  # what is left behind does not disturb
    short.stop()


def different_collectives() -> None:
    if dist.get_rank():
        dist.all_reduce(torch.ones(2))
    else:
        dist.broadcast(torch.ones(2), 0)


def different_shapes() -> None:
    dist.all_reduce(torch.ones(1 + dist.get_rank()))


@pytest.mark.parametrize("function", [different_collectives, different_shapes])
def test_collectives_that_do_not_fit_are_errors(ranks: ThreadRanks, function: object) -> None:
    with pytest.raises(RankError, match="the ranks called different collectives"):
        ranks.run(function)  # type: ignore[arg-type]
    assert ranks.run(total, 1) == WANTED


def draws() -> list[float]:
    torch.manual_seed(dist.get_rank())
    first = float(torch.rand(()))
    dist.barrier()
    return [first, float(torch.rand(()))]


def test_ranks_that_take_turns_have_their_own_random_numbers() -> None:
    ranks = ThreadRanks(3, turns=True)
    state = torch.get_rng_state()
    found = ranks.run(draws)
    ranks.stop()
    for rank, numbers in enumerate(found):
        alone = torch.Generator().manual_seed(rank)
        assert numbers == [float(torch.rand((), generator=alone)) for _ in range(2)]
    assert torch.equal(torch.get_rng_state(), state)  # those of the caller go on as if nothing had been


def marks(seen: list[tuple[int, int]]) -> None:
    for step in range(3):
        seen.append((step, dist.get_rank()))
        dist.barrier()


def test_ranks_that_take_turns_always_do_so_in_order() -> None:
    ranks = ThreadRanks(4, turns=True)
    seen: list[tuple[int, int]] = []
    for _ in range(2):
        ranks.run(marks, seen)
    ranks.stop()
    assert seen == [(step, rank) for _ in range(2) for step in range(3) for rank in range(4)]


def test_a_deadlock_among_ranks_that_take_turns_says_who_waits_for_whom() -> None:
    ranks = ThreadRanks(3, timeout=60.0, turns=True)
    started = time.monotonic()
    with pytest.raises(RankError, match=r"rank 0 waits in all_reduce .*, rank 1 waits in all_reduce .*; rank 2 ended without it"):
        ranks.run(one_ends_early)
    assert time.monotonic() - started < 10
    assert not [t for t in threading.enumerate() if t.name.startswith("rank ") and t in ranks._threads]


def loops() -> None:
    while dist.get_rank() == 1:
        pass


@pytest.mark.parametrize("turns", [False, True])
def test_a_loop_without_end_is_stopped(turns: bool) -> None:
    before = set(threading.enumerate())
    ranks = ThreadRanks(2, timeout=0.5, turns=turns)
    with pytest.raises(RankError, match=r"(?s)rank 1 was not done in time; it is at.*in loops"):
        ranks.run(loops)
    assert set(threading.enumerate()) <= before


def sleeps_long() -> None:
    if dist.get_rank() == 1:
        time.sleep(15)


@pytest.mark.parametrize("turns", [False, True])
def test_a_rank_that_sleeps_on_does_not_stop_code_that_is_traced(turns: bool) -> None:
    """In Python 3.11 an exception that waits for a sleeping thread kept traced threads at the start of their next function."""
    ranks = ThreadRanks(2, timeout=0.5, turns=turns)
    with pytest.raises(RankError, match=r"(?s)rank 1 was not done in time.*in sleeps_long"):
        ranks.run(sleeps_long)
    before, started = sys.gettrace(), time.monotonic()
    sys.settrace(traced)
    for _ in range(100):
        nothing()
    sys.settrace(before)
    assert time.monotonic() - started < 3


def traced(frame: object, event: str, arg: object) -> object:
    return traced


def nothing() -> None:
    pass
