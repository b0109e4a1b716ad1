"""Which attributes the code of a forward reads: names in its bytecode, and in that of the methods and functions that it calls.

What wraps the forward (a decorator that checkpoints the module) is not its code: it passes on.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_MOST = 300  # functions that are looked into for one class
_LOADS = frozenset(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))
_ASKING = frozenset(("getattr", "hasattr"))
_STORES = frozenset(("STORE_ATTR", "DELETE_ATTR"))


class Reading:
    """The names that forwards of classes read and store; each class is looked at once."""

    def __init__(self) -> None:
        self._known: dict[type, tuple[frozenset[str], frozenset[str], frozenset[str]]] = {}

    def of(self, cls: type[nn.Module]) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
        """(names of attributes that are read, that are stored or deleted, that may be asked for by `getattr` or `hasattr`)."""
        if cls not in self._known:
            self._known[cls] = _names(cls)
        return self._known[cls]


def _names(cls: type[nn.Module]) -> tuple[frozenset[str], frozenset[str], frozenset[str]]:
    read: set[str] = set()
    asked: set[str] = set()
    stored: set[str] = set()
    todo: list[Any] = [inspect.unwrap(cls.forward)]
    seen: set[CodeType] = set()
    while todo and len(seen) < _MOST:
        function = todo.pop()
        if isinstance(function, FunctionType) and function.__code__ not in seen:
            seen.add(function.__code__)
            todo += _functions(function, cls, read, stored)
            for code in _codes(function.__code__):
                if not _ASKING.isdisjoint(code.co_names):
                    asked.update(c for c in code.co_consts if isinstance(c, str) and c.isidentifier())
    return frozenset(read | asked), frozenset(stored), frozenset(asked)


def _functions(function: FunctionType, cls: type[nn.Module], read: set[str], stored: set[str]) -> Iterator[Any]:
    """Notes what `function` reads and stores; the functions that it may call."""
    yield getattr(function, "__wrapped__", None)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty yet
            continue
    for code in _codes(function.__code__):
        for i in dis.get_instructions(code):
            if i.opname in _LOADS:
                read.add(i.argval)
                found = inspect.getattr_static(cls, i.argval, None)
                yield getattr(found, "fget", None) or getattr(found, "__func__", found)
            elif i.opname in _STORES:
                stored.add(i.argval)
            elif i.opname == "LOAD_GLOBAL":
                other = function.__globals__.get(i.argval)
                if isinstance(other, FunctionType) and other.__module__.partition(".")[0] == cls.__module__.partition(".")[0]:
                    yield other


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
