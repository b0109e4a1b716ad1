"""Finds the cuts that requested layouts ask for, and those that they rule out.

A cut shards every parameter that carries its axis. It is requested where each of these parameters that has a requested layout would
be sharded as that layout says. It is ruled out where one would not, and free where none has one. Layouts are compared by the
elements that each rank holds, in order, not by the names of their factors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autotp.axes.atoms import Atom
from autotp.plan.expressions import Concat, Expr, factors, is_sharded, size
from autotp.plan.layout import Layout, runs
from autotp.planner.naming import Namer
from autotp.planner.partition import Partition
from autotp.planner.placements import GraphIndex
from autotp.trace.graph import Value

#: Value id of a parameter → the layout that it is to have.
Wanted = Mapping[int, Layout]


@dataclass(frozen=True, slots=True)
class Reason:
    """Why an axis is not cut. ruled_out_by: the parameters whose requested layouts rule it out, where that is why."""

    text: str
    ruled_out_by: tuple[str, ...] = ()


def claimed(cut: Partition, carriers: Mapping[Atom, list[Value]], wanted: Wanted) -> list[Value]:
    """Returns the parameters on the axis of `cut` that have a requested layout."""
    values = {v.id: v for atom in cut.atoms for v in carriers[atom]}
    return [v for v in values.values() if v.id in wanted]


def ruled_out(space: GraphIndex, cut: Partition, carriers: Mapping[Atom, list[Value]], wanted: Wanted) -> Reason | None:
    """Returns the requested layout that rules `cut` out, None where none does."""
    for value in claimed(cut, carriers, wanted):
        if not _fits(space, cut, value, wanted[value.id]):
            return Reason(f"as asked for, {value.name} is laid out as {wanted[value.id]}", (value.name,))
    return None


def granules(wanted: Wanted, length: int) -> set[int]:
    """Returns the granules that requested layouts have for factors of a size."""
    return {f.granule for layout in wanted.values() for d in layout.dims for f in factors(d) if f.sharded and f.size == length}


def _fits(space: GraphIndex, cut: Partition, value: Value, layout: Layout) -> bool:
    """True where `cut` deals its part of a parameter as `layout` does; the parts that other axes deal do not count."""
    namer = Namer({}, dict.fromkeys(cut.atoms, cut))
    for dim, theirs in zip(space.axes.dims[value.id], layout.dims, strict=True):
        on = space.atoms(dim) & cut.atoms
        if on and not all(_alike(a, b, cut.tp) for a, b in _beside(namer.expr(dim, on), theirs)):
            return False
    return True


def _alike(mine: Expr, theirs: Expr | None, tp: int) -> bool:
    return theirs is not None and all(runs(mine, rank, tp) == runs(theirs, rank, tp) for rank in range(tp))


def _beside(mine: Expr, theirs: Expr) -> Iterator[tuple[Expr, Expr | None]]:
    """Yields the segments of a dim that are cut, each with the segment at its place in the other expression."""
    if not isinstance(mine, Concat):
        yield mine, theirs
        return
    at = 0
    for part in mine.parts:
        if is_sharded(part):
            yield part, _between(theirs, at, at + size(part))
        at += size(part)


def _between(expr: Expr, start: int, stop: int) -> Expr | None:
    """The segments of `expr` from index `start` to `stop`, None where they do not begin and end there."""
    if (start, stop) == (0, size(expr)):
        return expr
    if not isinstance(expr, Concat):
        return None
    found: list[Expr] = []
    at = 0
    for part in expr.parts:
        if start <= at and at + size(part) <= stop:
            found.append(part)
        elif at < stop and start < at + size(part):
            return _between(part, start - at, stop - at) if at <= start and stop <= at + size(part) else None
        at += size(part)
    return found[0] if len(found) == 1 else Concat(tuple(found))


def by_value(params: Mapping[str, Value], layouts: Mapping[str, Layout]) -> dict[int, Layout]:
    """Returns requested layouts by value, from those by name."""
    return {v.id: layouts[n] for n, v in params.items() if n in layouts}
