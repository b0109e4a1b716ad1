"""In which forms a forward was called: code may take another path for a flag that is on, or for a tensor where there was none.

A form says of each argument what kind it is: absent (None), True, False, a text, a number, a tensor, or another object. Numbers count as
one kind, and so do tensors: what depends on their values is seen by other means or not at all.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import Tensor

TENSOR, NUMBER, OBJECT = "a tensor", "a number", "an object"
#: argument → the kinds that it was given as
Forms = Mapping[str, frozenset[str]]


def kind_of(value: object) -> str:
    """What counts of an argument."""
    if value is None or isinstance(value, (bool, str)):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} ({', '.join(dict.fromkeys(kind_of(v) for v in value))})"
    if isinstance(value, dict):
        return f"a dict ({', '.join(f'{k}: {kind_of(v)}' for k, v in value.items())})"
    if isinstance(value, Tensor):
        return TENSOR
    return NUMBER if isinstance(value, (int, float)) else OBJECT


@dataclass(frozen=True, slots=True)
class Signature:
    """The arguments of a forward: `names` of those that may be given by position, `kinds` of the defaults, by name.

    `texts`: the words in the code of the forward; a keyword that goes into its `**kwargs` counts if it is one of them.
    """

    names: tuple[str, ...]
    kinds: Mapping[str, str]
    texts: frozenset[str]

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
        return Signature(tuple(p.name for p in parameters if p.kind in places), kinds, frozenset(_texts(code)))

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
