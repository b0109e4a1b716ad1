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
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import numpy
from torch import Tensor, nn

from autotp.errors import ChangedError
from autotp.rewrite.guards.functions import kept_by
from autotp.rewrite.guards.methods import code_of, methods_of, of_classes
from autotp.rewrite.guards.plain import MOST, has_slots, is_equal, is_method_of_module, is_plain
from autotp.rewrite.guards.watchers import MISSING, Absent, Items, Kept, Kinds, Methods, One, Same, Watcher, copied
from autotp.trace.reading import Reading

_TABLES = frozenset(nn.Module().__dict__)  # hooks and the like, which others look at
_DEEPEST = 3  # settings in settings in settings


class Values:
    """Watches the plain values that the modules under one module rest on."""

    __slots__ = ("absent", "found", "kinds", "lists", "same", "settings")

    def __init__(self, found: Sequence[Watcher]) -> None:
        self.kinds = tuple(one for one in found if isinstance(one, Kinds))
        self.same = tuple(one for one in found if isinstance(one, Same))
        self.found = tuple(one for one in found if isinstance(one, One))
        self.absent = tuple(one for one in found if isinstance(one, Absent))
        self.lists = tuple(one for one in self.found if one.holds_lists())
        self.settings: list[list[Any]] = []

    def learn(self) -> None:
        """Accept the values that are there now, all together, in later calls: the plan is made for them."""
        try:
            self.settings.append([copied(one.get(one.object)) for one in self.found])
        except AttributeError:
            return

    def _switched(self) -> bool:
        """True where the values are those of another setting, which become those to watch for."""
        for values in self.settings:
            if all(is_equal(one.get(one.object), value) for one, value in zip(self.found, values, strict=False)):
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
            for one in self.found:
                now = one.get(one.object)
                if now is not one.values and now != one.values:
                    return False
        except Exception:  # one is gone, or is something that cannot be compared
            return False
        return True

    def _compare(self) -> None:
        for one in self.found:
            now = one.all(one.get(one.object)) if isinstance(one, Items) else [getattr(one.object, n, MISSING) for n in one.names]
            for name, old, new in zip(one.names, one.all(one.values), now, strict=True):
                changed = new is not MISSING and not is_equal(new, old)
                if name in one.wholes and is_equal(new, one.wholes[name]):  # the model's own value, of which this rank has a part
                    setattr(one.object, name, old)
                elif new is MISSING or changed:
                    raise ChangedError(_changed(one.told(name), _brief(old), "gone" if new is MISSING else _brief(new)))


def _brief(value: Any) -> str:
    if is_method_of_module(value):  # whose own text is that of the whole module
        return f"the method {value.__qualname__}"
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else " ".join(reprlib.repr(value).split())


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
    classes: dict[tuple[type, frozenset[str]], list[Methods]] = {}
    seen: set[tuple[int, str]] = set()  # blocks share the functions of their class
    for path, module in modules:
        cls = type(module)
        code, reached = code_of(module, reading)
        names = (code.read | reached) - stored - code.own
        tested = names if path in what.floats else code.tested - stored - code.own
        where = f"{path}." if path else ""
        kind = cls, path in what.floats
        if kind not in defaults:
            found = {n: inspect.getattr_static(cls, n, None) for n in names if hasattr(cls, n)}
            defaults[kind] = frozenset(n for n, v in found.items() if is_plain(v, n in tested) and not hasattr(type(v), "__get__"))
        called = names & methods_of(cls)
        if (cls, called) not in classes:
            classes[cls, called] = list(of_classes(cls, called))
        yield from ((path, one) for one in classes[cls, called])
        own = {n for n in _own_names(module, names) if is_plain(module.__dict__[n], n in tested)} - {"forward"}
        own -= {n for n in own if hasattr(inspect.getattr_static(cls, n, None), "__set__")}  # what guards it itself (`stash`)
        own |= defaults[kind] - module.__dict__.keys()
        wholes = {n: what.wholes[path, n] for n in own if (path, n) in what.wholes}
        if own:
            yield path, One(where, module, sorted(own), wholes)
        methods = called - module.__dict__.keys() - {"forward"}  # one of the instance would hide it
        if absent := frozenset(n for n in code.asked - stored - code.own if not hasattr(module, n)) | methods:
            yield path, Absent(where, module, absent)
        if mixed := [n for n in _own_names(module, names) if n not in own and _is_mixed(module.__dict__[n], module)]:
            yield path, Kinds(where, module, mixed)
        for name in _own_names(module, names):
            value = module.__dict__[name]
            if isinstance(value, type):
                yield from _of_object(path, f"{where}{name}.", value, names, tested, reading)
            elif _holds_values(value) and name not in mixed:
                yield path, Same(where + name, module, name, value)
                yield from _of_object(path, f"{where}{name}.", value, names, tested, reading)
        functions = [inspect.getattr_static(cls, n, None) for n in sorted(called | {"forward"})]
        for function in (*functions, *(module.__dict__[n] for n in _own_names(module, names))):
            for said, holder, name, is_tested in kept_by(function):
                held = getattr(holder, name)
                if (id(holder), name) not in seen and (is_plain(held, is_tested) or isinstance(held, nn.Module)):
                    seen.add((id(holder), name))
                    yield path, Kept(where, said, holder, name)
        for (owner, name), value in what.originals.items():
            if owner == path and value is not module.__dict__.get(name):
                yield from _of_object(path, f"{where}{name}.", value, names, names, reading)
        for name, child in _children(module):
            changes = reading.of(type(child)).own
            inside = {n for n in _own_names(child, names) if is_plain(child.__dict__[n], n in tested)} - changes - {"forward"}
            if inside:
                yield path, One(f"{where}{name}.", child, sorted(inside))
            if absent := frozenset(n for n in code.asked - stored - changes if not hasattr(child, n)):
                yield path, Absent(f"{where}{name}.", child, absent)


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
        return not is_method_of_module(value)
    if isinstance(value, (list, tuple, dict, deque)):
        return bool(value) and len(value) < MOST and not any(isinstance(v, nn.Module) for v in _leaves(value))
    return isinstance(value, numpy.ndarray)


def _leaves(value: Any) -> Iterator[Any]:
    for item in value.values() if isinstance(value, dict) else value:
        if isinstance(item, (list, tuple, dict, deque)):
            yield from _leaves(item)
        else:
            yield item


def _holds_values(value: object) -> bool:
    """True for settings, for a function with arguments, and for a module that another one holds beside its children."""
    return (hasattr(value, "__dict__") or has_slots(type(value))) and not isinstance(value, (Tensor, type, FunctionType, MethodType))


def _of_object(
    path: str, where: str, value: Any, names: frozenset[str], tested: frozenset[str], reading: Reading, depth: int = 0
) -> Iterator[tuple[str, Watcher]]:
    """Yields the values in an object: those that the code reads itself, and those that the methods read that the code names."""
    if isinstance(value, partial):
        names = names | {"keywords", "args"}
    elif not isinstance(value, nn.Module):
        own = reading.of_methods(type(value), (names | {"__call__"}) & methods_of(type(value)))
        names, tested = names | (own.read - own.stored - own.own), tested | own.tested
        yield from ((path, one) for one in of_classes(type(value), names | {"__call__"}))
    found = [] if isinstance(value, (nn.Module, type)) else ["__class__"]
    for name in sorted(names - {"__class__"}):
        try:
            held = getattr(value, name)
        except Exception:  # a property of the user's may raise anything
            continue
        if is_plain(held, name in tested) and getattr(held, "__self__", None) is not value:
            found.append(name)
        elif depth < _DEEPEST and name in getattr(value, "__dict__", {}) and _holds_values(held) and not isinstance(held, nn.Module):
            yield path, Same(where + name, value, name, held)
            yield from _of_object(path, f"{where}{name}.", held, names, tested, reading, depth + 1)
    if found:
        yield path, One(where, value, found)
