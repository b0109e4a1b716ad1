"""In which forms a forward was called: code may take another path for a flag that is on, or for a tensor where there was none.

A form says of each argument what kind it is: a flag, a text, an enumeration's member or a whole number by its value, a function by its
name, a tensor by its number of dims, a dataclass by its fields, another object by its class and the flags that it holds. Floats count as
one kind, and so do tensors of any size, any number of tensors that are alike, and whole numbers that the traced code had from sizes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import partial
from types import CodeType
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from autotp.trace.ints import SizeRef, TaggedInt, expr_of, leaves

TENSOR, NUMBER, SIZE = "a tensor", "a float", "a size"
_DIMS = frozenset(("dim", "ndim", "ndimension", "shape", "size"))
_BY_VALUE = (torch.dtype, torch.device, torch.layout, torch.memory_format)
#: one call: (argument, its kind) of each
Call = frozenset[tuple[str, str]]
#: the calls of one module, without those that are alike
Forms = frozenset[Call]


def kind_of(value: object, sizes: bool = False) -> str:
    """What counts of an argument. `sizes`: whole numbers may be sizes, and count as such."""
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
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"  # a size of a tensor is one of another class while it is traced
        kinds = [kind_of(v, sizes) for v in value]
        alike = bool(kinds) and len(set(kinds)) == 1 and kinds[0].startswith(TENSOR)
        return f"a {kind} of {kinds[0]}" if alike else f"a {kind} ({', '.join(kinds)})"
    if isinstance(value, (set, frozenset)):
        return f"a set ({', '.join(sorted(kind_of(v, sizes) for v in value))})"
    if isinstance(value, dict):
        return f"a dict ({', '.join(f'{k}: {kind_of(v, sizes)}' for k, v in sorted(value.items(), key=str))})"
    if isinstance(value, float):
        return NUMBER
    if is_dataclass(value) and not isinstance(value, type):
        held = ", ".join(f"{f.name}: {kind_of(getattr(value, f.name, None), sizes)}" for f in fields(value))
        return f"a {type(value).__name__} ({held})"
    if callable(value) and not isinstance(value, nn.Module):
        return f"the function {name_of(value)}"
    flags = ", ".join(f"{n}: {kind_of(v)}" for n, v in sorted(getattr(value, "__dict__", {}).items()) if isinstance(v, (bool, str, Enum)))
    return f"a {type(value).__name__}" + (f" ({flags})" if flags and not isinstance(value, nn.Module) else "")


def _is_size(value: int) -> bool:
    return isinstance(value, TaggedInt) and any(isinstance(leaf, SizeRef) for leaf in leaves(expr_of(value)))


def name_of(function: Any) -> str:
    """A function by its name, and by its place where others have that name."""
    if isinstance(function, partial):
        return f"{name_of(function.func)} with {kind_of(function.args)} and {kind_of(function.keywords)}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None and "<" in name else name


def class_name(kind: type) -> str:
    """A class by its module and name: the same on every rank."""
    return f"{kind.__module__}.{kind.__qualname__}"


def of_any_dims(forms: Forms) -> Forms:
    """The forms with tensors of any number of dims for those of one."""
    return frozenset(frozenset((name, TENSOR if kind.startswith(TENSOR) else kind) for name, kind in call) for call in forms)


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
        """The signature of a bound `forward`; without any names where Python knows none."""
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

    def kinds_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], sizes: bool = False) -> dict[str, str]:
        """The kind of each argument of a call, those that are left out included."""
        found = {**self.kinds, **{n: kind_of(v, sizes) for n, v in zip(self.names, args, strict=False)}}
        if self.rest:
            found[self.rest] = kind_of(args[len(self.names) :], sizes)
        found.update({n: kind_of(v, sizes) for n, v in kwargs.items()})
        return found

    def names_it(self, argument: str) -> bool:
        """True for an argument of its own, and for a keyword that goes into its `**kwargs` and is a word in its code."""
        return argument in self.kinds or argument in self.names or argument in self.texts


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
