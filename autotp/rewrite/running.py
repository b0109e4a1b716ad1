"""Tells whether a call of a parallel model is running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Running:
    """`open` while the outermost module of a call runs. All modules of one model share it; a copy of the model has its own.

    records: that call records gradients.
    compiles: a module in it is compiled. Hidden states stay whole then: what runs between two compiled pieces cannot tell.
    compared: how many calls asked whether their inputs are to be compared between ranks; the same number on every rank.
    """

    __slots__ = ("compared", "compiles", "open", "records")

    def __init__(self) -> None:
        self.open = self.records = self.compiles = False
        self.compared = 0

    @contextmanager
    def opened(self) -> Iterator[None]:
        """A call is running inside."""
        before, self.open = self.open, True
        try:
            yield
        finally:
            self.open = before

    def __deepcopy__(self, memo: dict[int, Any]) -> Running:
        made: Running = memo.setdefault(id(self), Running())
        return made
