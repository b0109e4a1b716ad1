"""Runs ranks as threads of one process, for many small examples: eight ready ranks cost milliseconds where processes cost seconds.

Each thread has its own process groups (torch keeps the state of a backend called "threaded" apart by thread). All of them meet in
one `Meeting`. The ranks share everything that a process has once: modules, class attributes, and with freely running ranks torch's
random generator. A thread cannot be killed. One that hangs in Python code is stopped by an exception. One that hangs in C code (a
sleep) is left behind, cut off from the others, until it returns.
"""

from __future__ import annotations

import ctypes
import queue
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from autotp.launch import RankError
from autotp.testing.ranks.meeting import CutOff, Meeting, Stopped, Turns

_HERE = threading.local()
_ONE_AT_A_TIME = threading.Lock()  # what `_isolated` changes belongs to the process
_GRACE = 2.0  # seconds for a rank that was told to stop


class _Group(dist.ProcessGroup):
    """One rank's end of a `Meeting`: the collectives that autotp and DTensor call."""

    def __init__(self, rank: int, world: int, meeting: Meeting | Turns) -> None:
        super().__init__(rank, world)
        self._at, self._world, self._meeting = rank, world, meeting

    def getBackendName(self) -> str:  # noqa: N802  # torch calls it so
        return "threaded"

    def size(self) -> int:
        return self._world

    @property
    def pg_name(self) -> str:
        return distributed_c10d._world.pg_names[self]

    @property
    def group_name(self) -> str:
        return self.pg_name

    def _join(self, name: str, work: Any, sent: Sequence[Tensor], data: Any) -> Any:
        return self._meeting.join(self._at, " ".join([name, *(f"{t.dtype} {tuple(t.shape)}" for t in sent)]), work, data)

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        op = (opts or dist.AllreduceOptions()).reduceOp
        return self._join(f"all_reduce {op.op}", threaded.AllReduce(op), tensors, tensors)

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None) -> Any:
        return self._join("all_gather", threaded.AllGather(), inputs, (outputs, inputs))

    def all_gather_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        return self.allgather([list(output.chunk(self._world))], [input])

    def all_gather_single_coalesced(self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None) -> Any:
        return [self.all_gather_single(a, b) for a, b in zip(outputs, inputs, strict=True)][-1]

    def reduce_scatter_single(self, output: Tensor, input: Tensor, opts: Any = None) -> Any:
        op = (opts or dist.ReduceScatterOptions()).reduceOp
        parts = list(input.chunk(self._world))
        return self._join(f"reduce_scatter {op.op}", threaded.ReduceScatter(op), [input], ([output], [parts]))

    _allgather_base, _reduce_scatter_base = all_gather_single, reduce_scatter_single  # type: ignore[assignment]  # what torch 2.11 calls them

    def all_to_all_single(self, output: Tensor, input: Tensor, received: Any, sent: Any, opts: Any = None) -> Any:
        data = output, input, list(received), list(sent)
        return self._meeting.join(self._at, f"all_to_all {input.dtype}", threaded.AllToAllBase(), data)

    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        root = (opts or dist.BroadcastOptions()).rootRank
        return self._join(f"broadcast from {root}", threaded.Broadcast(root), tensors, tensors)

    def barrier(self, opts: Any = None) -> Any:
        return self.allreduce([torch.ones(1)])


def _make_group(store: Any, rank: int, world: int, timeout: timedelta) -> _Group:
    return _Group(rank, world, _HERE.meeting)


dist.Backend.register_backend("threaded", _make_group, devices=["cpu"])


@contextmanager
def _isolated() -> Iterator[None]:
    """torch.distributed's state is one a thread, and what `init_process_group` does to the process is undone."""
    old, hook = distributed_c10d._world, sys.excepthook
    distributed_c10d._world = threaded.ThreadLocalWorld()  # type: ignore[assignment]
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    try:
        yield
    finally:
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
        distributed_c10d._world, sys.excepthook = old, hook


class ThreadRanks:
    """`world` ready threads that share one process group; `timeout` seconds for a `run`. One may run at a time in a process.

    Args:
        turns: one rank runs at a time (`meeting.Turns`); else all run freely.
    """

    def __init__(self, world: int, timeout: float = 60.0, *, turns: bool = False) -> None:
        self.world, self.timeout, self.turns = world, timeout, turns
        self._threads: list[threading.Thread] = []

    def run(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call `function(*args)` on every rank; the results in rank order.

        Raises:
            RankError: a rank raised (with its traceback), or was not done in time (with its stack).
        """
        with _ONE_AT_A_TIME, _isolated(), torch.random.fork_rng(devices=()):
            self._start()
            for jobs in self._jobs:
                jobs.put((function, args))
            return self._collect(time.monotonic() + self.timeout)

    def stop(self) -> None:
        """End the threads; the next `run` starts new ones."""
        if self._threads:
            self._meeting.abandon()
            for jobs in self._jobs:
                jobs.put(None)
            for thread in self._threads:
                thread.join(_GRACE)  # but for one that hangs in C code, which ends with the process
        self._threads = []

    def _start(self) -> None:
        if self._threads:
            return
        self._meeting: Meeting | Turns = (Turns if self.turns else Meeting)(self.world)
        self._jobs: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(self.world)]
        self._answers: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
        store = dist.HashStore()
        for rank in range(self.world):
            given = rank, self.world, store, self._meeting, self._jobs[rank], self._answers
            self._threads.append(threading.Thread(target=_live, args=given, name=f"rank {rank}", daemon=True))
            self._threads[-1].start()

    def _collect(self, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        errors: dict[int, BaseException] = {}
        stacks: dict[int, str] = {}
        while len(results) + len(errors) < self.world:
            try:
                rank, result, error = self._answers.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                if stacks:  # they have been told to stop
                    _withdraw([self._threads[r].ident for r in range(self.world) if r not in results and r not in errors])
                    break
                stacks = self._interrupt({*range(self.world)} - {*results, *errors})
                deadline = time.monotonic() + _GRACE
                continue
            if error is None:
                results[rank] = result
            elif not isinstance(error, Stopped):
                errors[rank] = error
                self._meeting.abandon()
                deadline = min(deadline, time.monotonic() + 5)
            else:
                errors[rank] = error
        if not errors and not stacks:
            return [results[rank] for rank in range(self.world)]
        causes = {rank: error for rank, error in errors.items() if not isinstance(error, CutOff | Stopped)}
        if not causes and not stacks:
            causes = errors
        problems = [f"rank {rank}:\n" + "".join(traceback.format_exception(error)) for rank, error in sorted(causes.items())]
        problems += [f"rank {rank} was not done in time; it is at\n{stack}" for rank, stack in sorted(stacks.items())]
        self.stop()
        raise RankError("\n".join(problems))

    def _interrupt(self, silent: set[int]) -> dict[int, str]:
        """Stop the ranks that have not answered; where each of those was that did not only wait for others."""
        own = {rank for rank in silent if not self._meeting.waits(rank)} or silent
        stacks = {rank: self._stack(rank) for rank in own}
        self._meeting.abandon()
        for rank in own:
            _raise_in(self._threads[rank].ident, ctypes.py_object(Stopped))
        return stacks

    def _stack(self, rank: int) -> str:
        frame = sys._current_frames().get(self._threads[rank].ident or 0)
        return "".join(traceback.format_stack(frame)) if frame is not None else "its end"


class _Flushed(BaseException):
    """Raised in the calling thread and caught there."""


def _raise_in(ident: int | None, error: Any) -> None:
    """Raise `error` in a thread when it next runs Python code; nothing where the thread has ended."""
    if ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(ident), error)


def _withdraw(idents: list[int | None]) -> None:
    """Take back what was to be raised in threads that run no Python code.

    In Python 3.11 such an exception keeps the whole interpreter's "something is pending" flag up, and a thread that is traced
    (a debugger, coverage, Hypothesis) then never gets past the start of a function. The flag goes down when some thread gets its
    exception: this one.
    """
    for ident in idents:
        _raise_in(ident, ctypes.py_object())
    try:
        _raise_in(threading.get_ident(), ctypes.py_object(_Flushed))
        while True:
            pass
    except _Flushed:
        pass


def _live(rank: int, world: int, store: Any, meeting: Meeting | Turns, jobs: Any, answers: Any) -> None:
    _HERE.meeting = meeting
    dist.init_process_group("threaded", store=store, rank=rank, world_size=world)
    while (job := jobs.get()) is not None:
        function, args = job
        try:
            meeting.begin(rank)
            answer: tuple[int, Any, BaseException | None] = (rank, function(*args), None)
        except BaseException as error:  # whatever a rank raises, the caller must hear of it
            answer = (rank, None, error)
        meeting.end(rank)
        answers.put(answer)
