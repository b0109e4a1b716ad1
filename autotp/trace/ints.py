"""Defines Python integers that remember where they come from.

While a model is traced, its plain int attributes and the sizes it reads from tensors are `TaggedInt`s: ints whose arithmetic
records an expression over *leaves*. Re-evaluating the expression with other leaf values tells what the code would have computed on
a shard. What arithmetic with floats makes of them are `TaggedFloat`s. A tag is valid in its own trace only. A tagged int that outlives
it (in a cache, in a dict) counts as a plain number in the next one.
"""

from __future__ import annotations

import dis
import math
import operator
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
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
    """A number written in the code, an int or a float, or one whose origin was lost."""

    value: Any


@dataclass(frozen=True, slots=True)
class Arith:
    """An arithmetic operation on two expressions; a rounding of `left` has no use for `right`. `value` is an int or a float.

    depth: how many operations stand on one another.
    """

    op: str
    left: IntExpr
    right: IntExpr
    value: Any
    depth: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        below = (part.depth for part in (self.left, self.right) if isinstance(part, Arith))
        object.__setattr__(self, "depth", 1 + max(below, default=0))


IntExpr = AttrRef | SizeRef | Literal | Arith
#: A comparison: the name of a function of `operator`, and what it compares. `FLOAT`: code makes a plain float of the first. `MADE`: code
#: makes the first, and no other number of it.
Compared = tuple[str, IntExpr, IntExpr]
FLOAT, MADE = "float", "made"
_ORDER = ("lt", "le", "gt", "ge")
_OPS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "//": operator.floordiv,
    "%": operator.mod,
    "/": operator.truediv,
    "**": operator.pow,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "int": lambda x, _: int(x),
    "floor": lambda x, _: math.floor(x),
    "ceil": lambda x, _: math.ceil(x),
    "round": lambda x, _: round(x),
    "abs": lambda x, _: abs(x),
}
#: Exponents and shifts up to here are computed: the numbers are sizes.
_FEW = 64
#: From here on arithmetic gives plain numbers, whose origin is lost: code counts in a loop, and expressions are read recursively.
_DEEPEST = 200


def leaves(expr: IntExpr) -> Iterator[AttrRef | SizeRef]:
    """Yields the attribute and size leaves of `expr`, literals left out."""
    if isinstance(expr, Arith):
        yield from leaves(expr.left)
        yield from leaves(expr.right)
    elif not isinstance(expr, Literal):
        yield expr


def parts(expr: IntExpr) -> Iterator[IntExpr]:
    """Yields `expr` and what it is made of."""
    yield expr
    if isinstance(expr, Arith):
        yield from parts(expr.left)
        yield from parts(expr.right)


def evaluate(expr: IntExpr, value_of: Callable[[AttrRef | SizeRef], int]) -> Any:
    """Returns the value of `expr`, an int or a float, with each leaf replaced by `value_of(leaf)`; None where it has none (a division by
    zero).
    """
    if isinstance(expr, Literal):
        return expr.value
    if isinstance(expr, Arith):
        left, right = evaluate(expr.left, value_of), evaluate(expr.right, value_of)
        if left is None or right is None or (expr.op in ("**", "<<") and abs(right) > _FEW):
            return None
        try:
            found = _OPS[expr.op](left, right)
        except (ArithmeticError, ValueError):  # a division by zero, a negative shift, a float that is too large
            return None
        return None if isinstance(found, complex) else found
    return value_of(expr)


def show(expr: IntExpr) -> str:
    """Writes `expr` as a person would."""
    if isinstance(expr, Literal):
        return str(expr.value)
    if isinstance(expr, AttrRef):
        return f"{expr.module}.{expr.path}" if expr.module else expr.path
    if isinstance(expr, SizeRef):
        return f"size[{expr.dim}]"
    return f"{expr.op}({show(expr.left)})" if expr.op.isalpha() else f"({show(expr.left)} {expr.op} {show(expr.right)})"


class Life:
    """Lasts as long as the tags of one trace are valid.

    `quotients`: the last exact division in floats that gave a number, by that number. `int(width / heads)` is a plain int.
    `compared`: (operator, left, right) of each comparison in code that `watches` the name of its file.
    `made`: what arithmetic made and made nothing else of.
    `chosen`: numbers without sizes that a function compared with one of sizes, as `max(1, x.shape[1] // 2)` does: it gives back either.
    """

    __slots__ = ("chosen", "compared", "made", "over", "quotients", "watches")

    def __init__(self, watches: Callable[[str], bool] = lambda file: True) -> None:
        self.over, self.watches = False, watches
        self.quotients: dict[int, IntExpr] = {}
        self.compared: dict[Compared, None] = {}
        self.chosen: set[IntExpr] = set()
        self.made: dict[int, Arith] = {}  # by id: most are made once

    def forget(self, values: Collection[int]) -> None:
        """Forgets the comparisons of sizes of these values, which are no longer in the trace, and what was made of them."""

        def gone(expr: IntExpr) -> bool:
            return any(isinstance(leaf, SizeRef) and leaf.value_id in values for leaf in leaves(expr))

        self.compared = {item: None for item in self.compared if not (gone(item[1]) or gone(item[2]))}
        self.made = {key: expr for key, expr in self.made.items() if not gone(expr)}

    def make(self, expr: Arith) -> None:
        """Notes what arithmetic makes."""
        for part in (expr.left, expr.right):
            self.made.pop(id(part), None)
        self.made[id(expr)] = expr

    def noted(self) -> tuple[Compared, ...]:
        """Returns the comparisons, and what was made of a size and of something else."""
        mixed = [e for e in self.made.values() if len(found := set(leaves(e))) > 1 and any(isinstance(leaf, SizeRef) for leaf in found)]
        return *self.compared, *((MADE, expr, Literal(0)) for expr in mixed)


class _Tagged:
    """A number with the expression that produced it, in the trace that `life` belongs to."""

    expr: IntExpr
    life: Life

    def __new__(cls, value: Any = 0, *tag: Any) -> Any:
        if len(tag) != 2:  # code makes a number of the same type, as `statistics.mean` does
            if isinstance(value, TaggedInt) and issubclass(cls, float):
                _note(value, FLOAT, 0, 2)
            return int(value, *tag) if issubclass(cls, int) else float(value, *tag)
        self: Any = super().__new__(cls, value)  # type: ignore[call-arg]
        self.expr, self.life = tag
        return self

    def __reduce__(self) -> Any:
        plain = _plain(self)
        return type(plain), (plain,)

    def __deepcopy__(self, memo: Any) -> Any:
        return _plain(self)

    def __copy__(self) -> Any:
        return self

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __neg__(self) -> Any:
        found = -_plain(self)
        return found if self.life.over else _made(found, Arith("-", Literal(0), self.expr, found), self.life)

    def __abs__(self) -> Any:
        return _rounded(self, "abs")


class TaggedInt(_Tagged, int):
    """An int that remembers where it comes from."""

    def __float__(self) -> float:
        """The plain float, as Python wants one (`float`, functions of `math`)."""
        _note(self, FLOAT, 0, 2)
        return float(int(self))


def expr_of(value: int) -> IntExpr:
    """Returns the expression behind a Python int; a Literal for an untagged one, and for one of another trace."""
    return value.expr if isinstance(value, TaggedInt) and not value.life.over else Literal(int(value))


def origin_of(value: int, life: Life) -> IntExpr:
    """Returns the expression behind an int that code passes on. A plain one that a division gave is taken to be its result.

    Where it is another one, the expression is checked all the same: by the replay of the plan, and where the plan changes the int.
    """
    expr = expr_of(value)
    return life.quotients.get(value, expr) if isinstance(expr, Literal) and value > 1 else expr


class TaggedFloat(_Tagged, float):
    """A float that arithmetic made of tagged ints."""

    def __int__(self) -> int:
        """The plain int, as Python wants one. `quotients` has its expression where sizes and attributes of modules meet in it."""
        found = float.__int__(self)
        if not self.life.over and {type(leaf) for leaf in leaves(self.expr)} == {AttrRef, SizeRef}:
            self.life.quotients.setdefault(found, Arith("int", self.expr, Literal(0), found))
        return found

    def __floor__(self) -> Any:
        return _rounded(self, "floor")

    def __ceil__(self) -> Any:
        return _rounded(self, "ceil")

    def __trunc__(self) -> Any:
        return _rounded(self, "int")

    def __round__(self, digits: Any = None) -> Any:
        return _rounded(self, "round") if digits is None else round(float(self), digits)


_BITS = (("&", "and"), ("|", "or"), ("^", "xor"), ("<<", "lshift"), (">>", "rshift"))
_NUMBERS = (("+", "add"), ("-", "sub"), ("*", "mul"), ("//", "floordiv"), ("%", "mod"), ("/", "truediv"))


def _rounded(value: _Tagged, how: str) -> Any:
    found = _OPS[how](_plain(value), 0)
    return found if value.life.over else _made(found, Arith(how, value.expr, Literal(0), found), value.life)


def _made(value: Any, expr: Arith, life: Life) -> Any:
    if expr.depth > _DEEPEST:
        return value
    life.make(expr)
    return TaggedInt(value, expr, life) if isinstance(value, int) else TaggedFloat(value, expr, life)


def _expr(value: Any) -> IntExpr:
    """Returns the expression behind a number."""
    if isinstance(value, TaggedFloat):
        return Literal(float(value)) if value.life.over else value.expr
    return expr_of(value) if isinstance(value, int) else Literal(float(value))


def _plain(value: Any) -> Any:
    return int(value) if isinstance(value, int) else float(value)


def _note(value: _Tagged, name: str, other: float, depth: int) -> None:
    """Notes what the code `depth` frames above compares."""
    frame = sys._getframe(depth)
    if value.life.over or not value.life.watches(frame.f_code.co_filename):
        return
    sides = value.expr, _expr(other)
    value.life.compared[name, *sides] = None
    if name in _ORDER and dis.opname[frame.f_code.co_code[frame.f_lasti]].startswith("CALL"):
        sized = [expr for expr in sides if any(isinstance(leaf, SizeRef) for leaf in leaves(expr))]
        if sized:
            value.life.chosen.update(set(sides).difference(sized))


def _method(symbol: str, name: str, reflected: bool) -> Callable[[Any, Any], Any]:
    compute, theirs = _OPS[symbol], f"__r{name}__"
    plain = (int,) if symbol in dict(_BITS) else (int, float)

    def method(self: _Tagged, other: Any) -> Any:
        own = isinstance(other, _Tagged) or type(other) in plain or (isinstance(self, TaggedInt) and isinstance(other, int))
        # Numbers with an operator of their own see to it (of numpy, of data); flags and members of enumerations have none.
        if not own and not (isinstance(other, plain) and getattr(type(other), theirs) in [getattr(kind, theirs) for kind in plain]):
            return NotImplemented
        a, b = (other, self) if reflected else (self, other)
        left, right = _plain(a), _plain(b)
        result = compute(left, right)
        life = self.life
        if life.over and isinstance(other, _Tagged):
            life = other.life
        if life.over or isinstance(result, complex):
            return result
        if symbol == "/" and isinstance(left, int) and isinstance(right, int) and left % right == 0:
            life.quotients[left // right] = Arith("//", _expr(a), _expr(b), left // right)
        return _made(result, Arith(symbol, _expr(a), _expr(b), result), life)

    return method


for _class, _symbols in ((TaggedInt, (*_NUMBERS, *_BITS)), (TaggedFloat, _NUMBERS)):
    for _symbol, _name in _symbols:
        setattr(_class, f"__{_name}__", _method(_symbol, _name, reflected=False))
        setattr(_class, f"__r{_name}__", _method(_symbol, _name, reflected=True))


def _read(name: str) -> Callable[[Any], Any]:
    plain = getattr(float, name)

    def method(self: TaggedFloat) -> Any:
        """What a float is made of, a plain number: also for Python's own code, as in `statistics.mean`."""
        if not self.life.over:
            self.life.compared[FLOAT, self.expr, Literal(0)] = None
        return plain(self)

    return method


for _name in ("as_integer_ratio", "is_integer"):
    setattr(TaggedFloat, _name, _read(_name))


def _power(reflected: bool) -> Callable[..., Any]:
    method = _method("**", "pow", reflected)

    def power(self: Any, other: Any, modulo: Any = None) -> Any:
        return method(self, other) if modulo is None else pow(int(self), other, modulo)

    return power


for _class in (TaggedInt, TaggedFloat):
    setattr(_class, "__pow__", _power(reflected=False))  # noqa: B010
    setattr(_class, "__rpow__", _power(reflected=True))  # noqa: B010


def _comparison(kind: type, name: str) -> Callable[[Any, Any], Any]:
    compute = getattr(kind, f"__{name}__")

    def method(self: _Tagged, other: Any) -> Any:
        if isinstance(other, (int, float)):
            _note(self, name, other, 2)
        return compute(self, other)

    return method


def _truth(self: _Tagged) -> bool:
    """The truth of a number, as code asks for it: whether it is not 0."""
    _note(self, "ne", 0, 2)
    return bool(_plain(self) != 0)


for _class, _kind in ((TaggedInt, int), (TaggedFloat, float)):
    for _name in (*_ORDER, "eq", "ne"):
        setattr(_class, f"__{_name}__", _comparison(_kind, _name))
    setattr(_class, "__bool__", _truth)  # noqa: B010
    setattr(_class, "__hash__", _kind.__hash__)  # noqa: B010
