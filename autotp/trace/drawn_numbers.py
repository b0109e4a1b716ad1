"""Numbers that code reads from data that the trace does not know: comparisons of them get both answers.

`counts.tolist()` gives plain ints, and code that goes another way for other counts (`if n == 0: continue`) would be traced for one
answer alone. A `DrawnInt` asks `Questions` instead, as a condition on a tensor does, and so does what code computes of it. Which of two
drawn numbers is larger (`max`, `sorted`) is answered as drawn. A place in a list, a `range`, an array of numpy and a text are not noticed.

What is not followed, a place in a dict and a float made of the number, is refused of drawn numbers, on which whole paths depend. Of
others (`strict` is False) it is let go.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable
from typing import Any

from autotp.trace.ints import TaggedInt
from autotp.trace.watch import Refused, is_code_of_a_model

Ask = Callable[[bool], bool]
_LOST = (
    "a number that it read from data (`tolist`, `item`), so what it does depends on data, of which the trace knows one case: compare the "
    "number itself"
)


class DrawnInt(int):
    """A whole number. `ask(usual)` answers a condition on it. `strict`: what is not followed is refused."""

    ask: Ask
    strict: bool


class DrawnFloat(float):
    """A float, as above."""

    ask: Ask
    strict: bool


Drawn = DrawnInt | DrawnFloat


def drawn(result: Any, ask: Ask, strict: bool = True) -> Any:
    """`result` (of `tolist` or `item`, of a computation) with numbers that ask."""
    if isinstance(result, list):
        return [drawn(item, ask, strict) for item in result]
    if type(result) not in (int, float):
        return result
    made: Drawn = DrawnInt(result) if type(result) is int else DrawnFloat(result)
    made.ask, made.strict = ask, strict
    return made


def holds_drawn(items: Iterable[Any]) -> bool:
    """True where a nest of lists holds such a number."""
    return any(holds_drawn(i) if isinstance(i, (list, tuple)) else isinstance(i, Drawn) for i in items)


def _plain(number: Any) -> Any:
    return int.__int__(number) if isinstance(number, DrawnInt) else float.__float__(number) if isinstance(number, DrawnFloat) else number


def _by_a_model(depth: int) -> bool:
    """True where the code of a model asks, and not torch's own or the recorder's."""
    return is_code_of_a_model(sys._getframe(depth).f_code.co_filename)


def _compared(compute: Callable[[Any, Any], bool], ordered: bool) -> Callable[[Drawn, Any], Any]:
    def method(self: Drawn, other: Any) -> Any:
        if not isinstance(other, int | float):
            return NotImplemented
        usual = compute(_plain(self), _plain(other))
        return usual if (ordered and isinstance(other, Drawn)) or not _by_a_model(2) else self.ask(usual)

    return method


def _computed(compute: Callable[[Any, Any], Any], reflected: bool) -> Callable[[Drawn, Any], Any]:
    def method(self: Drawn, other: Any) -> Any:
        if not isinstance(other, int | float) or (isinstance(self, DrawnInt) and isinstance(other, TaggedInt)):  # a size keeps its origin
            return NotImplemented
        a, b = (other, self) if reflected else (self, other)
        return drawn(compute(_plain(a), _plain(b)), self.ask, self.strict)

    return method


def _changed(compute: Callable[[Any], Any]) -> Callable[[Drawn], Any]:
    return lambda self: drawn(compute(_plain(self)), self.ask, self.strict)


def _bool(self: Drawn) -> bool:
    usual = _plain(self) != 0
    return self.ask(usual) if _by_a_model(2) else usual


def _hash(self: Drawn) -> int:
    if self.strict and _by_a_model(2):
        raise Refused(f"code looks up in a set or a dict {_LOST}")
    return hash(_plain(self))


def _float(self: DrawnInt) -> float:
    if self.strict and _by_a_model(2):
        raise Refused(f"code makes a float of {_LOST}")
    return float(_plain(self))


def _reduced(self: Drawn) -> Any:
    return type(_plain(self)), (_plain(self),)  # copies and pickles are plain numbers


def _copied(self: Drawn, memo: Any) -> Any:
    return _plain(self)


for _kind in (DrawnInt, DrawnFloat):
    for _name, _method in (("reduce", _reduced), ("deepcopy", _copied), ("bool", _bool), ("hash", _hash)):
        setattr(_kind, f"__{_name}__", _method)
    for _name in ("eq", "ne", "lt", "le", "gt", "ge"):
        setattr(_kind, f"__{_name}__", _compared(getattr(operator, _name), _name not in ("eq", "ne")))
    for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", *(("and_", "or_", "xor") if _kind is DrawnInt else ())):
        for _reflected in (False, True):
            setattr(_kind, f"__{'r' * _reflected}{_name.strip('_')}__", _computed(getattr(operator, _name), _reflected))
    for _name in ("neg", "abs"):
        setattr(_kind, f"__{_name}__", _changed(getattr(operator, _name)))
DrawnInt.__float__ = _float  # type: ignore[method-assign, assignment]
