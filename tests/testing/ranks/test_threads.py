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
    assert time.monotonic() - started < 3
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
