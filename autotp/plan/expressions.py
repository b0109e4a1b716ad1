"""Describes a dim of a tensor by an expression of *factors*, major to minor.

The notation is that of einops with `|` for concatenation: ``(kv group d | kv d | kv d)``. `autotp.plan.layout` says which indices
of a dim with sharded factors each rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Factor:
    """A named leaf of a dim expression; `sharded` factors are cut over the ranks.

    pieces: into how many pieces each index of a sharded major factor is cut, or a sharded minor factor as a whole.
    granule: local parts are multiples of it (needed by operators with aligned strides, blocks of a quantization); it divides `size`.
    of: the name of the major factor that a minor one is cut with; it stands before it in the same product.
    """

    name: str
    size: int
    sharded: bool = False
    pieces: int = 1
    of: str = ""
    granule: int = 1


@dataclass(frozen=True, slots=True)
class Product:
    """Factors in major-to-minor order, as `view` would split the dim."""

    parts: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Concat:
    """Segments laid end to end, as `split` would cut the dim."""

    parts: tuple[Expr, ...]


Expr = Factor | Product | Concat


def size(expr: Expr, tp: int = 1) -> int:
    """Counts the entries of `expr` that one of `tp` ranks holds, padding included (all indices for tp 1)."""
    if isinstance(expr, Factor):
        if not expr.sharded or tp == 1:
            return expr.size
        if expr.of:
            return -(-expr.size // expr.pieces)
        return -(-expr.size * expr.pieces // (tp * expr.granule)) * expr.granule
    sizes = [size(part, tp) for part in expr.parts]
    return prod(sizes) if isinstance(expr, Product) else sum(sizes)


def factors(expr: Expr) -> Iterator[Factor]:
    """Yields the leaves of a dim expression, in order."""
    if isinstance(expr, Factor):
        yield expr
        return
    for part in expr.parts:
        yield from factors(part)


def is_sharded(expr: Expr) -> bool:
    """True when some factor of `expr` is cut over the ranks."""
    return any(factor.sharded for factor in factors(expr))


def freed(expr: Expr) -> Expr:
    """Returns `expr` for an activation: a whole major factor (a batch, a length) may have any size, written as size 0."""
    if isinstance(expr, Product) and isinstance(expr.parts[0], Factor) and not expr.parts[0].sharded:
        return Product((Factor("n", 0), *expr.parts[1:]))
    return expr


def is_free(expr: Expr) -> bool:
    """True for an expression whose major factor may have any size; see `freed`."""
    return isinstance(expr, Product) and isinstance(expr.parts[0], Factor) and expr.parts[0].size == 0


def fitted(expr: Expr, length: int, tp: int = 1) -> Expr | None:
    """Returns a free expression for a dim of `length` indices (one rank's part of it for tp > 1); None where it does not divide."""
    if not isinstance(expr, Product):
        return expr
    minor = prod(size(part, tp) for part in expr.parts[1:])
    if length % minor:
        return None
    return Product((Factor(getattr(expr.parts[0], "name", "n"), length // minor), *expr.parts[1:]))


def starred(factor: Factor) -> str:
    """Returns the name of a factor, with a `*` where it is sharded."""
    return factor.name + ("*" if factor.sharded else "")


def notation(expr: Expr, *, top: bool = True, factor: Callable[[Factor], str] = starred) -> str:
    """Returns the einops-like text of `expr`: ``(kv* group d | kv* d | kv* d)``; `factor` writes the factors."""
    if isinstance(expr, Factor):
        return factor(expr)
    parts = [notation(p, top=False, factor=factor) for p in expr.parts]
    if isinstance(expr, Product):
        inner = " ".join(f"({text})" if isinstance(p, Concat) else text for p, text in zip(expr.parts, parts, strict=True))
    else:
        inner = " | ".join(parts)
    return f"({inner})" if top else inner
