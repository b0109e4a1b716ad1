"""Tells which collectives run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from autotp.rewrite.collectives.comm import GroupComm

#: method → (kind of collective, whether the rank gives a part of what is counted, whether it only begins)
_METHODS = {
    "all_reduce_": ("all_reduce", False, False),
    "begin_sum": ("all_reduce", False, True),
    "all_gather": ("all_gather", True, False),
    "all_gather_rows": ("all_gather", True, False),
    "begin_gather": ("all_gather", True, True),
    "reduce_scatter": ("reduce_scatter", False, False),
    "begin_scatter": ("reduce_scatter", False, True),
    "all_to_all": ("all_to_all", False, False),
}


@contextmanager
def noted(note: Callable[[GroupComm, str, Tensor, int], None]) -> Iterator[None]:
    """Calls `note(comm, kind, what the rank gives, bytes of the whole)` for each collective that runs inside, on every rank."""

    def watched(name: str) -> Any:
        inner, (kind, is_part, begins) = getattr(GroupComm, name), _METHODS[name]

        def method(self: GroupComm, tensor: Tensor, *counts: Any) -> Any:
            if not begins or self._overlaps():  # else it calls one of the others
                note(self, kind, tensor, tensor.nbytes * (self.size if is_part else 1))
            return inner(self, tensor, *counts)

        return method

    before = {name: getattr(GroupComm, name) for name in _METHODS}
    for name in _METHODS:
        setattr(GroupComm, name, watched(name))
    try:
        yield
    finally:
        for name, method in before.items():
            setattr(GroupComm, name, method)
