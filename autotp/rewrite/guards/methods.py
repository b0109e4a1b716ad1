"""Finds the methods and properties that code on parts reaches: one that takes the place of another would run by the plan of the other."""

from __future__ import annotations

from collections.abc import Iterator
from types import FunctionType

from torch import nn

from autotp.rewrite.guards.watchers import Methods
from autotp.trace.reading import Names, Reading

_KINDS = (FunctionType, property, staticmethod, classmethod)
_OTHERS = frozenset(("torch", "builtins", "abc", "typing", "functools"))  # whose classes nobody changes between two calls


def methods_of(cls: type) -> frozenset[str]:
    """Returns the names of the methods and properties that a class has from code in Python."""
    return frozenset(n for c in cls.__mro__ for n in _own(c))


def _own(cls: type) -> Iterator[str]:
    return (n for n, f in vars(cls).items() if isinstance(f, _KINDS))


def code_of(module: nn.Module, reading: Reading) -> tuple[Names, frozenset[str]]:
    """Returns the names in the code of a module, and those that it may reach by names that it computes (`getattr(self, self.kind)`).

    The latter are what its texts name, and the methods of its class beside its forward.
    """
    cls = type(module)
    code = reading.of(cls)
    if not code.computed:
        return code, frozenset()
    texts = frozenset(v for v in module.__dict__.values() if isinstance(v, str))
    reached = frozenset(n for c in cls.__mro__ if c.__module__ == cls.__module__ for n in _own(c) if not n.startswith("__"))
    reached |= texts.intersection((*module.__dict__, *(n for c in _watched(cls) for n in _own(c))))
    reached = reached.difference(vars(nn.Module))
    return reading.of_methods(cls, reached | {"forward"}), reached


def of_classes(cls: type, names: frozenset[str]) -> Iterator[Methods]:
    """Yields a watcher of those of `names` that are methods of a class, and of those that its bases have: a method may call that of a base.

    Its forward is watched elsewhere.
    """
    found = {c: names.intersection(_own(c)) for c in _watched(cls)}
    for c, own in found.items():
        every = own.union(*found.values()) - {"forward"} if c is cls else own
        kept = [
            n for n in sorted(every) if getattr(c, n, None) == getattr(c, n, None)
        ]  # what is made anew at each access cannot be compared
        if kept:
            yield Methods(c, kept)


def _watched(cls: type) -> Iterator[type]:
    return (c for c in cls.__mro__ if c.__module__.partition(".")[0] not in _OTHERS)
