"""Defines Python integers that remember where they come from.

While a model is traced, its plain int attributes and the sizes it reads from tensors are `TaggedInt`s: ints whose arithmetic
records an expression over *leaves*. Re-evaluating the expression with other leaf values tells what the code would have computed on
a shard. A tag is valid in its own trace only. A tagged int that outlives it (in a cache, in a dict) counts as a plain number in the
next one.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class AttrRef:
    """A plain attribute `path` (`num_heads`, `config.n_embd`, `sizes.0`) of the module at `module`."""

    module: str
    path: str
    value: int


@dataclass(frozen=True, slots=True)
class SizeRef:
    """The size of dim `dim` of the traced value number `value_id` (dim -1: its number of elements)."""

    value_id: int
    dim: int
    value: int


@dataclass(frozen=True, slots=True)
class Literal:
    """A number written in the code, or one whose origin was lost."""

    value: int


@dataclass(frozen=True, slots=True)
class Arith:
    """An arithmetic operation on two expressions."""

    op: str
    left: IntExpr
    right: IntExpr
    value: int


IntExpr = AttrRef | SizeRef | Literal | Arith
#: A comparison: the name of a function of `operator`, and what it compares.
Compared = tuple[str, IntExpr, IntExpr]
_OPS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


def leaves(expr: IntExpr) -> Iterator[AttrRef | SizeRef]:
    """Yields the attribute and size leaves of `expr`, literals left out."""
    if isinstance(expr, Arith):
        yield from leaves(expr.left)
        yield from leaves(expr.right)
    elif not isinstance(expr, Literal):
        yield expr


def evaluate(expr: IntExpr, value_of: Callable[[AttrRef | SizeRef], int]) -> int | None:
    """Returns the value of `expr` with each leaf replaced by `value_of(leaf)`; None where a division by zero arises."""
    if isinstance(expr, Literal):
        return expr.value
    if isinstance(expr, Arith):
        left, right = evaluate(expr.left, value_of), evaluate(expr.right, value_of)
        if left is None or right is None or (expr.op in ("//", "%") and right == 0):
            return None
        return _OPS[expr.op](left, right)
    return value_of(expr)


def show(expr: IntExpr) -> str:
    """Writes `expr` as a person would."""
    if isinstance(expr, Literal):
        return str(expr.value)
    if isinstance(expr, AttrRef):
        return f"{expr.module}.{expr.path}" if expr.module else expr.path
    if isinstance(expr, SizeRef):
        return f"size[{expr.dim}]"
    return f"({show(expr.left)} {expr.op} {show(expr.right)})"


class Life:
    """Lasts as long as the tags of one trace are valid.

    `quotients`: the last exact division in floats that gave a number, by that number. `int(width / heads)` is a plain int.
    `compared`: (operator, left, right) of each comparison in code that `watches` the name of its file.
    """

    __slots__ = ("compared", "over", "quotients", "watches")

    def __init__(self, watches: Callable[[str], bool] = lambda file: True) -> None:
        self.over, self.watches = False, watches
        self.quotients: dict[int, IntExpr] = {}
        self.compared: dict[Compared, None] = {}

    def forget(self, values: Collection[int]) -> None:
        """Forgets the comparisons of sizes of these values, which are no longer in the trace."""
        for item in list(self.compared):
            if any(isinstance(leaf, SizeRef) and leaf.value_id in values for side in item[1:] for leaf in leaves(side)):
                del self.compared[item]


class TaggedInt(int):
    """An int with the expression that produced it, in the trace that `life` belongs to."""

    expr: IntExpr
    life: Life

    def __new__(cls, value: int, expr: IntExpr, life: Life) -> TaggedInt:
        self = int.__new__(cls, value)
        self.expr, self.life = expr, life
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __truediv__(self, other: Any) -> Any:
        return _divided(self, other, self.life)

    def __rtruediv__(self, other: Any) -> Any:
        return _divided(other, self, self.life)

    def __neg__(self) -> int:
        return -int(self) if self.life.over else TaggedInt(-int(self), Arith("-", Literal(0), self.expr, -int(self)), self.life)

    def __copy__(self) -> TaggedInt:
        return self


def expr_of(value: int) -> IntExpr:
    """Returns the expression behind a Python int; a Literal for an untagged one, and for one of another trace."""
    return value.expr if isinstance(value, TaggedInt) and not value.life.over else Literal(int(value))


def origin_of(value: int, life: Life) -> IntExpr:
    """Returns the expression behind an int that code passes on. A plain one that a division gave is taken to be its result.

    Where it is another one, the expression is checked all the same: by the replay of the plan, and where the plan changes the int.
    """
    expr = expr_of(value)
    return life.quotients.get(value, expr) if isinstance(expr, Literal) and value > 1 else expr


def _divided(a: Any, b: Any, life: Life) -> Any:
    if not (isinstance(a, int) and isinstance(b, int)):
        return NotImplemented
    left, right = int(a), int(b)
    if not life.over and right and left % right == 0:
        life.quotients[left // right] = Arith("//", expr_of(a), expr_of(b), left // right)
    return left / right


def _method(symbol: str, reflected: bool) -> Callable[[TaggedInt, Any], Any]:
    compute = _OPS[symbol]

    def method(self: TaggedInt, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return NotImplemented
        a, b = (other, self) if reflected else (self, other)
        result = compute(int(a), int(b))
        life = self.life
        if life.over and isinstance(other, TaggedInt):
            life = other.life
        return result if life.over else TaggedInt(result, Arith(symbol, expr_of(a), expr_of(b), result), life)

    return method


for _symbol, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    setattr(TaggedInt, f"__{_name}__", _method(_symbol, reflected=False))
    setattr(TaggedInt, f"__r{_name}__", _method(_symbol, reflected=True))


def _comparison(name: str) -> Callable[[TaggedInt, Any], Any]:
    compute = getattr(int, f"__{name}__")

    def method(self: TaggedInt, other: Any) -> Any:
        life = self.life
        if isinstance(other, int) and not life.over and life.watches(sys._getframe(1).f_code.co_filename):
            life.compared[name, self.expr, expr_of(other)] = None
        return compute(self, other)

    return method


for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(TaggedInt, f"__{_name}__", _comparison(_name))
TaggedInt.__hash__ = int.__hash__  # type: ignore[method-assign]


class Counter(TaggedInt):
    """The number of a block among blocks alike to it, of which one runs for all.

    Every block does the same with it where code passes it on, or indexes something with it that is not the module's own (a cache).
    Module code that compares it or computes with it may do another thing in another block: it then calls `used`.
    """

    used: Callable[[], None]

    @classmethod
    def of(cls, value: int, expr: IntExpr, life: Life, used: Callable[[], None]) -> Counter:
        """Makes a counter that calls `used`."""
        self = cls(value, expr, life)
        self.used = used
        return self


def _in_module(depth: int) -> bool:
    """True where the code that runs `depth` frames above the caller has a module for its first argument, or closes over one."""
    frame = sys._getframe(depth + 1)
    while frame.f_code.co_name in ("<listcomp>", "<genexpr>", "<setcomp>", "<dictcomp>") and frame.f_back is not None:
        frame = frame.f_back
    names = (*frame.f_code.co_varnames[:1], *frame.f_code.co_freevars)
    return any(isinstance(frame.f_locals.get(name), nn.Module) for name in names)


def _watched(name: str) -> Callable[..., Any]:
    plain = getattr(TaggedInt, name)

    def method(self: Counter, *args: Any) -> Any:
        if not self.life.over and _in_module(1):
            self.used()
        return plain(self, *args)

    return method


for _name in ["eq", "ne", "lt", "le", "gt", "ge", "bool", "hash", "float", "neg", "divmod", "and", "or", "xor", "lshift", "rshift"]:
    setattr(Counter, f"__{_name}__", _watched(f"__{_name}__"))
for _name in ["add", "sub", "mul", "floordiv", "mod", "truediv", "pow"]:
    setattr(Counter, f"__{_name}__", _watched(f"__{_name}__"))
    setattr(Counter, f"__r{_name}__", _watched(f"__r{_name}__"))
