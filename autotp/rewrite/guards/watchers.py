"""Watchers of values of one object: each holds what it was, and asks what it is now."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import numpy

from autotp.rewrite.guards.plain import is_equal
from autotp.trace.forms import kind_of

FILLED = (list, dict, set, bytearray, array)
MISSING: Any = object()


def copied(value: Any) -> Any:
    """A copy of a list, a dict, a set or an array of bytes or numbers, so that changes in it show."""
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if type(value) in (bytearray, array):
        return value[:]
    return type(value)(map(copied, value)) if type(value) in (list, tuple, set) else value


class One:
    """Watches some plain values of one object."""

    __slots__ = ("get", "names", "object", "values", "where", "wholes")

    def __init__(self, where: str, object: Any, names: Sequence[str], wholes: Mapping[str, int] | None = None) -> None:
        self.where, self.object, self.names, self.wholes = where, object, tuple(names), wholes or {}
        self.get: Callable[[Any], Any] = attrgetter(*self.names)
        self.values = copied(self.get(object))

    def all(self, values: Any) -> tuple[Any, ...]:
        return tuple(values) if len(self.names) != 1 else (values,)

    def told(self, name: str) -> str:
        """Says which value it is."""
        return f"{self.where}{name}"

    def holds_lists(self) -> bool:
        return any(type(v) in FILLED for v in self.all(self.values))

    def again(self) -> Iterator[One]:
        """Stops watching a list or set that a forward fills: it may be filled and cleared.

        A dict that a forward changes stays watched for its other items.
        """
        now = self.all(self.get(self.object))
        if not is_equal(now, old := self.all(self.values)):
            for name, a, b in zip(self.names, old, now, strict=True):
                if isinstance(a, dict) and isinstance(b, dict) and (rest := [k for k in b if k not in a or a[k] == b[k]]):
                    yield Items(f"{self.where}{name}", self.object, name, rest, b.keys() - a.keys())
            self.names = tuple(n for n, a, b in zip(self.names, old, now, strict=True) if not (type(a) in FILLED and a != b))
            self.get = attrgetter(*self.names) if self.names else lambda _: ()
            self.values = copied(self.get(self.object))


class Items(One):
    """Watches some items of a dict; a forward changes others. Those that `came` by a forward may go again: it puts them back."""

    __slots__ = ("came",)

    def __init__(self, where: str, object: Any, name: str, keys: Sequence[Any], came: Collection[Any]) -> None:
        self.where, self.object, self.names, self.wholes, self.came = where, object, (name,), {}, frozenset(came)
        self._keep(_items(name, dict.fromkeys(keys, MISSING), object))

    def _keep(self, values: dict[Any, Any]) -> None:
        self.values = copied(values)
        self.get = partial(_items, self.names[0], {k: v if k in self.came else MISSING for k, v in self.values.items()})

    def told(self, name: str) -> str:
        """Says which dict it is."""
        return self.where

    def again(self) -> Iterator[One]:
        """Stops watching the items that a forward changed."""
        now = self.get(self.object)
        if now != self.values:
            self._keep({k: v for k, v in self.values.items() if now[k] == v})
        yield from ()


class _Shared(One):
    """Watches what copies of a model share."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        made = object.__new__(type(self))
        for cls in type(self).__mro__:
            for name in cls.__dict__.get("__slots__", ()):
                setattr(made, name, getattr(self, name))
        return made


class Methods(_Shared):
    """Watches methods of a class."""

    __slots__ = ()

    def __init__(self, cls: type, names: Sequence[str]) -> None:
        super().__init__(f"{cls.__qualname__}.", cls, names)


class Kept(_Shared):
    """Watches a value that a function keeps, by a name of its own. A forward that changes it may."""

    __slots__ = ("called",)

    def __init__(self, where: str, called: str, object: Any, name: str) -> None:
        super().__init__(where, object, (name,))
        self.called = called

    def told(self, name: str) -> str:
        """Says which it is."""
        return f"{self.called} ({self.where.removesuffix('.') or 'the model'})"

    def holds_lists(self) -> bool:
        return True

    def again(self) -> Iterator[One]:
        """Stops watching one that a forward has changed."""
        if self.names and self.get(self.object) != self.values:
            self.names, self.get, self.values = (), _nothing, ()
        yield from ()


def _nothing(object: Any) -> tuple[()]:
    return ()


def _items(name: str, missing: dict[Any, Any], object: Any) -> dict[Any, Any]:
    found = getattr(object, name)
    return {key: found.get(key, instead) for key, instead in missing.items()}


class Kinds:
    """Watches attributes that hold more than plain values (objects in a list, a method of an object) by their contents."""

    __slots__ = ("kinds", "names", "object", "where")

    def __init__(self, where: str, object: Any, names: Sequence[str]) -> None:
        self.where, self.object, self.names = where, object, tuple(names)
        self.kinds = self.now()

    def now(self) -> tuple[str, ...]:
        """Returns their contents."""
        return tuple(map(_contents, (getattr(self.object, name, None) for name in self.names)))

    def again(self) -> None:
        """Stops watching attributes that a forward has changed: they are its own to change."""
        kept = [(n, a) for n, a, b in zip(self.names, self.kinds, self.now(), strict=True) if a == b]
        self.names, self.kinds = tuple(n for n, _ in kept), tuple(a for _, a in kept)


def _contents(value: Any) -> str:
    """A text for the contents: of an array its shape."""
    return f"an array of shape {value.shape} ({value.dtype})" if isinstance(value, numpy.ndarray) else kind_of(value)


class Absent:
    """Attributes that code asks for by name, and that are not there: each stays missing. `sets`: a forward may put one there itself."""

    __slots__ = ("names", "object", "sets", "where")

    def __init__(self, where: str, object: Any, names: frozenset[str], sets: bool) -> None:
        self.where, self.object, self.names, self.sets = where, object, names, sets

    def again(self) -> None:
        """Stops watching those that a forward has put there."""
        self.names = self.names.difference(self.object.__dict__)


class Same:
    """Watches that an attribute of `object` stays the same object, of which values are watched."""

    __slots__ = ("held", "names", "object", "where")

    def __init__(self, where: str, object: Any, name: str, held: Any) -> None:
        self.where, self.object, self.names, self.held = where, object, (name,), held


Watcher = One | Absent | Same | Kinds
