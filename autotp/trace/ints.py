"""Python integers that remember where they come from.

While a model is traced, its plain int attributes and the sizes it reads from tensors are `TaggedInt`s: ints whose arithmetic
records an expression over *leaves*. Re-evaluating the expression with other leaf values tells what the code would have
computed on a shard.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


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
_OPS: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
}


def leaves(expr: IntExpr) -> Iterator[AttrRef | SizeRef]:
    """The attribute and size leaves of `expr`, literals left out."""
    if isinstance(expr, Arith):
        yield from leaves(expr.left)
        yield from leaves(expr.right)
    elif not isinstance(expr, Literal):
        yield expr


def evaluate(expr: IntExpr, value_of: Callable[[AttrRef | SizeRef], int]) -> int | None:
    """The value of `expr` with each leaf replaced by `value_of(leaf)`; None where a division by zero arises."""
    if isinstance(expr, Literal):
        return expr.value
    if isinstance(expr, Arith):
        left, right = evaluate(expr.left, value_of), evaluate(expr.right, value_of)
        if left is None or right is None or (expr.op in ("//", "%") and right == 0):
            return None
        return _OPS[expr.op](left, right)
    return value_of(expr)


def show(expr: IntExpr) -> str:
    """`expr` as a person would write it."""
    if isinstance(expr, Literal):
        return str(expr.value)
    if isinstance(expr, AttrRef):
        return f"{expr.module}.{expr.path}" if expr.module else expr.path
    if isinstance(expr, SizeRef):
        return f"size[{expr.dim}]"
    return f"({show(expr.left)} {expr.op} {show(expr.right)})"


class TaggedInt(int):
    """An int with the expression that produced it."""

    expr: IntExpr

    def __new__(cls, value: int, expr: IntExpr) -> TaggedInt:
        self = int.__new__(cls, value)
        self.expr = expr
        return self

    def __reduce__(self) -> Any:
        return int, (int(self),)

    def __deepcopy__(self, memo: Any) -> int:
        return int(self)

    def __neg__(self) -> TaggedInt:
        return TaggedInt(-int(self), Arith("-", Literal(0), self.expr, -int(self)))

    def __copy__(self) -> TaggedInt:
        return self


def expr_of(value: int) -> IntExpr:
    """The expression behind a Python int; a Literal for an untagged one."""
    return value.expr if isinstance(value, TaggedInt) else Literal(int(value))


def _method(symbol: str, reflected: bool) -> Callable[[TaggedInt, Any], Any]:
    compute = _OPS[symbol]

    def method(self: TaggedInt, other: Any) -> Any:
        if not isinstance(other, int) or isinstance(other, bool):
            return NotImplemented
        a, b = (other, self) if reflected else (self, other)
        result = compute(int(a), int(b))
        return TaggedInt(result, Arith(symbol, expr_of(a), expr_of(b), result))

    return method


for _symbol, _name in (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod")):
    setattr(TaggedInt, f"__{_name}__", _method(_symbol, reflected=False))
    setattr(TaggedInt, f"__r{_name}__", _method(_symbol, reflected=True))
