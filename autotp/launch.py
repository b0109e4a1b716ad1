"""Runs a function on several ranks of this machine: one process a rank, gloo, a file as the store.

Every way out is bounded. The ranks end when the function returns, at the timeout, and when the calling process dies. They also end
when one of them fails; the others get a few seconds, as they may wait in a collective for it. Nothing is left running.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from pickle import PicklingError
from types import ModuleType
from typing import Any

from autotp.arguments import seconds, whole_number
from autotp.errors import AutoTPError, InputError

_GRACE = 5.0  # seconds that the other ranks get after one has failed


@dataclass(frozen=True, slots=True)
class Outcome:
    """One rank ended with this: the value that the function returned, or the text of the error that stopped it; `follows`: another
    rank's failure.
    """

    rank: int
    value: Any = None
    error: str | None = None
    follows: bool = False


class RankError(AutoTPError):
    """At least one rank failed; the message holds the traceback of the first that did."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 300.0,
    on_event: Callable[[int, Any], None] | None = None,
    with_main: bool = True,
) -> tuple[Outcome, ...]:
    """Call `function(emit, *args)` on `world_size` gloo ranks and return their outcomes in rank order.

    Args:
        function: importable by name, as are all of `args`; what it returns holds no tensors. `emit(value)` sends a value
            to `on_event(rank, value)` of the calling process.
        timeout: seconds for everything together.
        with_main: import the calling program's main module in each process, as multiprocessing does; without, a script that
            has no `if __name__ == "__main__"` does not run again.

    Raises:
        InputError: `world_size` is no whole number of at least 1, `timeout` no number of seconds, or `function` and `args` cannot be
            sent to a process.
    """
    whole_number("run_ranks: world_size", world_size)
    seconds("run_ranks: timeout", timeout)
    for name, value in (("function", function), *([("on_event", on_event)] if on_event is not None else [])):
        if not callable(value):
            raise InputError(f"run_ranks: {name} is {value!r}, wanted a function")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="autotp-") as scratch:
        pipes: list[Connection] = []
        processes: list[SpawnProcess] = []
        try:
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                job = (function, args, rank, world_size, scratch, timeout, sender)
                process = context.Process(target=_rank_main, args=job, daemon=True, name=f"rank {rank}")
                with nullcontext() if with_main else _without_main():
                    _start(process, function)
                sender.close()
                pipes.append(receiver)
                processes.append(process)
            return _collect(pipes, timeout, on_event, lambda rank: _stack(processes[rank].pid, _stack_file(scratch, rank)))
        finally:
            for process in processes:
                process.join(1)  # a rank that has answered is on its way out
                if process.is_alive():
                    process.kill()
                    process.join()


def _start(process: SpawnProcess, function: Callable[..., Any]) -> None:
    try:
        process.start()
    except (PicklingError, AttributeError, TypeError, ValueError) as error:  # what a pickle refuses, it refuses in many ways
        name = getattr(function, "__qualname__", repr(function))
        text = f"run_ranks: {name} or its arguments cannot be sent to a process: {error}; both must be importable by name"
        raise InputError(text) from error


@contextmanager
def _without_main() -> Iterator[None]:
    """multiprocessing finds no main module to import in the processes that start meanwhile."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def values(outcomes: tuple[Outcome, ...]) -> list[Any]:
    """The values of all ranks, in rank order.

    Raises:
        RankError: some rank failed.
    """
    failed = [o for o in outcomes if o.error is not None and not o.follows]
    if failed:
        raise RankError("\n".join(f"rank {o.rank} failed:\n{o.error}" for o in failed))
    return [outcome.value for outcome in outcomes]


def _stack_file(scratch: str, rank: int) -> Path:
    return Path(scratch) / f"stack{rank}"


def _stack(pid: int | None, file: Path) -> str:
    """Where a process is that gives no answer: it is asked to write its stack, most recent call first."""
    if pid is None or not file.exists():
        return "the start of its process"
    os.kill(pid, signal.SIGUSR1)
    deadline = time.monotonic() + 5
    text = ""
    while time.monotonic() < deadline:
        time.sleep(0.25)
        before, text = text, file.read_text(errors="replace")
        if text and text == before:  # it is written word by word
            break
    return text.strip() or "code that cannot be looked into"


def _collect(
    pipes: list[Connection], timeout: float, on_event: Callable[[int, Any], None] | None, stack: Callable[[int], str]
) -> tuple[Outcome, ...]:
    outcomes: dict[int, Outcome] = {}
    ranks: dict[Any, int] = {pipe: rank for rank, pipe in enumerate(pipes)}
    deadline = time.monotonic() + timeout
    failed: int | None = None
    while ranks:
        ready: list[Any] = wait(list(ranks), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            rank = ranks[pipe]
            try:
                kind, value = pipe.recv()
            except (EOFError, OSError):
                kind, value = "error", "the process ended without a result (killed, or out of memory)"
            if kind == "event":
                if on_event is not None:
                    on_event(rank, value)
                continue
            del ranks[pipe]
            outcomes[rank] = Outcome(rank, value) if kind == "result" else Outcome(rank, error=value)
            if kind == "error" and failed is None:
                failed, deadline = rank, min(deadline, time.monotonic() + _GRACE)
    for rank in ranks.values():
        reason = f"stopped: rank {failed} failed" if failed is not None else f"no result within {timeout:.0f} s; it is at\n{stack(rank)}"
        outcomes[rank] = Outcome(rank, error=reason, follows=failed is not None)
    if failed is not None:  # what the others raise once a peer is gone is a consequence, not a cause
        stopped = f"stopped: rank {failed} failed"
        outcomes = {r: o if o.error is None or r == failed else Outcome(r, error=stopped, follows=True) for r, o in outcomes.items()}
    return tuple(outcomes[rank] for rank in sorted(outcomes))


def _rank_main(
    function: Callable[..., Any], args: tuple[Any, ...], rank: int, world_size: int, scratch: str, timeout: float, pipe: Connection
) -> None:
    os.dup2(2, 1)  # gloo and model code may print; the caller's stdout is for the report
    threading.Thread(target=_die_with_parent, daemon=True).start()
    faulthandler.register(signal.SIGUSR1, file=_stack_file(scratch, rank).open("w"), all_threads=False)
    try:
        import torch
        import torch.distributed as dist

        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // world_size)))
        dist.init_process_group(
            "gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=world_size, timeout=timedelta(seconds=timeout)
        )
        pipe.send(("result", function(lambda value: pipe.send(("event", value)), *args)))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        os._exit(1)  # a failed rank must not wait for its peers in a destructor


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        os._exit(1)
