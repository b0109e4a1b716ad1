"""Plain values that code on parts reads (`config._attn_implementation`, a flag, a size) must stay what they were when the plan was made.

Only modules that run on parts are watched: code that sees whole values may take any path. Floats may change: no path depends on them,
and they are read anew in each call. Where summands pass that are reduced together they may not: a dropout of 0 there has to stay 0. And
where a module has a config of its own, with a local number in it, changes of the model's config do not reach it: any that it would have
read is then an error, floats too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn

from autotp.errors import AutoTPError
from autotp.trace.reading import Reading

_PLAIN = (bool, int, str, type(None), FunctionType, BuiltinFunctionType, type)
_FILLED = (list, dict, set)
_MISSING: Any = object()


def _plain(value: Any, floats: bool = False) -> bool:
    if type(value) in (tuple, list, set, frozenset):
        return len(value) < 64 and all(_plain(v, floats) for v in value)
    if type(value) is dict:
        return len(value) < 64 and all(_plain(k, True) and _plain(v, floats) for k, v in value.items())
    if isinstance(value, partial):
        return _plain(value.func)
    return type(value) in _PLAIN or (floats and type(value) is float)


def _kept(value: Any) -> Any:
    """A copy of a list, a dict or a set, so that changes in it show."""
    if type(value) is dict:
        return {k: _kept(v) for k, v in value.items()}
    return type(value)(map(_kept, value)) if type(value) in (list, tuple, set) else value


class _One:
    """Some plain values of one object."""

    __slots__ = ("get", "names", "object", "values", "where")

    def __init__(self, where: str, object: Any, names: Sequence[str]) -> None:
        self.where, self.object, self.names = where, object, tuple(names)
        self.get: Callable[[Any], Any] = attrgetter(*self.names)
        self.values = _kept(self.get(object))

    def all(self, values: Any) -> tuple[Any, ...]:
        return tuple(values) if len(self.names) != 1 else (values,)

    def holds_lists(self) -> bool:
        return any(type(v) in _FILLED for v in self.all(self.values))

    def again(self) -> None:
        """A list, dict or set that a forward fills is there to be filled, and to be cleared: no longer watched."""
        now = self.all(self.get(self.object))
        if now != (old := self.all(self.values)):
            self.names = tuple(n for n, a, b in zip(self.names, old, now, strict=True) if not (type(a) in _FILLED and a != b))
            self.get = attrgetter(*self.names) if self.names else lambda _: ()
            self.values = _kept(self.get(self.object))


class _Absent:
    """Attributes that code asks for by name, and that are not there: `value` of each stays missing."""

    __slots__ = ("names", "object", "where")

    def __init__(self, where: str, object: nn.Module, names: frozenset[str]) -> None:
        self.where, self.object, self.names = where, object, names


class Values:
    """The plain values that the modules under one module rest on."""

    __slots__ = ("absent", "found", "lists")

    def __init__(self, found: Sequence[_One | _Absent]) -> None:
        self.found = tuple(one for one in found if isinstance(one, _One))
        self.absent = tuple(one for one in found if isinstance(one, _Absent))
        self.lists = tuple(one for one in self.found if one.holds_lists())

    def again(self) -> None:
        """After a call: what its forwards put into lists is no change of the user's."""
        for one in self.lists:
            one.again()

    def check(self) -> None:
        """Raise where one has changed.

        Raises:
            AutoTPError: names it.
        """
        for none in self.absent:
            if not none.names.isdisjoint(none.object.__dict__):
                name = next(n for n in none.names if n in none.object.__dict__)
                raise AutoTPError(_changed(none.where + name, "not there", repr(none.object.__dict__[name])))
        try:
            for one in self.found:
                if one.get(one.object) != one.values:
                    break
            else:
                return
        except AttributeError:
            pass
        for one in self.found:
            now = tuple(getattr(one.object, name, _MISSING) for name in one.names)
            for name, old, new in zip(one.names, one.all(one.values), now, strict=True):
                if new is _MISSING or new != old:
                    text = "gone" if new is _MISSING else repr(new)
                    raise AutoTPError(_changed(one.where + name, repr(old), text))


def _changed(name: str, before: str, now: str) -> str:
    return (
        f"{name} was {before} when the model was made parallel and is {now} now; the code that reads it runs on a rank's part, by a plan "
        "made for the old value. Set it before parallelize (build the model again), or set it back"
    )


def watched(
    modules: Iterable[tuple[str, nn.Module]],
    originals: Mapping[tuple[str, str], Any],
    reading: Reading,
    every: Iterable[nn.Module],
    floats: Collection[str] = (),
) -> Iterator[tuple[str, _One | _Absent]]:
    """(path of a module, values of it or of what it holds) to watch.

    `modules`: those that run on parts. `originals`: (path, attribute) → the object that was there before a local copy of it was made.
    `every`: all modules of the model; what any of their forwards stores is theirs to change. `floats`: where floats count too.
    """
    stored = frozenset(("training",)).union(*(reading.of(cls)[1] for cls in {type(m) for m in every}))
    defaults: dict[type, frozenset[str]] = {}
    for path, module in modules:
        read, _, asked = reading.of(type(module))
        names = read - stored
        where = f"{path}." if path else ""
        if type(module) not in defaults:
            plain = (n for n in names if _plain(inspect.getattr_static(type(module), n, None)) and hasattr(type(module), n))
            defaults[type(module)] = frozenset(n for n in plain if not callable(getattr(type(module), n)))
        read_here = (n for n in module.__dict__ if n in names and not n.startswith("_autotp"))
        own = {n for n in read_here if _plain(module.__dict__[n], path in floats)}
        own -= {n for n in own if hasattr(inspect.getattr_static(type(module), n, None), "__set__")}  # what guards it itself (`stash`)
        own |= defaults[type(module)] - module.__dict__.keys()
        if own:
            yield path, _One(where, module, sorted(own))
        if absent := frozenset(n for n in asked - stored if not hasattr(module, n)):
            yield path, _Absent(where, module, absent)
        for name, value in module.__dict__.items():
            if name in names and _holds_values(value):
                yield from _of_object(path, f"{where}{name}.", value, names, path in floats)
        for (owner, name), value in originals.items():
            if owner == path and value is not module.__dict__.get(name):
                yield from _of_object(path, f"{where}{name}.", value, names, True)


def _holds_values(value: object) -> bool:
    """True for settings, and for a module that another one holds beside its children."""
    kind = type(value)
    slots = hasattr(kind, "__slots__") and kind.__module__ != "builtins" and not kind.__module__.startswith("torch")
    return (
        (hasattr(value, "__dict__") or slots)
        and not isinstance(value, Tensor | type)
        and (isinstance(value, nn.Module) or not callable(value))
    )


def _of_object(path: str, where: str, value: Any, names: Iterable[str], floats: bool) -> Iterator[tuple[str, _One]]:
    found: list[str] = []
    for name in sorted(names):
        try:
            if _plain(getattr(value, name), floats):
                found.append(name)
        except Exception:  # a property of the user's may raise anything
            continue
    if found:
        yield path, _One(where, value, found)
