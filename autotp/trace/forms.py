"""Describes the forms in which a forward was called: code may take another path for a flag that is on, or for a tensor where there
was none.

A form gives the kind of each argument. A flag, a text, an enumeration's member or a whole number counts by its value. A function
counts by its name and what it carries, a tensor by its number of dims and class of numbers, an object by its class and what it
holds. Floats count as one kind. So do tensors of any size, any number of tensors that are alike, and whole numbers that the traced
code had from sizes.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from enum import Enum
from functools import partial
from itertools import chain
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from autotp.plan.spec import Forms
from autotp.trace.containers import items_of
from autotp.trace.ints import SizeRef, TaggedInt, expr_of, leaves

TENSOR, NUMBER, SIZE = "a tensor", "a float", "a size"
#: Among the kinds of the arguments of code that asks for it: which of them are one tensor.
SAME = "arguments that are one tensor"
_DIMS = frozenset(("dim", "ndim", "ndimension", "shape", "size"))
_BY_VALUE = (torch.dtype, torch.device, torch.layout, torch.memory_format, complex, bytes, range, slice)
_DEEPEST = 3  # objects in objects in objects


def kind_of(value: object, sizes: bool = False, depth: int = 0) -> str:
    """Returns the kind of an argument. `sizes`: whole numbers may be sizes, and count as such. `depth`: in how many objects it is."""
    if isinstance(value, Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if isinstance(value, numpy.generic):
        value = value.item()
    if isinstance(value, int) and not isinstance(value, bool) and (sizes or _is_size(value)):
        return SIZE
    if value is None or isinstance(value, (bool, int, str, *_BY_VALUE)):
        return repr(value)
    if isinstance(value, Tensor):
        sort = "bool" if value.dtype is torch.bool else "float" if value.is_floating_point() else "complex" if value.is_complex() else "int"
        return f"{TENSOR} of {value.dim()} dims ({sort})"
    if isinstance(value, (tuple, list, deque)):
        kind = "tuple" if isinstance(value, tuple) else "list"  # a size of a tensor is one of another class while it is traced
        kinds = [kind_of(v, sizes, depth) for v in value]
        alike = bool(kinds) and len(set(kinds)) == 1 and kinds[0].startswith(TENSOR)
        return f"a {kind} of {kinds[0]}" if alike else f"a {kind} ({', '.join(kinds)})"
    if isinstance(value, (set, frozenset)):
        return f"a set ({', '.join(sorted(kind_of(v, sizes, depth) for v in value))})"
    if isinstance(value, Mapping):
        return f"a dict ({', '.join(f'{k}: {kind_of(v, sizes, depth)}' for k, v in sorted(value.items(), key=_key))})"
    if isinstance(value, float):
        return NUMBER
    if isinstance(value, type):
        return f"the class {class_name(value)}"
    if callable(value) and not isinstance(value, nn.Module):
        return f"the function {name_of(value, depth)}"
    return _object(value, sizes, depth)


def _key(item: tuple[Any, Any]) -> str:
    return str(item[0])


def _object(value: Any, sizes: bool, depth: int) -> str:
    """Describes an object by its contents. Whole numbers in one that is no dataclass count as one kind: they are mostly counters."""
    name = f"a {type(value).__name__}"
    if depth >= _DEEPEST or type(value).__module__.partition(".")[0] in ("torch", "numpy"):
        return name
    items = {**{n: getattr(value, n) for n in _slots(value)}, **getattr(value, "__dict__", {})}
    if isinstance(value, nn.Module):
        items = {n: v for n, v in items.items() if isinstance(v, (bool, str)) and n != "training"}
    counts = sizes if is_dataclass(value) else True
    found = ", ".join(f"{n}: {kind_of(v, counts, depth + 1)}" for n, v in sorted(items.items()) if not n.startswith("_autotp"))
    return f"{name} ({found})" if found else name


def _slots(value: Any) -> Iterator[str]:
    for cls in type(value).__mro__:
        slots = cls.__dict__.get("__slots__", ())
        yield from (n for n in ((slots,) if isinstance(slots, str) else slots) if n != "__dict__" and hasattr(value, n))


def _is_size(value: int) -> bool:
    return isinstance(value, TaggedInt) and any(isinstance(leaf, SizeRef) for leaf in leaves(expr_of(value)))


def name_of(function: Any, depth: int = 0) -> str:
    """Describes a function by its name, by its place where others have that name, and by what it carries."""
    if isinstance(function, partial):
        return f"{name_of(function.func, depth)} with {kind_of(function.args, depth=depth)} and {kind_of(function.keywords, depth=depth)}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    if code is not None and "<" in name:
        name = f"{name} ({code.co_filename}:{code.co_firstlineno})"
    if depth >= _DEEPEST:
        return name
    held = [kind_of(part, depth=depth + 1) for part in _parts_of(function)]
    return f"{name} with {' and '.join(held)}" if held else name


def _parts_of(function: Any) -> Iterator[Any]:
    """Yields the values that a function carries: its defaults, those it closes over, and the object that it is a method of, or
    that is called itself.
    """
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, (ModuleType, nn.Module)):
        yield owner
    inner = getattr(function, "__func__", function)
    if isinstance(inner, FunctionType):
        cells = [c for c in inner.__closure__ or () if c != CellType()]  # an empty one is equal to any other
        held = [inner.__defaults__, inner.__kwdefaults__, *(c.cell_contents for c in cells)]
        yield from (part for part in held if part is not None and part is not function and not isinstance(part, nn.Module))
    elif owner is None and getattr(function, "__dict__", None):
        yield dict(function.__dict__)


def class_name(kind: type) -> str:
    """Describes a class by its module and name: the same on every rank."""
    return f"{kind.__module__}.{kind.__qualname__}"


def of_any_dims(forms: Forms) -> Forms:
    """Returns the forms with tensors of any number of dims for those of one."""
    return frozenset(frozenset((name, any_dims(kind)) for name, kind in call) for call in forms)


def any_dims(kind: str) -> str:
    """Returns the kind of a tensor without its number of dims; another as it is."""
    return f"{TENSOR} {kind[kind.index('(') :]}" if kind.startswith(f"{TENSOR} of ") else kind


def switches(kind: str) -> bool:
    """True for kinds that switch something on: a flag that is set, a text, a function."""
    return kind == repr(True) or kind[0] in "'\"" or kind.startswith("the function")


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a forward: `names` of those that may be given by position, `kinds` of the defaults, by name.

    `rest`: the name of its `*args`, with the star, "" where it takes none; `more`: it takes `**kwargs`. `texts`: the words in its code.
    """

    names: tuple[str, ...]
    kinds: Mapping[str, str]
    rest: str = ""
    more: bool = False
    texts: frozenset[str] = frozenset()

    @staticmethod
    def of(forward: Callable[..., Any]) -> Signature:
        """Returns the signature of a bound `forward`; without any names where Python knows none."""
        try:
            parameters = list(inspect.signature(forward).parameters.values())
        except (TypeError, ValueError):
            return Signature((), {}, "*args", more=True)
        places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        kinds = {p.name: kind_of(p.default) for p in parameters if p.default is not p.empty}
        rest = next((f"*{p.name}" for p in parameters if p.kind is p.VAR_POSITIONAL), "")
        code = getattr(inspect.unwrap(forward), "__code__", None)
        more = any(p.kind is p.VAR_KEYWORD for p in parameters)
        return Signature(tuple(p.name for p in parameters if p.kind in places), kinds, rest, more, frozenset(_texts(code)))

    def kinds_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: bool = False, *, shallow: bool = False) -> dict[str, str]:
        """Returns the kind of each argument of a call, those that are left out included. `shallow`: objects by their classes alone."""
        depth = _DEEPEST if shallow else 0
        found = {**self.kinds, **{n: kind_of(v, sizes, depth) for n, v in zip(self.names, args, strict=False)}}
        if self.rest:
            found[self.rest] = kind_of(args[len(self.names) :], sizes, depth)
        found.update({n: kind_of(v, sizes, depth) for n, v in kwargs.items()})
        return found

    def same(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
        """Says which arguments of a call are one tensor."""
        names: dict[int, list[str]] = {}
        rest = ((f"{self.rest}[{i}]", value) for i, value in enumerate(args[len(self.names) :]))
        for name, value in chain(zip(self.names, args, strict=False), rest, kwargs.items()):
            for where, tensor in _tensors(name, value):
                names.setdefault(id(tensor), []).append(where)
        return "; ".join(sorted(" and ".join(sorted(each)) for each in names.values() if len(each) > 1)) or "none"

    def names_it(self, argument: str) -> bool:
        """True for an argument of its own, and for a keyword that goes into its `**kwargs` and is a word in its code."""
        return argument in self.kinds or argument in self.names or argument in self.texts


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    """Yields a tensor, or those inside of what holds some, each with where it is."""
    if isinstance(value, Tensor):
        yield name, value
    for key, item in items_of(value):
        yield from _tensors(f"{name}[{key!r}]", item)


def asks_dims(read: frozenset[str]) -> bool:
    """True for code that reads sizes or numbers of dims, if `read` are the names of the attributes that it reads."""
    return not _DIMS.isdisjoint(read)


def _texts(code: CodeType | None) -> Iterator[str]:
    for constant in code.co_consts if code is not None else ():
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (c for c in constant if isinstance(c, str))
        elif isinstance(constant, CodeType):
            yield from _texts(constant)
