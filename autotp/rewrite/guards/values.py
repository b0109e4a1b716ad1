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
from collections import defaultdict, deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import FunctionType, MethodType
from typing import Any

import numpy
from torch import Tensor, nn

from autotp.digest import is_log
from autotp.errors import ChangedError
from autotp.rewrite.guards.averages import averaging
from autotp.rewrite.guards.functions import kept_by
from autotp.rewrite.guards.methods import below, code_of, methods_of, of_classes
from autotp.rewrite.guards.plain import MOST, has_slots, is_equal, is_method_of_module, is_plain
from autotp.rewrite.guards.watchers import MISSING, Absent, Items, Kept, Kinds, Methods, One, Same, Watcher, copied
from autotp.trace.reading import Reading, methods_outside

_TABLES = frozenset(nn.Module().__dict__)  # hooks and the like, which others look at
_OURS = "autotp.rewrite."
_METHODS = (FunctionType, staticmethod, classmethod)
_DEEPEST = 3  # settings in settings in settings


class Values:
    """Watches the plain values that the modules under one module rest on."""

    __slots__ = ("absent", "found", "kinds", "lists", "same", "set", "settings")

    def __init__(self, found: Sequence[Watcher]) -> None:
        self.kinds = tuple(one for one in found if isinstance(one, Kinds))
        self.same = tuple(one for one in found if isinstance(one, Same))
        self.found = tuple(one for one in found if isinstance(one, One))
        self.absent = tuple(one for one in found if isinstance(one, Absent))
        self.set = tuple(one for one in self.absent if one.sets)
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
        for none in self.set:
            none.again()

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
                    before = one.wholes.get(name, old)
                    raise ChangedError(_changed(one.told(name), _brief(before), "gone" if new is MISSING else _brief(new)))


def _brief(value: Any) -> str:
    if is_method_of_module(value):  # whose own text is that of the whole module
        return f"the method {value.__qualname__}"
    if isinstance(value, FunctionType):
        return f"the function {value.__qualname__}"
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


@dataclass(frozen=True, slots=True)
class Asked:
    """The names that code reads from an object, those of them that a condition is about, and those that need not be there.

    sets: the code may put some there.
    """

    names: frozenset[str]
    tested: frozenset[str]
    asked: frozenset[str]
    sets: bool


def stored_names(reading: Reading, modules: Iterable[nn.Module]) -> frozenset[str]:
    """Returns the names that any forward of the model stores in another object: they are its own to change.

    `Names.own` is in the module alone.
    """
    return frozenset(("training",)).union(*(reading.of(cls).stored for cls in {type(m) for m in modules}))


def watched(
    modules: Iterable[tuple[str, nn.Module]], reading: Reading, stored: frozenset[str], what: Watched
) -> Iterator[tuple[str, Watcher]]:
    """Yields (path of a module, values of it or of its contents) to watch. `modules`: those that run on parts."""
    look = _Look(reading)
    wholes: dict[str, dict[str, int]] = defaultdict(dict)
    for (owner, name), value in what.wholes.items():
        wholes[owner][name] = value
    read = [(path, module, *code_of(module, reading)) for path, module in modules]
    inside = [list(below(module, (code.read | reached) - stored, reading)) for _, module, code, reached in read]
    theirs: dict[int, frozenset[str]] = defaultdict(frozenset)  # what methods store that code above calls
    for _, child, its in chain.from_iterable(inside):
        theirs[id(child)] |= its.own
    for (path, module, code, reached), modules_inside in zip(read, inside, strict=True):
        ours = stored | code.own | theirs[id(module)]
        names = (code.read | reached) - ours
        tested = names if path in what.floats else code.tested - ours
        where = f"{path}." if path else ""
        called = names & methods_of(type(module))
        yield from ((path, one) for one in look.at(module, where, Asked(names, tested, code.asked - ours, code.sets), called, wholes[path]))
        for (owner, name), value in what.originals.items():
            if owner == path and value is not module.__dict__.get(name):
                yield from (
                    (path, one) for one in _of_object(f"{where}{name}.", value, Asked(names, names, code.asked - ours, code.sets), reading)
                )
        for name, child, its in modules_inside:
            ours = stored | reading.of(type(child)).own | theirs[id(child)]
            called = names & methods_outside(type(child)) - {"forward"}
            asked, sets = (code.asked | its.asked) - ours, code.sets or its.sets
            by = Asked((names | its.read) - ours, (tested | its.tested) - ours, asked, sets)
            yield from ((path, one) for one in look.at(child, f"{where}{name}.", by, called, wholes[f"{where}{name}"]))


class _Look:
    """Finds what to watch at a module."""

    def __init__(self, reading: Reading) -> None:
        self.reading = reading
        self.seen: set[tuple[int, str]] = set()  # blocks share the functions of their class
        self.defaults: dict[tuple[type, frozenset[str], frozenset[str]], frozenset[str]] = {}
        self.classes: dict[tuple[type, frozenset[str]], list[Methods]] = {}

    def at(
        self,
        module: nn.Module,
        where: str,
        by: Asked,
        called: frozenset[str],
        wholes: Mapping[str, int],
    ) -> Iterator[Watcher]:
        """Yields the watchers of a module for code that reads such names, and runs the methods `called`."""
        cls, attributes, names, tested = type(module), module.__dict__, by.names, by.tested
        if (cls, called) not in self.classes:
            self.classes[cls, called] = list(of_classes(cls, called))
        yield from self.classes[cls, called]
        own = {n for n in _own_names(module, names) if is_plain(attributes[n], n in tested)} - {"forward"}
        guarded = {n for n in _own_names(module, names) if hasattr(inspect.getattr_static(cls, n, None), "__set__")}  # by itself (`stash`)
        own -= guarded | averaging(module)
        own |= self._defaults(cls, names, tested) - attributes.keys()
        if own:
            yield One(where, module, sorted(own), {n: wholes[n] for n in own & wholes.keys()})
        methods = called - attributes.keys() - {"forward"}  # one of the instance would hide it
        if absent := frozenset(n for n in by.asked if not hasattr(module, n)) | methods:
            yield Absent(where, module, absent, by.sets)
        if mixed := [n for n in _own_names(module, names) if n not in own | guarded and _is_mixed(attributes[n])]:
            yield Kinds(where, module, mixed)
        for name in _own_names(module, names):
            value = attributes[name]
            if isinstance(value, type) or (_holds_values(value) and name not in mixed):
                if not isinstance(value, type) and not is_log(value):
                    yield Same(where + name, module, name, value)
                yield from _of_object(f"{where}{name}.", value, by, self.reading)
        functions = [inspect.getattr_static(cls, n, None) for n in sorted(called | {"forward"})]
        for function in (*functions, *(attributes[n] for n in _own_names(module, names))):
            for said, holder, name, is_tested in kept_by(function):
                held = getattr(holder, name)
                if (id(holder), name) not in self.seen and (is_plain(held, is_tested) or isinstance(held, nn.Module)):
                    self.seen.add((id(holder), name))
                    yield Kept(where, said, holder, name)

    def _defaults(self, cls: type, names: frozenset[str], tested: frozenset[str]) -> frozenset[str]:
        key = cls, names, tested
        if key not in self.defaults:
            found = {n: inspect.getattr_static(cls, n, None) for n in names if hasattr(cls, n)}
            self.defaults[key] = frozenset(n for n, v in found.items() if is_plain(v, n in tested) and not hasattr(type(v), "__get__"))
        return self.defaults[key]


def _own_names(module: nn.Module, names: frozenset[str]) -> list[str]:
    """The names of its attributes, without those that the rewrite put there."""
    found = [n for n in module.__dict__ if n in names and n not in _TABLES and not n.startswith("_autotp")]
    return [n for n in found if not type(module.__dict__[n]).__module__.startswith(_OURS)]


def _is_mixed(value: object) -> bool:
    """True for a container of other things than plain values, and for a method of an object that is no module."""
    if isinstance(value, MethodType):
        return not is_method_of_module(value)
    if isinstance(value, (list, tuple, dict, deque)):
        return len(value) < MOST and not any(isinstance(v, nn.Module) for v in _leaves(value))
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


def _of_object(where: str, value: Any, by: Asked, reading: Reading, depth: int = 0) -> Iterator[Watcher]:
    """Yields the values in an object: those that the code reads itself, and those that the methods read that the code names."""
    names, tested, asked = by.names, by.tested, by.asked
    if isinstance(value, partial):
        names = names | {"keywords", "args"}
    elif not isinstance(value, nn.Module) and not is_log(value):
        own = reading.of_methods(type(value), (names | {"__call__"}) & methods_of(type(value)))
        names, tested, asked = names | (own.read - own.stored - own.own), tested | own.tested, asked | (own.asked - own.stored - own.own)
        yield from of_classes(type(value), names | {"__call__"})
        if absent := frozenset(_missing(value, asked, names)):
            yield Absent(where, value, absent, by.sets or own.sets)
    found = [] if isinstance(value, (nn.Module, type)) else ["__class__"]
    for name in sorted(names - {"__class__"}):
        try:
            held = getattr(value, name)
        except Exception:  # a property of the user's may raise anything
            continue
        if is_plain(held, name in tested) and getattr(held, "__self__", None) is not value:
            found.append(name)
        elif depth < _DEEPEST and name in getattr(value, "__dict__", {}) and _holds_values(held) and not isinstance(held, nn.Module):
            if not is_log(held):
                yield Same(where + name, value, name, held)
            yield from _of_object(f"{where}{name}.", held, Asked(names, tested, asked, by.sets), reading, depth + 1)
    if found:
        yield One(where, value, found)


def _missing(value: Any, asked: frozenset[str], names: frozenset[str]) -> Iterator[str]:
    """Yields the names that code asks for in vain, and those of methods that an attribute of the object would hide."""
    held = getattr(value, "__dict__", None)
    if not isinstance(held, dict):
        return
    for name in asked | names:
        if name not in held and isinstance(inspect.getattr_static(type(value), name, None), _METHODS):
            yield name
        elif name in asked:
            try:
                if not hasattr(value, name):
                    yield name
            except Exception:  # a property of the user's may raise anything
                continue
