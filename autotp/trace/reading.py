"""Finds the attributes that the code of a forward reads: names in its bytecode, and in that of the methods and functions that it
calls.

A wrapper of the forward (a decorator that checkpoints the module) is not its code: it passes on.
"""

from __future__ import annotations

import dis
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, takewhile
from types import CodeType, FunctionType
from typing import Any

from torch import nn

_MOST = 300  # functions that are looked into for one class
_LOADS = frozenset(("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"))
_ASKING = frozenset(("getattr", "hasattr", "vars", "__dict__"))
_SETTING = frozenset(("setattr", "vars", "__dict__", "__setattr__"))
_STORES = frozenset(("STORE_ATTR", "DELETE_ATTR"))
_TESTS = frozenset(("COMPARE_OP", "CONTAINS_OP", "IS_OP", "UNARY_NOT", "TO_BOOL"))
NEAR = 3  # instructions after an attribute is read in which a test is one of it: `self.alpha > 0`, `if self.alpha`


IGNORED = frozenset(("CACHE", "EXTENDED_ARG", "PRECALL"))


def tests(instruction: dis.Instruction) -> bool:
    """True for an instruction that a condition is made of."""
    return instruction.opname in _TESTS or "JUMP_IF" in instruction.opname


@dataclass(frozen=True, slots=True)
class Names:
    """Holds the names of attributes in some code.

    stored: that are stored or deleted, in other objects than the module itself. own: in the module itself. asked: that need not be
    there, because it uses `getattr` and its like, or expects an AttributeError. tested: that a condition is about, as far as can be
    told. classed: whose class is asked for (`isinstance(self.norm, nn.Identity)`). computed: there may be others, as the code computes
    the name that it gives to `getattr`. sets: it may put attributes there by `setattr` and its like. identity: it asks of two variables
    whether they are one object (`q is k`).
    """

    computed: bool
    sets: bool
    identity: bool
    read: frozenset[str]
    stored: frozenset[str]
    own: frozenset[str]
    asked: frozenset[str]
    tested: frozenset[str]
    classed: frozenset[str]


def has_forward_of(cls: type[nn.Module], base: type[nn.Module]) -> bool:
    """True where a class has the forward that torch wrote for `base`, and not one that a library has put there."""
    forward: Any = cls.forward
    return forward is base.forward and (forward.__module__, forward.__qualname__) == (base.__module__, f"{base.__qualname__}.forward")


def is_container(module: nn.Module) -> bool:
    """True for lists and dicts of modules, which are not called themselves."""
    return type(module).forward is nn.Module.forward and "forward" not in module.__dict__


def is_list(module: nn.Module) -> bool:
    """True for such a one of a class of torch's or made of one, and without methods: code reaches no more than the modules in it."""
    return is_container(module) and (isinstance(module, nn.ModuleList | nn.ModuleDict) or not methods_outside(type(module)))


#: Packages whose classes nobody changes between two calls.
_OTHERS = frozenset(("torch", "builtins", "abc", "typing", "functools"))


def outside(cls: type) -> tuple[type, ...]:
    """Returns a class and its bases as far as they are not torch's or Python's."""
    return tuple(c for c in cls.__mro__ if c.__module__.partition(".")[0] not in _OTHERS)


def own_methods(cls: type) -> frozenset[str]:
    """Returns the names of the methods and properties in the body of a class."""
    return frozenset(n for n, f in vars(cls).items() if isinstance(f, FunctionType | property | staticmethod | classmethod))


def methods_outside(cls: type) -> frozenset[str]:
    """Returns the names of the methods and properties that a class has from other code than torch's or Python's."""
    return frozenset().union(*map(own_methods, outside(cls))) - {"__init__"}


class Reading:
    """Finds the names in the code of classes; each class is read once."""

    def __init__(self) -> None:
        self._known: dict[tuple[type, frozenset[str]], Names] = {}

    def of(self, cls: type[nn.Module]) -> Names:
        """Returns the names in the code of a module's forward."""
        return self.of_methods(cls, frozenset(("forward",)))

    def of_methods(self, cls: type, methods: frozenset[str]) -> Names:
        """Returns the names in the code of some methods and properties of a class; of those that it has."""
        if (cls, methods) not in self._known:
            found = (inspect.getattr_static(cls, name, None) for name in sorted(methods))
            self._known[cls, methods] = _names(cls, [_function_of(f) for f in found])
        return self._known[cls, methods]


def _function_of(found: Any) -> Any:
    """Returns the code behind an entry of a class."""
    found = getattr(found, "fget", None) or getattr(found, "__func__", found)
    return inspect.unwrap(found) if callable(found) else found


@dataclass(frozen=True, slots=True)
class _Facts:
    """Holds the names in the bytecode of one function, and of the functions inside of it.

    own: names that it stores in its first argument. called: names of globals. The others: as in `Names`.
    """

    computed: bool
    sets: bool
    identity: bool
    read: tuple[str, ...]
    stored: tuple[str, ...]
    own: tuple[str, ...]
    called: tuple[str, ...]
    asked: tuple[str, ...]
    tested: tuple[str, ...]
    classed: tuple[str, ...]


@lru_cache(maxsize=4096)  # code does not change, and that of a library's classes is read for every model of theirs
def _facts(code: CodeType) -> _Facts:
    read: list[str] = []
    stored: list[str] = []
    own: list[str] = []
    called: list[str] = []
    asked: list[str] = []
    tested: list[str] = []
    of_class: list[str] = []
    computed = sets = identity = False
    for inner in _codes(code):
        found = [i for i in dis.get_instructions(inner) if i.opname not in IGNORED]
        loads: list[str] = []
        variables: list[tuple[str, str]] = []  # what an attribute is kept in, and the attribute
        for at, i in enumerate(found):
            if i.opname in _LOADS:
                loads.append(i.argval)
                if i.argval == "__class__" and at and found[at - 1].opname in _LOADS:
                    of_class.append(found[at - 1].argval)
                if _is_tested(found, at):
                    tested.append(i.argval)
                variables += [(j.argval, i.argval) for j in found[at + 1 : at + 2] if j.opname == "STORE_FAST"]
            elif i.opname == "IS_OP":
                identity = identity or _of_variables([j.opname for j in found[max(at - 2, 0) : at]])
            elif i.opname in _STORES:
                in_self = inner is code and at and (found[at - 1].opname, found[at - 1].argval) == _self_of(code)
                (own if in_self else stored).append(i.argval)
            elif i.opname == "LOAD_GLOBAL":
                called.append(i.argval)
                computed = computed or (i.argval == "getattr" and _computes(found[at + 1 :]))
                if i.argval == "setattr" and (name := _text(_second(found[at + 1 :]))):
                    in_self = (
                        inner is code and (found[at + 1].opname, found[at + 1].argval) == _self_of(code) and not _chain(found[at + 1 :])
                    )
                    (own if in_self else stored).append(name)
                if i.argval in ("isinstance", "type"):
                    of_class += [j.argval for j in _chain(found[at + 1 :])[-1:]]
        read += loads
        asked_of = {i.argval for at, i in enumerate(found) if i.opname == "LOAD_FAST" and _is_tested(found, at)} if variables else ()
        tested += [name for variable, name in variables if variable in asked_of]
        sets = sets or not _SETTING.isdisjoint(inner.co_names)
        if not _ASKING.isdisjoint(inner.co_names):
            asked += [c for c in inner.co_consts if isinstance(c, str) and c.isidentifier()]
        if "AttributeError" in inner.co_names:
            asked += loads
    each = [tuple(dict.fromkeys(names)) for names in (read, stored, own, called, asked, tested, of_class)]
    return _Facts(computed, sets, identity, *each)


def _of_variables(before: list[str]) -> bool:
    """True where both operands of an instruction are variables: one load each, or one of two."""
    both = bool(before) and before[-1].count("LOAD_FAST") == 2
    return both or all(name.startswith("LOAD_FAST") or name == "LOAD_DEREF" for name in before)


def _is_tested(found: list[dis.Instruction], at: int) -> bool:
    """True where a condition follows on what an instruction loads."""
    return any(map(tests, found[at + 1 : at + 1 + NEAR]))


def _chain(found: list[dis.Instruction]) -> list[dis.Instruction]:
    """Returns the loads of attributes of the first argument of a call, `self.a.b`; `found`: what follows the load of its function."""
    return list(takewhile(lambda i: i.opname in _LOADS, found[1:]))


def _computes(found: list[dis.Instruction]) -> bool:
    """True where the second argument of a call is no constant, as far as can be told."""
    rest = _second(found)
    return not _text(rest) or any(i.opname in ("BUILD_STRING", "BINARY_OP") for i in rest)


def _second(found: list[dis.Instruction]) -> list[dis.Instruction]:
    """Returns what loads the arguments of a call after the first; `found`: what follows the load of its function."""
    return list(takewhile(lambda i: not i.opname.startswith("CALL"), found))[1 + len(_chain(found)) :]


def _text(found: list[dis.Instruction]) -> str:
    """Returns the text that the first of these loads; "" where it loads another thing."""
    text = found[0].argval if found and found[0].opname == "LOAD_CONST" else ""
    return text if isinstance(text, str) else ""


def _names(cls: type, todo: list[Any]) -> Names:
    read: set[str] = set()
    asked: set[str] = set()
    stored: set[str] = set()
    own: set[str] = set()
    tested: set[str] = set()
    of_class: set[str] = set()
    computed = sets = identity = False
    seen: set[CodeType] = set()
    while todo and len(seen) < _MOST:
        function = todo.pop()
        if isinstance(function, FunctionType) and function.__code__ not in seen:
            seen.add(function.__code__)
            facts = _facts(function.__code__)
            todo += _functions(function, cls, facts)
            read.update(facts.read)
            asked.update(facts.asked)
            tested.update(facts.tested)
            for found in map(_function_of, chain.from_iterable(_definitions(cls, name) for name in facts.tested)):
                if isinstance(found, FunctionType):  # a property, or a method: the condition is about what it reads
                    tested.update(_facts(found.__code__).read)
            of_class.update(facts.classed)
            computed, sets, identity = computed or facts.computed, sets or facts.sets, identity or facts.identity
            stored.update(facts.stored)
            is_method = any(function is _function_of(f) for c in cls.__mro__ for f in (vars(c).get(function.__name__),) if f is not None)
            (own if is_method else stored).update(facts.own)
    return Names(computed, sets, identity, *map(frozenset, (read | asked, stored, own, asked, tested, of_class)))


def _functions(function: FunctionType, cls: type, facts: _Facts) -> Iterator[Any]:
    """Yields the functions that `function` may call."""
    yield getattr(function, "__wrapped__", None)
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # it is empty yet
            continue
    for name in facts.read:
        for found in _definitions(cls, name):
            yield getattr(found, "fget", None) or getattr(found, "__func__", found)
    for name in facts.called:
        other = function.__globals__.get(name)
        if isinstance(other, FunctionType) and other.__module__.partition(".")[0] == cls.__module__.partition(".")[0]:
            yield other


def _definitions(cls: type, name: str) -> Iterator[Any]:
    """Yields the entries of a class and its bases under a name: a method may call that of a base."""
    for base in cls.__mro__:
        if name in vars(base):
            yield vars(base)[name]
            if base is nn.Module:
                return


def _self_of(code: CodeType) -> tuple[str, str]:
    """Tells how a method loads its first argument."""
    return "LOAD_FAST", code.co_varnames[0] if code.co_argcount else ""


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
