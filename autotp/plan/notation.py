"""Reads the layout notation, and writes it in full.

A tensor is its dims, apart by spaces. A dim is a factor or a pattern in parentheses: factors major to minor, `|` for concatenation:
``(kv group d | kv d | kv d) e``. A number is a factor of that size; `_` is a factor of any size. Sizes of names stand elsewhere (a
recipe's `sizes`), or behind the name. In full, a factor is

    NAME [:SIZE] [* [PIECES [/OF]]] [%GRANULE]

`*`: it is sharded; ``*2``: each index is cut into 2 pieces; ``*2/kv``: it is cut into the 2 pieces of `kv`; ``%8``: parts are
multiples of 8. `parse(spelled(dims)) == dims` for every layout. The form in tables (`layout.notation`) leaves out details that a
reader does not need.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from autotp.errors import InputError
from autotp.plan.expressions import Concat, Expr, Factor, Product, factors, size

#: The size of a factor that the text does not say.
UNKNOWN = -1
MAX_DEPTH = 50
MAX_DIGITS = 15
_FACTOR = re.compile(
    r"(?P<name>[A-Za-z_][A-Za-z0-9_]*|\d+(?:_\d+)?)(?::(?P<size>\d+))?(?P<star>\*(?:(?P<pieces>\d+)(?:/(?P<of>[A-Za-z_0-9]+))?)?)?(?:%(?P<granule>\d+))?"
)
_TOKEN = re.compile(r"\s*([()|]|[^\s()|]+)")


class NotationError(InputError):
    """A text that is no layout; `at` is the offset in it where reading stopped."""

    def __init__(self, text: str, at: int, problem: str) -> None:
        super().__init__(f"layout {text!r}: {problem} at character {at + 1}")
        self.at, self.problem = at, problem


@dataclass
class _Reader:
    text: str
    tokens: list[tuple[str, int]]
    at: int = 0
    depth: int = 0

    def peek(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def fail(self, problem: str) -> NotationError:
        return NotationError(self.text, self.tokens[self.at][1] if self.at < len(self.tokens) else len(self.text), problem)

    def term(self) -> Expr:
        token = self.peek()
        if token != "(":
            found = self._factor(token)
            self.at += 1
            return found
        self.at, self.depth = self.at + 1, self.depth + 1
        if self.depth > MAX_DEPTH:
            raise self.fail("parentheses too deep")
        parts: list[list[Expr]] = [[]]
        while self.peek() != ")":
            if not self.peek():
                raise self.fail("a parenthesis is not closed")
            if self.peek() == "|":
                if not parts[-1]:
                    raise self.fail("nothing stands before the |")
                self.at += 1
                parts.append([])
                continue
            parts[-1].append(self.term())
        self.at, self.depth = self.at + 1, self.depth - 1
        if len(parts) == 1:
            return Product(tuple(parts[0]))
        if not parts[-1]:
            parts.pop()  # "(a |)": a concatenation of one
        return Concat(tuple(p[0] if len(p) == 1 else Product(tuple(p)) for p in parts))

    def _factor(self, token: str) -> Factor:
        match = _FACTOR.fullmatch(token)
        if match is None:
            wanted = "a name, a number, ( or )" if token else "a dim"
            raise self.fail(f"got {token!r}, wanted {wanted}" if token else f"wanted {wanted}")
        if any(len(digits) > MAX_DIGITS for digits in re.findall(r"\d+", token)):
            raise self.fail("a number this large")
        name = match["name"]
        own = int(name.partition("_")[0]) if name[0].isdigit() else UNKNOWN
        if match["size"]:
            own = int(match["size"])
        pieces, granule = int(match["pieces"] or 1), int(match["granule"] or 1)
        if not pieces or not granule:
            raise self.fail("parts and granules of 0")
        return Factor(name, own, match["star"] is not None, pieces, match["of"] or "", granule)


def parse(text: str) -> tuple[Expr, ...]:
    """Returns the dims that `text` writes; factors whose size it does not say have the size `UNKNOWN`.

    Raises:
        NotationError: the text is no layout; says where.
    """
    reader = _Reader(text, [(m[1], m.start(1)) for m in _TOKEN.finditer(text)])
    dims: list[Expr] = []
    while reader.peek():
        if reader.peek() in (")", "|"):
            raise reader.fail(f"{reader.peek()} outside of parentheses")
        dims.append(reader.term())
    return () if dims == [Product(())] else tuple(dims)


def spelled(expr: Expr) -> str:
    """Writes one dim in full: `parse(spelled(expr)) == (expr,)`."""
    if isinstance(expr, Factor):
        return _spelled_factor(expr)
    if isinstance(expr, Product):
        return f"({' '.join(map(spelled, expr.parts))})"
    parts = [spelled(p)[1:-1] if isinstance(p, Product) and len(p.parts) > 1 else spelled(p) for p in expr.parts]
    return f"({' | '.join(parts)})" if len(parts) > 1 else f"({parts[0]} |)"


def _spelled_factor(factor: Factor) -> str:
    own = factor.name.partition("_")[0]
    implied = factor.size == UNKNOWN or (own.isdigit() and int(own) == factor.size and factor.size > 0)
    return factor.name + ("" if implied else f":{factor.size}") + marks(factor)


def marks(factor: Factor) -> str:
    """Returns the text behind a factor's name and size, which says how it is cut."""
    text = ""
    if factor.sharded:
        text = "*" + (f"{factor.pieces}" if factor.pieces > 1 or factor.of else "") + (f"/{factor.of}" if factor.of else "")
    return text + (f"%{factor.granule}" if factor.granule > 1 else "")


def mapped(expr: Expr, factor: Mapping[str, Factor]) -> Expr:
    """Returns `expr` with each factor replaced by the one of its name, where there is one."""
    if isinstance(expr, Factor):
        return factor.get(expr.name, expr)
    return replace(expr, parts=tuple(mapped(p, factor) for p in expr.parts))


def unknown(expr: Expr) -> Iterator[str]:
    """Yields the names of factors without a size, each once."""
    yield from dict.fromkeys(f.name for f in factors(expr) if f.size == UNKNOWN)


def sized(dims: Sequence[Expr], shape: Sequence[int], sizes: Mapping[str, int]) -> tuple[Expr, ...]:
    """Returns `dims` with the sizes of the names: from `sizes`, else the size that `shape` leaves for a name that is the only
    unknown of its dim.

    Sizes need not multiply out afterwards: `Layout` checks that.

    Raises:
        InputError: the text has another number of dims than `shape`, or names whose sizes neither source tells.
    """
    if len(dims) != len(shape):
        raise InputError(f"{len(dims)} dims are written, the shape {list(shape)} has {len(shape)}")
    found = dict(sizes)
    out = [mapped(d, _with(d, found)) for d in dims]
    for _ in out:
        for at, expr in enumerate(out):
            names = list(unknown(expr))
            if len(names) == 1:
                found[names[0]] = _solve(expr, names[0], shape[at])
        out = [mapped(d, _with(d, found)) for d in out]
    left = [name for expr in out for name in unknown(expr)]
    if left:
        raise InputError(f"the sizes of {', '.join(dict.fromkeys(left))} are not known")
    return tuple(out)


def _with(expr: Expr, sizes: Mapping[str, int]) -> dict[str, Factor]:
    return {f.name: replace(f, size=sizes[f.name]) for f in factors(expr) if f.size == UNKNOWN and f.name in sizes}


def _solve(expr: Expr, name: str, length: int) -> int:
    """The largest size of `name` with which `expr` has at most `length` entries; at least 1, but for an empty dim."""
    low, high = min(length, 1), length
    while low < high:
        middle = (low + high + 1) // 2
        if size(mapped(expr, _with(expr, {name: middle}))) <= length:
            low = middle
        else:
            high = middle - 1
    return low
