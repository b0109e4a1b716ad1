"""All ranks go on together, or none does: `agree` raises the error of one rank on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from autotp.errors import AutoTPError, LostRankError

T = TypeVar("T")


def agree(group: dist.ProcessGroup | None, work: Callable[[], T]) -> T:
    """Run `work` on every rank; if it raises on any, raise the same error on all. Collective.

    None for `group`: this process alone.

    Raises:
        AutoTPError: what the first rank that failed raised, if it was one; else one that names the rank and the error. Also where a
            rank is gone: it was killed, or its connection broke.
    """
    if group is None:
        return work()
    failure: BaseException | None = None
    result: Any = None
    try:
        result = work()
    except Exception as error:
        failure = error
    reports: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(reports, report_of(failure), group=group)
    except (RuntimeError, ValueError) as error:
        if failure is not None:
            raise failure from error
        raise LostRankError(f"another rank is gone (killed, or its connection broke): {_brief(error)}") from error
    raise_first(reports, failure)
    return result  # type: ignore[no-any-return]


@dataclass(frozen=True, slots=True)
class Report:
    """Tells other ranks of an error. `ours`: it is an `AutoTPError`. `follows`: it only says that another rank failed."""

    name: str
    text: str
    ours: bool
    follows: bool


def report_of(failure: BaseException | None) -> Report | None:
    """Returns what other ranks are told of `failure`."""
    if failure is None:
        return None
    return Report(type(failure).__name__, str(failure), isinstance(failure, AutoTPError), isinstance(failure, LostRankError))


def raise_first(reports: Sequence[Report | None], own: BaseException | None) -> None:
    """Raise what the first rank that failed raised; errors that follow from another rank's come last. `own`: what this rank raised.

    Raises:
        AutoTPError: that error, if it was one; else one that names the rank and the error.
    """
    failed = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if not failed:
        return
    rank, report = next(((rank, report) for rank, report in failed if not report.follows), failed[0])
    if report.ours and isinstance(own, AutoTPError) and str(own) == report.text:
        raise own
    if report.ours:
        raise {cls.__name__: cls for cls in _kinds(AutoTPError)}.get(report.name, AutoTPError)(report.text) from own
    raise AutoTPError(f"rank {rank} failed with {report.name}: {report.text}") from own


def raise_lost(collective: str, rank: int, error: Exception) -> None:
    """Raise a `LostRankError` where a process group's `error` says that other ranks did not come; nothing for any other error.

    torch fails to describe the error of a group that it has no name for, and raises a ValueError on top of it.
    """
    cause = error.__context__ if isinstance(error, ValueError) else error
    text = str(cause)
    if isinstance(cause, dist.DistError) or (isinstance(cause, RuntimeError) and ("gloo" in text or "onnection" in text)):
        raise LostRankError(
            f"rank {rank} waited in the model's {collective} for another rank, which did not come: it did not make this call, it failed, "
            "or it is gone. A call of a parallel model is made on every rank; with autotp.serve(model) one rank makes it for all. "
            f"The process group says: {_brief(cause)}"
        ) from cause


def _brief(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


def _kinds(cls: type[AutoTPError]) -> Iterator[type[AutoTPError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _kinds(sub)
