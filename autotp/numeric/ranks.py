"""Runs the ranks of a plan as threads of this process, without a process group.

One rank runs at a time, from collective to collective in rank order. So the order of a run is fixed, each rank has random
generators of its own, and a state in which no rank can go on raises at once. The last rank that reaches a collective lets all of
them go on.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autotp.rewrite.collectives.comm import Waits
from autotp.rewrite.collectives.copy_cache import CopyMemo
from autotp.rewrite.running import Running

T = TypeVar("T")
_Numbers = tuple[Tensor, Any, Any]


class CutOff(RuntimeError):
    """A collective cannot end: another rank raised, ended, or called another one."""


class TimedOut(RuntimeError):
    """The ranks were not done in time."""


def _numbers() -> _Numbers:
    return torch.get_rng_state(), random.getstate(), np.random.get_state()


def _go_on_with(numbers: _Numbers) -> None:
    torch.set_rng_state(numbers[0])
    random.setstate(numbers[1])
    np.random.set_state(numbers[2])


class Turns:
    """Where `size` ranks meet and pass the turn on."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._changed = threading.Condition()
        self._given: dict[int, tuple[str, Tensor]] = {}
        self._met: dict[int, list[Tensor]] = {}  # rank → what all gave to the collective that it waits in
        self._running = set(range(size))
        self._turn = 0
        self._broken = ""
        self._state = {rank: _numbers() for rank in range(size)}

    def begin(self, rank: int) -> None:
        """Wait for the first turn."""
        with self._changed:
            self._wait(rank)

    def end(self, rank: int, failed: bool) -> None:
        """The rank is done."""
        with self._changed:
            self._running.discard(rank)
            if failed:
                self._broken = self._broken or f"rank {rank} failed"
            self._pass_on(rank)

    def join(self, rank: int, kind: str, tensor: Tensor) -> list[Tensor]:
        """The tensors that all ranks gave, in rank order.

        Raises:
            CutOff: a rank does not come, or called another collective.
        """
        with self._changed:
            self._given[rank] = kind, tensor.detach().clone()  # its owner may change it before the others read it
            if len(self._given) == self.size:
                given, self._given = self._given, {}
                kinds = {r: k for r, (k, _) in sorted(given.items())}
                if len(set(kinds.values())) > 1:
                    self._broken = f"the ranks called different collectives: {kinds}"
                else:
                    parts = [given[r][1] for r in range(self.size)]
                    self._met = dict.fromkeys(range(self.size), parts)
            self._pass_on(rank)
            self._wait(rank)
            return self._met.pop(rank)

    def abandon(self) -> None:
        """No rank goes on."""
        with self._changed:
            self._broken = self._broken or "the time is up"
            self._changed.notify_all()

    def _pass_on(self, rank: int) -> None:
        self._state[rank] = _numbers()
        ready = [r for r in self._running if r not in self._given]
        if ready:
            self._turn = min(ready)
            _go_on_with(self._state[self._turn])
        elif self._given:
            waiting = ", ".join(f"rank {r} in {kind}" for r, (kind, _) in sorted(self._given.items()))
            self._broken = self._broken or f"some ranks wait for others that have ended: {waiting}"
        self._changed.notify_all()

    def _wait(self, rank: int) -> None:
        self._changed.wait_for(lambda: bool(self._broken) or (self._turn == rank and rank not in self._given))
        if self._broken:
            raise CutOff(self._broken)


class LocalComm:
    """One rank's collectives (`autotp.rewrite.collectives.comm.Comm`) over a `Turns`."""

    def __init__(self, turns: Turns, rank: int) -> None:
        self.size, self.rank = turns.size, rank
        self.memo, self.running = CopyMemo(), Running()
        self.mesh: DeviceMesh | None = None
        self._turns = turns

    def __deepcopy__(self, memo: dict[int, Any]) -> LocalComm:
        return self

    def ask(self) -> None:
        """See `Comm`."""

    def _join(self, name: str, tensor: Tensor) -> list[Tensor]:
        return self._turns.join(self.rank, f"{name} of {tensor.dtype} {tuple(tensor.shape)}", tensor)

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """See `Comm`."""
        return self.all_reduce(tensor)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """See `Comm`."""
        parts = self._join("all_reduce", tensor)
        total = parts[0].clone(memory_format=torch.contiguous_format)
        for part in parts[1:]:
            total += part
        return total

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """See `Comm`."""
        return [part.clone(memory_format=torch.contiguous_format) for part in self._join("all_gather", tensor)]

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """See `Comm`."""
        return torch.cat(self.all_gather(rows))

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """See `Comm`."""
        return self.all_reduce(rows).chunk(self.size)[self.rank]

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """See `Comm`."""
        counts = self._join("counts of an all_to_all", torch.tensor(sent))
        parts = self._turns.join(self.rank, f"all_to_all of {rows.dtype}", rows)
        return torch.cat([torch.split(part, of_each.tolist())[self.rank] for part, of_each in zip(parts, counts, strict=True)])

    def begin_sum(self, tensor: Tensor) -> Waits:
        """See `Comm`."""
        total = self.all_reduce_(tensor)
        return lambda: total

    def begin_gather(self, rows: Tensor) -> Waits:
        """See `Comm`."""
        found = self.all_gather_rows(rows)
        return lambda: found

    def begin_scatter(self, rows: Tensor) -> Waits:
        """See `Comm`."""
        found = self.reduce_scatter(rows)
        return lambda: found

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """See `Comm`."""
        return tensor.copy_(self._join("broadcast", tensor)[0])


def run_ranks(size: int, work: Callable[[LocalComm], T], seconds: float) -> list[T]:
    """`work(comm)` on every rank; the results in rank order.

    Raises:
        TimedOut: not all were done in time; those that hang are left behind as daemon threads. Also what the first rank raised.
    """
    turns = Turns(size)
    results: dict[int, T] = {}
    errors: dict[int, BaseException] = {}

    def live(rank: int) -> None:
        try:
            turns.begin(rank)
            results[rank] = work(LocalComm(turns, rank))
        except BaseException as error:  # whatever a rank raises, the caller must hear of it
            errors[rank] = error
        turns.end(rank, rank in errors)

    before = _numbers()
    threads = [threading.Thread(target=live, args=(rank,), daemon=True, name=f"rank {rank}") for rank in range(size)]
    deadline = time.monotonic() + seconds
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in threads):
            turns.abandon()
            for thread in threads:
                thread.join(0.5)
            raise TimedOut(f"the ranks were not done in {seconds:.0f} seconds")
    finally:
        _go_on_with(before)
    causes = [errors[r] for r in sorted(errors) if not isinstance(errors[r], CutOff)] or [errors[r] for r in sorted(errors)]
    if causes:
        raise causes[0]
    return [results[rank] for rank in range(size)]
