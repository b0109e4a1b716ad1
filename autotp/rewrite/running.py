"""Tells whether a call of a parallel model is running."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Running:
    """`open` while the outermost module of a call runs. All modules of one model share it; a copy of the model has its own.

    records: that call records gradients.
    inside_compiled: it is a call in compiled code, whose graph breaks: this call runs as it is written, and pieces of it are compiled.
    compiles: a module in it is compiled, or pieces are. Hidden states stay whole then: what runs between two compiled pieces cannot tell.
    compared: how many calls asked whether their inputs are to be compared between ranks; the same number on every rank.
    at_end: what is to be done when that call ends.
    """

    __slots__ = ("at_end", "compared", "compiles", "inside_compiled", "open", "records")

    def __init__(self) -> None:
        self.open = self.records = self.compiles = self.inside_compiled = False
        self.compared = 0
        self.at_end: list[Callable[[], None]] = []

    def end(self) -> None:
        """Do what is to be done when the call ends."""
        for work in self.at_end:
            work()
        self.at_end.clear()

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
