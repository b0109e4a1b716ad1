"""Lets the ranks of one process meet at each collective: the last to come does the work for all.

    Meeting   every rank runs when the interpreter lets it; a run that does not end is found by the timeout
    Turns     one rank runs at a time, from collective to collective in rank order: the same order in every run, a random
              generator for each rank, and a deadlock is found the moment it is there

A collective that the ranks call with different arguments is an error at once.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.testing._internal.distributed import multi_threaded_pg as threaded


class CutOff(RuntimeError):
    """A collective cannot end: another rank raised, ended, or did not come in time."""


class Stopped(BaseException):
    """Raised inside a rank that did not end in time, wherever it is; no model code means to catch it."""


def _act(given: dict[int, tuple[str, Any, Any]]) -> None:
    """Do the work of one collective on all ranks' data.

    Raises:
        ValueError: the ranks called different collectives.
    """
    kinds = {rank: kind for rank, (kind, _, _) in sorted(given.items())}
    if len(set(kinds.values())) > 1:
        raise ValueError(f"the ranks called different collectives: {kinds}")
    with torch.no_grad(), torch._C.DisableTorchFunction():
        given[0][1].work([given[rank][2] for rank in kinds])


class Meeting:
    """The meeting of `world` ranks that run freely."""

    def __init__(self, world: int) -> None:
        self._given: dict[int, tuple[str, Any, Any]] = {}
        self._barrier = threading.Barrier(world, self._act)

    def begin(self, rank: int) -> None:
        """This rank starts a job."""

    def end(self, rank: int) -> None:
        """This rank is done with its job."""

    def join(self, rank: int, kind: str, work: Any, data: Any) -> Any:
        """Take part: `work.work([data of rank 0, data of rank 1, …])` fills every rank's outputs.

        Raises:
            CutOff: it cannot end. ValueError: `kind` is not that of every rank (raised on one of them).
        """
        self._given[rank] = kind, work, data
        try:
            self._barrier.wait()
        except threading.BrokenBarrierError:
            raise CutOff(f"{kind} was cut off") from None
        return threaded.ret_work(data)

    def abandon(self) -> None:
        """Nobody waits here any more."""
        self._barrier.abort()

    def waits(self, rank: int) -> bool:
        """Does this rank wait for the others? (What it waits in then is no cause.)"""
        return False  # a barrier does not know who is in it: the stack says

    def _act(self) -> None:
        _act(self._given)
        self._given.clear()


class Turns:
    """The meeting of `world` ranks of which one runs at a time."""

    def __init__(self, world: int) -> None:
        self._world = world
        self._changed = threading.Condition()
        self._ready: set[int] = set()  # may run when it is their turn
        self._given: dict[int, tuple[str, Any, Any]] = {}  # wait in a collective
        self._begun: set[int] = set()
        self._turn: int | None = None
        self._broken = ""
        self._random: dict[int, Tensor] = {}

    def begin(self, rank: int) -> None:
        """Wait for this rank's first turn of a job; rank 0 goes first, when all are there."""
        with self._changed:
            if not self._begun:
                self._random.clear()
            self._begun.add(rank)
            self._ready.add(rank)
            self._random[rank] = torch.get_rng_state()
            if len(self._begun) == self._world:
                self._pass_on()
            self._wait(rank, "its first turn")

    def end(self, rank: int) -> None:
        """This rank is done: the next one's turn."""
        with self._changed:
            self._begun.discard(rank)
            self._ready.discard(rank)
            if self._turn == rank:
                self._leave(rank)

    def join(self, rank: int, kind: str, work: Any, data: Any) -> Any:
        """As `Meeting.join`."""
        with self._changed:
            self._check(kind)
            self._given[rank] = kind, work, data
            self._ready.discard(rank)
            if len(self._given) == self._world:
                given, self._given = self._given, {}
                self._ready.update(given)
                _act(given)
            self._leave(rank)
            self._wait(rank, kind)
        return threaded.ret_work(data)

    def abandon(self) -> None:
        """Nobody waits here any more."""
        with self._changed:
            self._break("was cut off")

    def waits(self, rank: int) -> bool:
        """Does this rank wait for its turn?"""
        return self._turn != rank

    def _leave(self, rank: int) -> None:
        self._random[rank] = torch.get_rng_state()
        self._pass_on()

    def _pass_on(self) -> None:
        """Give the turn to the first rank that can run; where none can and some wait, they wait for ever."""
        self._turn = min(self._ready, default=None)
        if self._turn is not None:
            torch.set_rng_state(self._random[self._turn])
        elif self._given:
            waiting = ", ".join(f"rank {rank} waits in {kind}" for rank, (kind, _, _) in sorted(self._given.items()))
            gone = [rank for rank in range(self._world) if rank not in self._given]
            self._break(f"cannot end: {waiting}; {', '.join(f'rank {rank}' for rank in gone)} ended without it")
        self._changed.notify_all()

    def _break(self, why: str) -> None:
        self._broken = self._broken or why
        self._changed.notify_all()

    def _check(self, kind: str) -> None:
        if self._broken:
            raise CutOff(f"{kind} {self._broken}")

    def _wait(self, rank: int, kind: str) -> None:
        self._changed.wait_for(lambda: self._turn == rank or bool(self._broken))
        self._check(kind)
