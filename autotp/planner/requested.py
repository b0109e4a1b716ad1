"""Finds the cuts that requested layouts ask for, and those that they rule out.

A cut shards every parameter that carries its axis. It is requested where each of these parameters that has a requested layout would
be sharded as that layout says. It is ruled out where one would not, and free where none has one. Layouts are compared by the
elements that each rank holds, in order, not by the names of their factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from autotp.axes.atoms import Atom
from autotp.plan.expressions import Concat, Expr, Factor, factors, size
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
        if on and not _alike(namer.expr(dim, on), theirs, cut.tp):
            return False
    return True


def _alike(mine: Expr, theirs: Expr, tp: int) -> bool:
    """True where both place every index of a dim alike, once `theirs` cuts nothing that `mine` leaves whole for another axis to cut."""
    dealt = _dealt(mine)
    if _ZERO in dealt:
        theirs = _within(theirs, dealt)
    return all(runs(mine, rank, tp) == runs(theirs, rank, tp) for rank in range(tp))


_ZERO, _ONE = b"\0", b"\1"


def _dealt(expr: Expr) -> bytes:
    """For each index of a dim, 1 where it lies in a sharded factor, 0 where it lies in whole ones only."""
    if isinstance(expr, Factor):
        return (_ONE if expr.sharded else _ZERO) * expr.size
    parts = [_dealt(part) for part in expr.parts]
    if isinstance(expr, Concat):
        return b"".join(parts)
    out = _ZERO
    for part in reversed(parts):
        out = b"".join(_ONE * len(out) if index else out for index in part)
    return out


def _within(expr: Expr, dealt: bytes) -> Expr:
    """Returns `expr` with those factors whole in which no index of `dealt` is 1."""
    if isinstance(expr, Factor):
        return expr if 1 in dealt else Factor(expr.name, expr.size)
    parts: list[Expr] = []
    at, inner = 0, size(expr)
    for part in expr.parts:
        n = size(part)
        if isinstance(expr, Concat):
            parts.append(_within(part, dealt[at : at + n]))
            at += n
            continue
        outer, inner = inner, inner // max(n, 1)
        places = ([dealt[i + j * inner : i + (j + 1) * inner] for i in range(0, len(dealt), outer or 1)] for j in range(n))
        parts.append(_within(part, bytes(any(1 in place for place in found) for found in places)))
    return replace(expr, parts=tuple(parts))


def by_value(params: Mapping[str, Value], layouts: Mapping[str, Layout]) -> dict[int, Layout]:
    """Returns requested layouts by value, from those by name."""
    return {v.id: layouts[n] for n, v in params.items() if n in layouts}
