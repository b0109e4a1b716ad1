"""In which forms a forward was called: code may take another path for a flag that is on, or for a tensor where there was none.

A form says of each argument what kind it is: a flag, a text or a whole number by its value, a function by its name, a tensor by its number
of dims, another object by its class. Floats count as one kind, and so do tensors of any size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn

TENSOR, NUMBER = "a tensor", "a float"
_DIMS = frozenset(("dim", "ndim", "ndimension", "shape", "size"))
#: argument → the kinds that it was given as
Forms = Mapping[str, frozenset[str]]


def kind_of(value: object) -> str:
    """What counts of an argument."""
    if value is None or isinstance(value, (bool, int, str)):
        return repr(value)
    if isinstance(value, Tensor):
        sort = "bool" if value.dtype is torch.bool else "float" if value.is_floating_point() else "complex" if value.is_complex() else "int"
        return f"{TENSOR} of {value.dim()} dims ({sort})"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} ({', '.join(kind_of(v) for v in value)})"
    if isinstance(value, dict):
        return f"a dict ({', '.join(f'{k}: {kind_of(v)}' for k, v in value.items())})"
    if isinstance(value, float):
        return NUMBER
    return f"the function {name_of(value)}" if callable(value) and not isinstance(value, nn.Module) else f"a {type(value).__name__}"


def name_of(function: Any) -> str:
    """A function by its name, and by its place where others have that name."""
    if isinstance(function, partial):
        return f"{name_of(function.func)} with {function.args} {function.keywords}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    code = getattr(function, "__code__", None)
    return f"{name} ({code.co_filename}:{code.co_firstlineno})" if code is not None and "<" in name else name


def class_name(kind: type) -> str:
    """A class by its module and name: the same on every rank."""
    return f"{kind.__module__}.{kind.__qualname__}"


def of_any_dims(kinds: frozenset[str]) -> frozenset[str]:
    """The kinds with tensors of any number of dims for those of one."""
    return kinds | {TENSOR} if any(kind.startswith(TENSOR) for kind in kinds) else kinds


def switches(kind: str) -> bool:
    """True for kinds that switch something on: a flag that is set, a text, a function."""
    return kind == repr(True) or kind[0] in "'\"" or kind.startswith("the function")


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a forward: `names` of those that may be given by position, `kinds` of the defaults, by name.

    `texts`: the words in the code of the forward; a keyword that goes into its `**kwargs` counts if it is one of them.
    `asks_dims`: the code reads sizes or numbers of dims.
    """

    names: tuple[str, ...]
    kinds: Mapping[str, str]
    texts: frozenset[str]
    asks_dims: bool = True

    @staticmethod
    def of(forward: Callable[..., Any]) -> Signature:
        """The signature of a bound `forward`; without any names where Python knows none."""
        try:
            parameters = list(inspect.signature(forward).parameters.values())
        except (TypeError, ValueError):
            return Signature((), {}, frozenset())
        places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        kinds = {p.name: kind_of(p.default) for p in parameters if p.default is not p.empty}
        code = getattr(inspect.unwrap(forward), "__code__", None)
        asks = code is None or not _DIMS.isdisjoint(code.co_names)
        return Signature(tuple(p.name for p in parameters if p.kind in places), kinds, frozenset(_texts(code)), asks)

    def kinds_of(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, str]:
        """The kind of each argument of a call, those that are left out included."""
        found = {**self.kinds, **{n: kind_of(v) for n, v in zip(self.names, args, strict=False)}}
        found.update({n: kind_of(v) for n, v in kwargs.items() if n in self.kinds or n in self.names or n in self.texts})
        return found


def _texts(code: CodeType | None) -> Iterator[str]:
    for constant in code.co_consts if code is not None else ():
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple):
            yield from (c for c in constant if isinstance(c, str))
        elif isinstance(constant, CodeType):
            yield from _texts(constant)
