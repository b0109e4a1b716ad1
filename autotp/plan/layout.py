"""A layout says which rank holds which elements of a parameter.

It describes a dim of a tensor by an expression of *factors* (`autotp.plan.expressions`): ``(kv group d | kv d | kv d)``. A factor may
be *sharded* over `tp` ranks:

- alone: rank `r` holds its `r`-th part of ``ceil(size / tp)`` indices. Where `tp` does not divide the size the last parts are
  filled up with *padding*: entries that stand for no index of the full dim.
- in pieces, together with a minor factor that is cut into as many: with 2 kv heads of 7 query heads each over 4 ranks, each
  group is cut into 2 pieces of at most 4 heads, and rank `r` holds piece `r`: kv head ``r // 2`` and the 4 or 3 heads of its
  group's piece ``r % 2``. A dim that carries the major factor alone (k and v) then has *shared* indices: several ranks, or
  several slots of one rank, hold the same one. A whole segment of a concatenation beside a sharded one is shared too.

Invariants: every rank's part has the same size; `shard` then `unshard` is the identity; the ranks' `intervals` cover the dim
and overlap only on what is shared; every index is `owned` exactly once.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import Any

import torch
from torch import Tensor

from autotp.errors import InputError
from autotp.plan.expressions import Concat, Expr, Factor, Product, is_sharded, notation, size

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Shared:
    """The indices of a dim that are held more than once, numbered in order in a buffer of `size` entries.

    `pieces`: (start in the local dim, start in the buffer, length) of what one rank holds of them.
    """

    size: int
    pieces: tuple[tuple[int, int, int], ...]


def _merge(parts: list[Interval]) -> tuple[Interval, ...]:
    merged: list[Interval] = []
    for start, stop in parts:
        if not merged or stop == start:
            merged += [(start, stop)] if stop > start else []
        elif start < 0 and merged[-1][0] < 0:
            merged[-1] = (merged[-1][0] + start, 0)
        elif start >= 0 and merged[-1][0] >= 0 and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


@lru_cache(maxsize=4096)
def runs(expr: Expr, rank: int, tp: int) -> tuple[Interval, ...]:
    """Returns the half-open runs of the full dim that `rank` of `tp` holds, in the order of its local dim.

    Runs of `n` entries of padding are written ``(-n, 0)``; lengths add up to ``size(expr, tp)``.
    """
    return _merge(list(_runs(expr, rank, tp, None)))


def _runs(expr: Expr, rank: int, tp: int, piece: int | None) -> Iterator[Interval]:
    """`piece`: the piece of its major factor's index that a minor factor is inside of."""
    if isinstance(expr, Concat):
        offset = 0
        for part in expr.parts:
            for a, b in _runs(part, rank, tp, piece):
                yield (a + offset, b + offset) if a >= 0 else (a, b)
            offset += size(part)
    elif isinstance(expr, Product):
        yield from _product(expr.parts, rank, tp, piece)
    elif not expr.sharded or tp == 1:
        yield 0, expr.size
    elif expr.of:
        yield from _slots(expr.size, size(expr, tp), (piece or 0) * size(expr, tp))
    elif expr.pieces == 1:
        own = size(expr, tp)
        yield from _slots(expr.size, own, rank * own)
    else:
        for index, _ in _cut(expr, rank, tp):
            yield (index, index + 1) if index >= 0 else (-1, 0)


def _slots(full: int, own: int, start: int) -> Iterator[Interval]:
    """`own` entries from `start` of `full` indices, the rest padding."""
    real = max(min(full - start, own), 0)
    if real:
        yield start, start + real
    if own > real:
        yield real - own, 0


def _cut(factor: Factor, rank: int, tp: int) -> Iterator[tuple[int, int]]:
    """(index, its piece) of each slot of a major factor cut in pieces; index -1 for padding."""
    own = size(factor, tp)
    for slot in range(rank * own, rank * own + own):
        index, piece = divmod(slot, factor.pieces)
        yield (index, piece) if index < factor.size else (-1, 0)


def _product(parts: Sequence[Expr], rank: int, tp: int, piece: int | None) -> Iterator[Interval]:
    if not parts:
        yield 0, 1
        return
    first, rest = parts[0], parts[1:]
    full, own = prod(map(size, rest)), prod(size(p, tp) for p in rest)
    if isinstance(first, Factor) and first.sharded and first.pieces > 1 and not first.of and tp > 1:
        for index, inside in _cut(first, rank, tp):
            if index < 0:
                yield -own, 0
                continue
            for a, b in _product(rest, rank, tp, inside):
                yield (index * full + a, index * full + b) if a >= 0 else (a, b)
        return
    inner = _merge(list(_product(rest, rank, tp, piece)))
    for lo, hi in _runs(first, rank, tp, piece):
        if lo < 0:
            yield lo * own, 0
        elif inner == ((0, full),):
            yield lo * full, hi * full
        else:
            for i in range(lo, hi):
                for a, b in inner:
                    yield (i * full + a, i * full + b) if a >= 0 else (a, b)


def intervals(expr: Expr, rank: int, tp: int) -> tuple[Interval, ...]:
    """Returns the `runs` that are not padding: `rank` reads these of the full dim."""
    return tuple(run for run in runs(expr, rank, tp) if run[0] >= 0)


def padding(expr: Expr, rank: int, tp: int) -> tuple[Interval, ...]:
    """Returns the runs of the *local* dim that are padding."""
    out, at = [], 0
    for a, b in runs(expr, rank, tp):
        if a < 0:
            out.append((at, at + b - a))
        at += b - a
    return tuple(out)


def is_padded(expr: Expr, tp: int) -> bool:
    """True when some rank's part has padding."""
    return any(padding(expr, rank, tp) for rank in range(tp))


@lru_cache(maxsize=1024)
def _holders(expr: Expr, tp: int) -> tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]:
    """(start, stop, every (rank, local start) that holds it) for runs of the full dim, in order."""
    held: list[tuple[int, int, int, int]] = []
    for rank in range(tp):
        at = 0
        for a, b in runs(expr, rank, tp):
            if a >= 0:
                held.append((a, b, rank, at))
            at += b - a
    bounds = sorted({edge for a, b, _, _ in held for edge in (a, b)})
    found: list[list[tuple[int, int]]] = [[] for _ in bounds]
    for a, b, rank, at in held:
        for i in range(bisect_left(bounds, a), bisect_left(bounds, b)):
            found[i].append((rank, at + bounds[i] - a))
    return tuple((bounds[i], bounds[i + 1], tuple(sorted(found[i]))) for i in range(len(bounds) - 1))


@lru_cache(maxsize=1024)
def owned(expr: Expr, rank: int, tp: int) -> tuple[Interval, ...]:
    """Returns the runs of `rank`'s *local* dim that are the first copy of their indices: over all ranks each index once, no padding."""
    first = [(at, at + b - a) for a, b, holders in _holders(expr, tp) for r, at in holders[:1] if r == rank]
    return _merge(sorted(first))


@lru_cache(maxsize=1024)
def owned_runs(expr: Expr, rank: int, tp: int) -> tuple[Interval, ...]:
    """Returns the `runs` of `rank` with everything that is not `owned` written as padding."""
    mine = iter(owned(expr, rank, tp))
    lo = hi = at = 0
    out: list[Interval] = []
    for a, b in runs(expr, rank, tp):
        end = at + b - a
        while at < end:
            while hi <= at:
                lo, hi = next(mine, (size(expr, tp), size(expr, tp) + 1))
            stop = min(end, lo if lo > at else hi)
            out.append((at - stop, 0) if lo > at else (b - (end - at), b - (end - stop)))
            at = stop
    return _merge(out)


@lru_cache(maxsize=1024)
def owners(expr: Expr, tp: int) -> tuple[tuple[int, int, int], ...]:
    """Returns (rank, local start, length) of the owned pieces that make the full dim, in its order."""
    out: list[tuple[int, int, int]] = []
    for a, b, holders in _holders(expr, tp):
        rank, at = holders[0]
        if out and out[-1][0] == rank and out[-1][1] + out[-1][2] == at:
            out[-1] = (rank, out[-1][1], out[-1][2] + b - a)
        else:
            out.append((rank, at, b - a))
    return tuple(out)


@lru_cache(maxsize=1024)
def shared(expr: Expr, rank: int, tp: int) -> Shared:
    """Returns the indices that are held more than once and that `rank` holds."""
    total, pieces = 0, []
    for a, b, holders in _holders(expr, tp):
        if len(holders) > 1:
            pieces += [(at, total, b - a) for r, at in holders if r == rank]
            total += b - a
    merged: list[tuple[int, int, int]] = []
    for at, buffer, length in sorted(pieces):
        if merged and merged[-1][0] + merged[-1][2] == at and merged[-1][1] + merged[-1][2] == buffer:
            merged[-1] = (merged[-1][0], merged[-1][1], merged[-1][2] + length)
        else:
            merged.append((at, buffer, length))
    return Shared(total, tuple(merged))


@dataclass(frozen=True)
class Layout:
    """Layout of one parameter over `tp` ranks: `dims[i]` describes dim i of the full tensor of shape `shape`.

    At most one dim holds sharded factors. What follows from the fields is worked out once: operators on parameters ask for it on every
    step.
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
            _check_pieces(expr, {})

    @cached_property
    def dim(self) -> int | None:
        """The sharded dim, None for a replicated parameter."""
        return next((i for i, e in enumerate(self.dims) if is_sharded(e)), None)

    @cached_property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of one rank's shard, padding included (the same on every rank)."""
        return tuple(size(e, self.tp) for e in self.dims)

    @cached_property
    def expr(self) -> Expr | None:
        """The expression of the sharded dim, None for a replicated parameter."""
        return None if self.dim is None else self.dims[self.dim]

    @cached_property
    def is_shared(self) -> bool:
        """True when some index of the sharded dim is held more than once."""
        return self.expr is not None and shared(self.expr, 0, self.tp).size > 0

    @cached_property
    def is_padded(self) -> bool:
        """True when some rank's shard has padding."""
        return self.expr is not None and is_padded(self.expr, self.tp)

    def shared(self, rank: int) -> Shared:
        """Returns the indices of the sharded dim that are held more than once and that `rank` holds."""
        return Shared(0, ()) if self.expr is None else shared(self.expr, rank, self.tp)

    def owned(self, rank: int) -> tuple[Interval, ...]:
        """Runs of `rank`'s local sharded dim that count once over all ranks; () when replicated."""
        return () if self.expr is None else owned(self.expr, rank, self.tp)

    def owned_runs(self, rank: int) -> tuple[Interval, ...]:
        """`runs` with everything that is not owned written as padding."""
        return self.runs(rank) if self.expr is None else owned_runs(self.expr, rank, self.tp)

    def padding(self, rank: int) -> tuple[Interval, ...]:
        """Runs of `rank`'s local sharded dim that are padding."""
        return () if self.expr is None else padding(self.expr, rank, self.tp)

    def intervals(self, rank: int) -> tuple[Interval, ...]:
        """Runs of the full sharded dim held by `rank`, in local order; ((0, n),) of dim 0 when replicated."""
        return ((0, self.shape[0] if self.shape else 1),) if self.expr is None else intervals(self.expr, rank, self.tp)

    def runs(self, rank: int) -> tuple[Interval, ...]:
        """`intervals` with the padding between them, written ``(-n, 0)``."""
        return self.intervals(rank) if self.expr is None else runs(self.expr, rank, self.tp)

    def shard(self, full: Tensor, rank: int) -> Tensor:
        """`rank`'s part of `full` (shape `shape` → `local_shape`): a fresh contiguous tensor, or `full` when replicated.

        Padding is zero.
        """
        dim = self.dim
        if dim is None:
            return full
        part = take(full, dim, self.runs(rank))
        if len(self.runs(rank)) == 1:  # a view, which would keep the whole tensor alive
            return part.clone(memory_format=torch.contiguous_format)
        return part.contiguous()

    def unshard(self, shards: Sequence[Tensor]) -> Tensor:
        """The full tensor in the model's order from all ranks' shards, in rank order."""
        dim = self.dim
        if dim is None:
            return shards[0]
        full = shards[0].new_empty(self.shape)
        for rank, local in enumerate(shards):
            offset = 0
            for a, b in self.runs(rank):
                if a >= 0:
                    full.narrow(dim, a, b - a).copy_(local.narrow(dim, offset, b - a))
                offset += b - a
        return full

    def __getstate__(self) -> dict[str, Any]:
        return {"shape": self.shape, "dims": self.dims, "tp": self.tp}

    def __str__(self) -> str:
        return " ".join(notation(e) for e in self.dims) or "()"


def take(full: Tensor, dim: int, parts: Sequence[Interval]) -> Tensor:
    """Returns the `runs` of a dim of `full` laid end to end, zeros for padding."""
    shape = list(full.shape)
    pieces: list[Tensor] = []
    for a, b in parts:
        shape[dim] = b - a
        pieces.append(full.narrow(dim, a, b - a) if a >= 0 else full.new_zeros(shape))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def alike(a: Layout, b: Layout) -> bool:
    """True for layouts that place every element alike, whatever their factors are called."""
    return (a.shape, a.tp, a.dim) == (b.shape, b.tp, b.dim) and all(a.runs(rank) == b.runs(rank) for rank in range(a.tp))


def replicated(shape: Sequence[int], tp: int) -> Layout:
    """Returns the layout that keeps a whole copy on every rank."""
    shape = tuple(shape)
    return Layout(shape, tuple(Factor(f"n{n}", n) for n in shape), tp)


def _check_pieces(expr: Expr, majors: dict[str, int]) -> None:
    """A minor factor cut in pieces stands inside of a major one cut into as many."""
    if isinstance(expr, Factor):
        if expr.granule < 1 or expr.size % expr.granule or (expr.granule > 1 and (expr.of or expr.pieces > 1)):
            raise InputError(f"factor {expr.name} of size {expr.size} cannot be cut into granules of {expr.granule}")
        if expr.pieces < 1 or (expr.of and majors.get(expr.of) != expr.pieces):
            raise InputError(
                f"factor {expr.name} is cut into {expr.pieces} pieces of {expr.of or 'nothing'}, which is not cut so before it"
            )
        return
    inside = dict(majors)
    for part in expr.parts:
        _check_pieces(part, inside)
        if isinstance(expr, Product) and isinstance(part, Factor) and part.sharded and not part.of:
            inside[part.name] = part.pieces
