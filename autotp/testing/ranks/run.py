"""Runs a function on every rank, in one of three ways."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autotp.errors import InputError
from autotp.launch import run_ranks, values
from autotp.testing.ranks.threads import ThreadRanks

#: See `autotp.testing.assert_equivalent`.
BACKENDS = ("local", "threads", "gloo")


@dataclass(frozen=True, slots=True)
class Running:
    """Ranks that are there already, under a name: `run(function, job, world, timeout)` as `run` of this module, without starting any."""

    name: str
    run: Callable[[Callable[[Any], Any], Any, int, float], list[Any]]

    def __str__(self) -> str:
        return self.name


def run(backend: str | Running, function: Callable[[Any], Any], job: Any, world: int, timeout: float) -> list[Any]:
    """`function(job)` on `world` ranks of `backend`; the results in rank order.

    Raises:
        RankError: a rank raised or did not end in time, with its traceback or stack. InputError: what cannot be sent to a process.
    """
    if isinstance(backend, Running):
        return backend.run(function, job, world, timeout)
    if backend == "gloo":
        return _in_processes(function, job, world, timeout)
    ranks = ThreadRanks(world, timeout, turns=backend == "local")
    try:
        return ranks.run(function, job)
    finally:
        ranks.stop()


def _in_processes(function: Callable[[Any], Any], job: Any, world: int, timeout: float) -> list[Any]:
    try:
        import cloudpickle
    except ImportError as error:
        raise InputError('backend="gloo" sends the model to other processes with cloudpickle: pip install "autotp[testing]"') from error
    with tempfile.TemporaryDirectory(prefix="autotp-ranks-") as folder:
        try:
            torch.save((function, job), Path(folder) / "job", pickle_module=cloudpickle)
        except Exception as error:  # what a pickle refuses, it refuses in many ways
            raise InputError(f'backend="gloo": the model, its inputs or the optimizer cannot be sent to a process: {error}') from error
        values(run_ranks(_in_process, world, folder, timeout=timeout, with_main=False))
        return [torch.load(Path(folder) / f"rank{rank}", weights_only=False) for rank in range(world)]


def _in_process(emit: Callable[[Any], None], folder: str) -> None:
    """Runs the work of one process; the result goes through a file, as it may hold tensors."""
    function, job = torch.load(Path(folder) / "job", weights_only=False)
    torch.save(function(job), Path(folder) / f"rank{torch.distributed.get_rank()}")
