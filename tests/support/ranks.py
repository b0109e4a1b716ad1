"""A pool of worker processes, one a rank, that live as long as the test session.

Starting a process that imports torch and transformers costs seconds; running a function on ready ones costs a
millisecond. Workers talk to each other through gloo and to the pool through pipes. A rank that raises is reported with
its traceback while the others may hang in a collective: the pool then waits no longer than `grace`, and replaces all.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


class RankError(AssertionError):
    """A rank raised, died or hung; carries the tracebacks of the ranks that said something."""


def mesh(name: str = "tp") -> DeviceMesh:
    """The one-dimensional mesh over all ranks of this worker's group."""
    return init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=(name,))


def _worker(rank: int, world: int, store: str, pipe: Connection, timeout: float) -> None:
    torch.set_num_threads(1)
    import transformers

    transformers.logging.set_verbosity_error()
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    pipe.send(("ready", None))
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            break
        if job is None:
            break
        function, args, kwargs = job
        try:
            torch.manual_seed(0)
            answer = ("ok", function(*args, **kwargs))
        except BaseException:  # whatever a rank raises, the pool must hear of it
            answer = ("error", traceback.format_exc())
        try:
            pipe.send(answer)
        except Exception:  # the result cannot be pickled
            pipe.send(("error", traceback.format_exc()))
    os._exit(0)


class Ranks:
    """`world` ready processes that share one gloo process group.

    A function to run must be picklable by name (defined at module level); so must its arguments and result.
    """

    def __init__(self, world: int, *, timeout: float = 120.0, grace: float = 5.0) -> None:
        self.world = world
        self.timeout = timeout
        self.grace = grace
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def start(self) -> None:
        """Start the processes now; `run` does it when needed."""
        if self._processes:
            return
        # A server imports what is slow to import once, before it has threads or groups, and forks the workers.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "tests.support.pooled", "tests.support.families", "autotp"])
        self._folder = tempfile.TemporaryDirectory(prefix="autotp-ranks-")
        store = str(Path(self._folder.name) / "store")
        for rank in range(self.world):
            here, there = context.Pipe()
            process = context.Process(target=_worker, args=(rank, self.world, store, there, self.timeout * 2), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        self._collect(time.monotonic() + 180)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Call `function(*args, **kwargs)` on every rank; the results in rank order.

        Raises:
            RankError: a rank raised (with its traceback), died, or was not done within `timeout` seconds.
        """
        self.start()
        try:
            for pipe in self._pipes:
                pipe.send((function, args, kwargs))
        except OSError:
            self.stop()
            raise RankError("a worker had died before the call") from None
        return self._collect(time.monotonic() + (timeout or self.timeout))

    def _collect(self, deadline: float) -> list[Any]:
        answers: dict[int, tuple[str, Any]] = {}
        limit = deadline
        while len(answers) < self.world:
            open_pipes = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(open_pipes, timeout=max(0.0, limit - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    answers[rank] = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, ConnectionResetError):
                    code = self._processes[rank].exitcode
                    answers[rank] = ("error", f"the process died (exit code {code})")
            if any(kind == "error" for kind, _ in answers.values()):
                limit = min(deadline, time.monotonic() + self.grace)
        problems = [f"rank {rank}:\n{text}" for rank, (kind, text) in sorted(answers.items()) if kind == "error"]
        silent = [rank for rank in range(self.world) if rank not in answers]
        if silent:
            problems.append(f"ranks {silent} did not finish in time" + ("" if problems else " (a hang?)"))
        if silent or any("the process died" in problem for problem in problems):
            self.stop()
        if problems:
            raise RankError("\n".join(problems))
        return [answers[rank][1] for rank in range(self.world)]

    def stop(self) -> None:
        """End the processes at once; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class Pool:
    """A `Ranks` for each world size, started when first needed."""

    def __init__(self, *, timeout: float = 120.0) -> None:
        self.timeout = timeout
        self._ranks: dict[int, Ranks] = {}

    def run(self, function: Callable[..., Any], *args: Any, world: int = 2, timeout: float | None = None, **kwargs: Any) -> list[Any]:
        """Run on `world` ranks, see `Ranks.run`."""
        if world not in self._ranks:
            self._ranks[world] = Ranks(world, timeout=self.timeout)
        return self._ranks[world].run(function, *args, timeout=timeout, **kwargs)

    def stop(self) -> None:
        """End all processes."""
        for ranks in self._ranks.values():
            ranks.stop()
