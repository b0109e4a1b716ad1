"""All ranks go on together, or none does: `agree` raises the error of one rank on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist

from autotp.errors import AutoTPError

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
    own = None if failure is None else (type(failure).__name__, str(failure), isinstance(failure, AutoTPError))
    try:
        dist.all_gather_object(reports, own, group=group)
    except (RuntimeError, ValueError) as error:
        if failure is not None:
            raise failure from error
        raise AutoTPError(f"another rank is gone (killed, or its connection broke): {' '.join(str(error).split())[:300]}") from error
    first = next(((rank, r) for rank, r in enumerate(reports) if r is not None), None)
    if first is None:
        return result  # type: ignore[no-any-return]
    rank, (name, text, ours) = first
    if ours and isinstance(failure, AutoTPError) and str(failure) == text:
        raise failure
    if ours:
        raise {cls.__name__: cls for cls in _kinds(AutoTPError)}.get(name, AutoTPError)(text) from failure
    raise AutoTPError(f"rank {rank} failed with {name}: {text}") from failure


def _kinds(cls: type[AutoTPError]) -> Iterator[type[AutoTPError]]:
    yield cls
    for sub in cls.__subclasses__():
        yield from _kinds(sub)
