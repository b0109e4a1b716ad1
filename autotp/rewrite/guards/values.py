"""Checks that plain values that code on parts reads (`config._attn_implementation`, a flag, a size) stay as they were when the plan
was made.

Only modules that run on parts are watched: code on whole values may take any path. Floats may change: no path depends on them, and
each call reads them anew. They may not change where summands pass that are reduced together: a dropout of 0 there has to stay 0.
Where a module has a config of its own, with a local number in it, changes of the model's config do not reach it. Any change that it
would have read is then an error, floats too.
"""

from __future__ import annotations

import inspect
import reprlib
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from itertools import chain
from operator import attrgetter
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from autotp.errors import ChangedError
from autotp.trace.forms import kind_of
from autotp.trace.reading import Reading

_PLAIN = (bool, int, str, type(None), FunctionType, BuiltinFunctionType, type, bytes, complex, range, torch.dtype)
_TABLES = frozenset(nn.Module().__dict__)  # hooks and the like, which others look at
_MOST = 1024  # items of a list or dict
_FILLED = (list, dict, set)
_DEEPEST = 3  # settings in settings in settings
_MISSING: Any = object()


def _plain(value: Any, floats: bool = False) -> bool:
    if type(value) in (tuple, list, set, frozenset):
        return len(value) < _MOST and all(_plain(v, True) for v in value)
    if isinstance(value, dict):
        return len(value) < _MOST and all(_plain(k, True) and _plain(v, True) for k, v in value.items())
    if isinstance(value, partial):
        return _plain(value.func)
    return type(value) in _PLAIN or isinstance(value, (Enum, numpy.generic)) or (floats and type(value) is float)


def _kept(value: Any) -> Any:
    """A copy of a list, a dict or a set, so that changes in it show."""
    if isinstance(value, dict):
        return {k: _kept(v) for k, v in value.items()}
    return type(value)(map(_kept, value)) if type(value) in (list, tuple, set) else value


class _One:
    """Watches some plain values of one object."""

    __slots__ = ("get", "names", "object", "values", "where", "wholes")

    def __init__(self, where: str, object: Any, names: Sequence[str], wholes: Mapping[str, int] | None = None) -> None:
        self.where, self.object, self.names, self.wholes = where, object, tuple(names), wholes or {}
        self.get: Callable[[Any], Any] = attrgetter(*self.names)
        self.values = _kept(self.get(object))

    def all(self, values: Any) -> tuple[Any, ...]:
        return tuple(values) if len(self.names) != 1 else (values,)

    def holds_lists(self) -> bool:
        return any(type(v) in _FILLED for v in self.all(self.values))

    def again(self) -> Iterator[_One]:
        """Stops watching a list or set that a forward fills: it may be filled and cleared.

        A dict that a forward changes stays watched for its other items.
        """
        now = self.all(self.get(self.object))
        if now != (old := self.all(self.values)):
            for name, a, b in zip(self.names, old, now, strict=True):
                if isinstance(a, dict) and isinstance(b, dict) and (rest := [k for k in b if k not in a or a[k] == b[k]]):
                    yield _Items(f"{self.where}{name}", self.object, name, rest)
            self.names = tuple(n for n, a, b in zip(self.names, old, now, strict=True) if not (type(a) in _FILLED and a != b))
            self.get = attrgetter(*self.names) if self.names else lambda _: ()
            self.values = _kept(self.get(self.object))


class _Items(_One):
    """Watches some items of a dict; a forward changes others."""

    __slots__ = ()

    def __init__(self, where: str, object: Any, name: str, keys: Sequence[Any]) -> None:
        self.where, self.object, self.names, self.wholes = where, object, (name,), {}
        self.get = partial(_items, name, tuple(keys))
        self.values = _kept(self.get(object))

    def again(self) -> Iterator[_One]:
        """Stops watching the items that a forward changed."""
        now = self.get(self.object)
        if now != self.values:
            keys = tuple(k for k, v in self.values.items() if now[k] == v)
            self.get = partial(_items, self.names[0], keys)
            self.values = _kept(self.get(self.object))
        yield from ()


def _items(name: str, keys: tuple[Any, ...], object: Any) -> dict[Any, Any]:
    found = getattr(object, name)
    return {key: found.get(key, _MISSING) for key in keys}


class _Kinds:
    """Watches attributes that hold more than plain values (objects in a list, a method of an object) by their contents."""

    __slots__ = ("kinds", "names", "object", "where")

    def __init__(self, where: str, object: Any, names: Sequence[str]) -> None:
        self.where, self.object, self.names = where, object, tuple(names)
        self.kinds = self.now()

    def now(self) -> tuple[str, ...]:
        """Returns their contents."""
        return tuple(kind_of(getattr(self.object, name, None)) for name in self.names)

    def again(self) -> None:
        """Stops watching attributes that a forward has changed: they are its own to change."""
        kept = [(n, a) for n, a, b in zip(self.names, self.kinds, self.now(), strict=True) if a == b]
        self.names, self.kinds = tuple(n for n, _ in kept), tuple(a for _, a in kept)


class _Absent:
    """Attributes that code asks for by name, and that are not there: `value` of each stays missing."""

    __slots__ = ("names", "object", "where")

    def __init__(self, where: str, object: nn.Module, names: frozenset[str]) -> None:
        self.where, self.object, self.names = where, object, names


class _Same:
    """Watches that an attribute of `object` stays the same object, of which values are watched."""

    __slots__ = ("held", "names", "object", "where")

    def __init__(self, where: str, object: Any, name: str, held: Any) -> None:
        self.where, self.object, self.names, self.held = where, object, (name,), held


Watcher = _One | _Absent | _Same | _Kinds


class Values:
    """Watches the plain values that the modules under one module rest on."""

    __slots__ = ("absent", "found", "kinds", "lists", "same", "settings")

    def __init__(self, found: Sequence[Watcher]) -> None:
        self.kinds = tuple(one for one in found if isinstance(one, _Kinds))
        self.same = tuple(one for one in found if isinstance(one, _Same))
        self.found = tuple(one for one in found if isinstance(one, _One))
        self.absent = tuple(one for one in found if isinstance(one, _Absent))
        self.lists = tuple(one for one in self.found if one.holds_lists())
        self.settings: list[list[Any]] = []

    def learn(self) -> None:
        """Accept the values that are there now, all together, in later calls: the plan is made for them."""
        try:
            self.settings.append([_kept(one.get(one.object)) for one in self.found])
        except AttributeError:
            return

    def _switched(self) -> bool:
        """True where the values are those of another setting, which become those to watch for."""
        for values in self.settings:
            if [one.get(one.object) for one in self.found[: len(values)]] == values:
                for one, value in zip(self.found, values, strict=False):  # entries share these: another one's may be current
                    one.values = value
                return True
        return False

    def again(self) -> None:
        """Runs after a call: items that its forwards put into lists are no change of the user's."""
        if more := tuple(chain.from_iterable([one.again() for one in self.lists])):
            self.found, self.lists = (*self.found, *more), (*self.lists, *more)
        for kinds in self.kinds:
            kinds.again()

    def check(self) -> None:
        """Raise where one has changed.

        Raises:
            ChangedError: names it.
        """
        for none in self.absent:
            if not none.names.isdisjoint(none.object.__dict__):
                name = next(n for n in none.names if n in none.object.__dict__)
                raise ChangedError(_changed(none.where + name, "not there", _brief(none.object.__dict__[name])))
        if not self._are_as_before() and not self._switched():
            self._compare()
        for kinds in self.kinds:
            for name, old, new in zip(kinds.names, kinds.kinds, kinds.now(), strict=True):
                if old != new:
                    raise ChangedError(_changed(kinds.where + name, old, new))
        for same in self.same:
            if same.object.__dict__.get(same.names[0]) is not same.held:
                raise ChangedError(
                    f"{same.where}, which code on a rank's part reads, is another object than when the model was made parallel. Change it "
                    "before parallelize (build the model again), or put the values into the one that was there"
                )

    def _are_as_before(self) -> bool:
        try:
            return all(one.get(one.object) == one.values for one in self.found)
        except AttributeError:
            return False

    def _compare(self) -> None:
        for one in self.found:
            now = one.all(one.get(one.object)) if isinstance(one, _Items) else [getattr(one.object, n, _MISSING) for n in one.names]
            for name, old, new in zip(one.names, one.all(one.values), now, strict=True):
                if name in one.wholes and new == one.wholes[name]:  # the model's own value, of which this rank has a part
                    setattr(one.object, name, old)
                elif new is _MISSING or new != old:
                    raise ChangedError(_changed(one.where + name, _brief(old), "gone" if new is _MISSING else _brief(new)))


def _brief(value: Any) -> str:
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else reprlib.repr(value)


def _changed(name: str, before: str, now: str) -> str:
    return (
        f"{name} was {before} when the model was made parallel and is {now} now; the code that reads it runs on a rank's part, by a plan "
        "made for the old value. Set it before parallelize (build the model again), or set it back"
    )


@dataclass(frozen=True, slots=True)
class Watched:
    """Says which values to watch.

    originals: (path, attribute) → the object that was there before a local copy of it was made. wholes: (path, attribute) → the
    model's own value of one that is local now. floats: the paths where floats count too.
    """

    originals: Mapping[tuple[str, str], Any]
    wholes: Mapping[tuple[str, str], int]
    floats: Collection[str] = ()


def stored_names(reading: Reading, modules: Iterable[nn.Module]) -> frozenset[str]:
    """Returns the names that any forward of the model stores in another object: they are its own to change.

    `Names.own` is in the module alone.
    """
    return frozenset(("training",)).union(*(reading.of(cls).stored for cls in {type(m) for m in modules}))


def watched(
    modules: Iterable[tuple[str, nn.Module]], reading: Reading, stored: frozenset[str], what: Watched
) -> Iterator[tuple[str, Watcher]]:
    """Yields (path of a module, values of it or of its contents) to watch. `modules`: those that run on parts."""
    defaults: dict[tuple[type, bool], frozenset[str]] = {}
    for path, module in modules:
        code = reading.of(type(module))
        names = code.read - stored - code.own
        tested = names if path in what.floats else code.tested - stored - code.own
        where = f"{path}." if path else ""
        kind = type(module), path in what.floats
        if kind not in defaults:
            plain = (n for n in names if _plain(inspect.getattr_static(type(module), n, None), n in tested) and hasattr(type(module), n))
            defaults[kind] = frozenset(n for n in plain if not callable(getattr(type(module), n)))
        own = {n for n in _own_names(module, names) if _plain(module.__dict__[n], n in tested)}
        own -= {n for n in own if hasattr(inspect.getattr_static(type(module), n, None), "__set__")}  # what guards it itself (`stash`)
        own |= defaults[kind] - module.__dict__.keys()
        wholes = {n: what.wholes[path, n] for n in own if (path, n) in what.wholes}
        if own:
            yield path, _One(where, module, sorted(own), wholes)
        methods = (names & _methods(type(module))) - module.__dict__.keys() - {"forward"}  # one of the instance would hide it
        if absent := frozenset(n for n in code.asked - stored - code.own if not hasattr(module, n)) | methods:
            yield path, _Absent(where, module, absent)
        if mixed := [n for n in _own_names(module, names) if n not in own and _is_mixed(module.__dict__[n], module)]:
            yield path, _Kinds(where, module, mixed)
        for name in _own_names(module, names):
            value = module.__dict__[name]
            if isinstance(value, type):
                yield from _of_object(path, f"{where}{name}.", value, names, tested, reading)
            elif _holds_values(value) and name not in mixed:
                yield path, _Same(where + name, module, name, value)
                yield from _of_object(path, f"{where}{name}.", value, names, tested, reading)
        for (owner, name), value in what.originals.items():
            if owner == path and value is not module.__dict__.get(name):
                yield from _of_object(path, f"{where}{name}.", value, names, names, reading)
        for name, child in _children(module):
            changes = reading.of(type(child)).own
            inside = {n for n in _own_names(child, names) if _plain(child.__dict__[n], n in tested)} - changes
            if inside:
                yield path, _One(f"{where}{name}.", child, sorted(inside))
            if absent := frozenset(n for n in code.asked - stored - changes if not hasattr(child, n)):
                yield path, _Absent(f"{where}{name}.", child, absent)


def _own_names(module: nn.Module, names: frozenset[str]) -> list[str]:
    return [n for n in module.__dict__ if n in names and n not in _TABLES and not n.startswith("_autotp")]


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules that its code can reach by an attribute, and those in lists and dicts of modules there."""
    for name, child in module._modules.items():
        if child is None:
            continue
        if type(child).forward is nn.Module.forward:
            yield from ((f"{name}.{n}", m) for n, m in _children(child))
        else:
            yield name, child


def _is_mixed(value: object, module: nn.Module) -> bool:
    """True for a container of other things than plain values, and for a method of an object that is no module."""
    if isinstance(value, MethodType):
        return not isinstance(value.__self__, nn.Module)
    if isinstance(value, (list, tuple, dict, deque)):
        return bool(value) and len(value) < _MOST and not any(isinstance(v, nn.Module) for v in _leaves(value))
    return isinstance(value, numpy.ndarray)


def _leaves(value: Any) -> Iterator[Any]:
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (list, tuple, dict, deque)):
            yield from _leaves(item)
        else:
            yield item


def _holds_values(value: object) -> bool:
    """True for settings, for a function with arguments, and for a module that another one holds beside its children."""
    kind = type(value)
    slots = hasattr(kind, "__slots__") and kind.__module__ != "builtins" and not kind.__module__.startswith("torch")
    return (hasattr(value, "__dict__") or slots) and not isinstance(value, (Tensor, type, FunctionType, MethodType))


def _of_object(
    path: str, where: str, value: Any, names: frozenset[str], tested: frozenset[str], reading: Reading, depth: int = 0
) -> Iterator[tuple[str, Watcher]]:
    """Yields the values in an object: those that the code reads itself, and those that the methods read that the code names."""
    if isinstance(value, partial):
        names = names | {"keywords", "args"}
    elif not isinstance(value, nn.Module):
        own = reading.of_methods(type(value), (names | {"__call__"}) & _methods(type(value)))
        names, tested = names | (own.read - own.stored - own.own), tested | own.tested
    found: list[str] = []
    for name in sorted(names):
        try:
            held = getattr(value, name)
        except Exception:  # a property of the user's may raise anything
            continue
        if _plain(held, name in tested):
            found.append(name)
        elif depth < _DEEPEST and name in getattr(value, "__dict__", {}) and _holds_values(held) and not isinstance(held, nn.Module):
            yield path, _Same(where + name, value, name, held)
            yield from _of_object(path, f"{where}{name}.", held, names, tested, reading, depth + 1)
    if found:
        yield path, _One(where, value, found)


def _methods(cls: type) -> frozenset[str]:
    """The names of the methods and properties that a class has from code in Python."""
    kinds = (FunctionType, property, staticmethod, classmethod)
    return frozenset(n for c in cls.__mro__ for n, f in vars(c).items() if isinstance(f, kinds))
