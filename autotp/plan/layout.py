"""Where the elements of a parameter live.

A dim of a tensor is described by an expression of *factors*, major to minor, written in the notation of einops with `|`
for concatenation: ``(kv group d | kv d | kv d)``. A factor may be *sharded*: rank `r` of `tp` holds its `r`-th even part.
An index of the dim belongs to rank `r` iff every sharded factor it passes through is in `r`'s part; a segment of a
concatenation without a sharded factor is held by every rank (*repeated*) when another segment is sharded.

Invariants: `shard` then `unshard` is the identity; the ranks' `intervals` cover the dim, and overlap only on repeated parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from autotp.errors import InputError


@dataclass(frozen=True, slots=True)
class Factor:
    """A named leaf of a dim expression; `sharded` factors are cut evenly over the ranks."""

    name: str
    size: int
    sharded: bool = False


@dataclass(frozen=True, slots=True)
class Product:
    """Factors in major-to-minor order, as `view` would split the dim."""

    parts: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Concat:
    """Segments laid end to end, as `split` would cut the dim."""

    parts: tuple[Expr, ...]


Expr = Factor | Product | Concat
Interval = tuple[int, int]


def size(expr: Expr, tp: int = 1) -> int:
    """Number of indices of `expr` that one of `tp` ranks holds (all of them for tp 1)."""
    if isinstance(expr, Factor):
        return expr.size // tp if expr.sharded else expr.size
    sizes = [size(part, tp) for part in expr.parts]
    return prod(sizes) if isinstance(expr, Product) else sum(sizes)


def is_sharded(expr: Expr) -> bool:
    """True when some factor of `expr` is cut over the ranks."""
    if isinstance(expr, Factor):
        return expr.sharded
    return any(is_sharded(part) for part in expr.parts)


def _merge(runs: list[Interval]) -> tuple[Interval, ...]:
    merged: list[Interval] = []
    for start, stop in runs:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


@lru_cache(maxsize=4096)
def intervals(expr: Expr, rank: int, tp: int) -> tuple[Interval, ...]:
    """Half-open index runs of the full dim that `rank` of `tp` holds, in the order of its local dim."""
    if isinstance(expr, Factor):
        if not expr.sharded:
            return ((0, expr.size),)
        own = expr.size // tp
        return ((rank * own, (rank + 1) * own),)
    if isinstance(expr, Concat):
        runs: list[Interval] = []
        offset = 0
        for part in expr.parts:
            runs += [(offset + a, offset + b) for a, b in intervals(part, rank, tp)]
            offset += size(part)
        return _merge(runs)
    result: tuple[Interval, ...] = ((0, 1),)
    for part in expr.parts:
        minor, inner = size(part), intervals(part, rank, tp)
        if inner == ((0, minor),):
            result = tuple((a * minor, b * minor) for a, b in result)
        else:
            result = _merge([(i * minor + a, i * minor + b) for lo, hi in result for i in range(lo, hi) for a, b in inner])
    return result


def _whole(expr: Expr, tp: int) -> tuple[Interval, ...]:
    """Runs of the local dim whose indices pass through no sharded factor."""
    if isinstance(expr, Factor):
        return () if expr.sharded else ((0, expr.size),)
    if isinstance(expr, Concat):
        runs: list[Interval] = []
        offset = 0
        for part in expr.parts:
            runs += [(offset + a, offset + b) for a, b in _whole(part, tp)]
            offset += size(part, tp)
        return _merge(runs)
    result: tuple[Interval, ...] = ((0, 1),)
    for part in expr.parts:
        minor, inner = size(part, tp), _whole(part, tp)
        result = _merge([(i * minor + a, i * minor + b) for lo, hi in result for i in range(lo, hi) for a, b in inner])
    return result


def repeated(expr: Expr, tp: int) -> tuple[Interval, ...]:
    """Runs of the *local* dim that every rank holds although the dim is sharded (k and v rows of a fused MQA weight)."""
    return _whole(expr, tp) if is_sharded(expr) else ()


def freed(expr: Expr) -> Expr:
    """`expr` for an activation: a whole major factor (a batch, a length) may have any size, written as size 0."""
    if isinstance(expr, Product) and isinstance(expr.parts[0], Factor) and not expr.parts[0].sharded:
        return Product((Factor("n", 0), *expr.parts[1:]))
    return expr


def is_free(expr: Expr) -> bool:
    """True for an expression whose major factor may have any size; see `freed`."""
    return isinstance(expr, Product) and isinstance(expr.parts[0], Factor) and expr.parts[0].size == 0


def fitted(expr: Expr, length: int, tp: int = 1) -> Expr | None:
    """A free expression for a dim of `length` indices (one rank's part of it for tp > 1); None where it does not divide."""
    if not isinstance(expr, Product):
        return expr
    minor = prod(size(part, tp) for part in expr.parts[1:])
    if length % minor:
        return None
    return Product((Factor(getattr(expr.parts[0], "name", "n"), length // minor), *expr.parts[1:]))


def notation(expr: Expr, *, top: bool = True) -> str:
    """The einops-like text of `expr`; sharded factors carry a `*`: ``(kv* group d | kv* d | kv* d)``."""
    if isinstance(expr, Factor):
        return expr.name + ("*" if expr.sharded else "")
    if isinstance(expr, Product):
        inner = " ".join(notation(p, top=False) if not isinstance(p, Concat) else f"({notation(p, top=False)})" for p in expr.parts)
    else:
        inner = " | ".join(notation(p, top=False) for p in expr.parts)
    return f"({inner})" if top else inner


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of one parameter over `tp` ranks: `dims[i]` describes dim i of the full tensor of shape `shape`.

    At most one dim holds sharded factors.
    """

    shape: tuple[int, ...]
    dims: tuple[Expr, ...]
    tp: int

    def __post_init__(self) -> None:
        if len(self.shape) != len(self.dims) or any(size(e) != n for e, n in zip(self.dims, self.shape, strict=True)):
            raise InputError(f"layout {self} does not multiply out to shape {self.shape}")
        if sum(map(is_sharded, self.dims)) > 1:
            raise InputError(f"layout {self} shards more than one dim")
        for expr in self.dims:
            _check_divides(expr, self.tp)

    @property
    def dim(self) -> int | None:
        """The sharded dim, None for a replicated parameter."""
        return next((i for i, e in enumerate(self.dims) if is_sharded(e)), None)

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of one rank's shard (the same on every rank)."""
        return tuple(size(e, self.tp) for e in self.dims)

    @property
    def repeated(self) -> tuple[Interval, ...]:
        """Runs of the local sharded dim that every rank holds."""
        return () if self.dim is None else repeated(self.dims[self.dim], self.tp)

    def intervals(self, rank: int) -> tuple[Interval, ...]:
        """Runs of the full sharded dim held by `rank`, in local order; ((0, n),) of dim 0 when replicated."""
        dim = self.dim
        return ((0, self.shape[0] if self.shape else 1),) if dim is None else intervals(self.dims[dim], rank, self.tp)

    def shard(self, full: Tensor, rank: int) -> Tensor:
        """`rank`'s part of `full` (shape `shape` → `local_shape`): a fresh contiguous tensor, or `full` when replicated."""
        dim = self.dim
        if dim is None:
            return full
        return torch.cat([full.narrow(dim, a, b - a) for a, b in self.intervals(rank)], dim).contiguous()

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The full tensor in the model's order from all ranks' shards, in rank order."""
        dim = self.dim
        if dim is None:
            return shards[0]
        full = shards[0].new_empty(self.shape)
        for rank, local in enumerate(shards):
            offset = 0
            for a, b in self.intervals(rank):
                full.narrow(dim, a, b - a).copy_(local.narrow(dim, offset, b - a))
                offset += b - a
        return full

    def __str__(self) -> str:
        return " ".join(notation(e) for e in self.dims) or "()"


def replicated(shape: Sequence[int], tp: int) -> Layout:
    """The layout that keeps a whole copy on every rank."""
    shape = tuple(shape)
    return Layout(shape, tuple(Factor(f"n{n}", n) for n in shape), tp)


def _check_divides(expr: Expr, tp: int) -> None:
    if isinstance(expr, Factor):
        if expr.sharded and expr.size % tp:
            raise InputError(f"factor {expr.name} of size {expr.size} cannot be cut evenly over {tp} ranks")
        return
    for part in expr.parts:
        _check_divides(part, tp)
