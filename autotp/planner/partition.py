"""Deals an axis over the ranks: which atoms are cut, and how many of their indices a rank holds.

A cut of one atom gives every rank ``ceil(size / tp)`` of its indices, the last ones filled up with padding. A cut of two
neighbouring atoms, major and minor (kv heads and the query heads of each), cuts every group of the minor into `pieces` and deals
the pieces. Each rank then holds ``ceil(major · pieces / tp)`` slots of the major atom and ``ceil(minor / pieces)`` of the minor one
in each slot. A tensor that carries the major atom alone (k and v) is then held by as many slots as need it. With as many pieces as
the minor atom has indices, no rank does more than the next multiple of major · minor costs; fewer pieces repeat less of k and v.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import product

from autotp.axes.atoms import Atom, flat

Atoms = frozenset[Atom]


@dataclass(frozen=True, slots=True)
class Partition:
    """Deals one axis over `tp` ranks; without `minor`, `pieces` is 1. A rank's part of a single atom is a multiple of `granule`."""

    major: Atom
    tp: int
    minor: Atom | None = None
    pieces: int = 1
    granule: int = 1

    @property
    def atoms(self) -> Atoms:
        """Returns the atoms that are cut together."""
        return frozenset({self.major} if self.minor is None else {self.major, self.minor})

    @property
    def size(self) -> int:
        """Returns the number of indices of the axis."""
        return self.major.size * (1 if self.minor is None else self.minor.size)

    @property
    def slots(self) -> int:
        """Counts the indices of the major atom that a rank holds."""
        return -(-self.major.size * self.pieces // (self.tp * self.granule)) * self.granule

    @property
    def local_size(self) -> int:
        """Counts the entries of the axis that a rank holds, padding included."""
        return self.slots * (1 if self.minor is None else self.local(self.minor))

    @property
    def padded(self) -> bool:
        """True when some rank holds padding."""
        return self.local_size * self.tp != self.size

    def local(self, atom: Atom) -> int:
        """Counts the indices of one of its atoms that a rank holds."""
        return self.slots if atom is self.major else -(-atom.size // self.pieces)


Partitions = Mapping[Atom, Partition]


def local_size(dim: Iterable[Atom], on: Atoms, cuts: Partitions) -> int:
    """Returns the size of a dim on one rank, sharded on the atoms of `on`."""
    size = 1
    for atom in flat(list(dim)):
        if atom.segments is None:
            size *= cuts[atom].local(atom) if atom in on else atom.size
        else:
            size *= sum(local_size(s, on, cuts) for s in atom.segments)
    return size


def covers(dim: Iterable[Atom], on: Atoms, cuts: Partitions) -> bool:
    """True when every index of a dim is held exactly once over all ranks: a sum over it then adds each index once."""
    atoms = flat(list(dim))
    for atom in atoms:
        if atom.segments is None:
            if atom in on and atom is cuts[atom].major and (cuts[atom].pieces == 1 or cuts[atom].minor in atoms):
                return True
        elif all(covers(s, on, cuts) for s in atom.segments):
            return True
    return False


def uncovered(dim: Iterable[Atom], on: Atoms, cuts: Partitions) -> Iterable[tuple[Atom, ...]]:
    """Yields the segments of a dim that have no sharded atom, beside segments that do."""
    for atom in flat(list(dim)):
        for segment in atom.segments or ():
            if not covers(segment, on, cuts):
                yield tuple(segment)


def _paths(dim: Iterable[Atom], on: Atoms, cuts: Partitions) -> set[frozenset[Partition]]:
    """For each kind of index path through a dim, the cuts that it meets."""
    found: set[frozenset[Partition]] = {frozenset()}
    for atom in flat(list(dim)):
        if atom.segments is None:
            if atom in on:
                found = {path | {cuts[atom]} for path in found}
        else:
            inside = set().union(*(_paths(s, on, cuts) for s in atom.segments))
            found = {a | b for a, b in product(found, inside)}
    return found


def meets_two(dims: Iterable[Iterable[Atom]], on: Atoms, cuts: Partitions) -> bool:
    """True when some element of a tensor passes through two cuts."""
    found: set[frozenset[Partition]] = {frozenset()}
    for dim in dims:
        found = {a | b for a, b in product(found, _paths(dim, on, cuts))}
    return any(len(path) > 1 for path in found)


def in_order(dim: Iterable[Atom], on: Atoms, cuts: Partitions) -> bool:
    """True when each minor atom of `on` stands behind its major one in a dim, as a layout can say it."""

    def check(part: Iterable[Atom], majors: Atoms) -> bool:
        for atom in flat(list(part)):
            if atom.segments is not None:
                if not all(check(s, majors) for s in atom.segments):
                    return False
            elif atom in on and atom is not cuts[atom].major:
                if cuts[atom].major not in majors:
                    return False
            elif atom in on:
                majors |= {atom}
        return True

    return check(dim, frozenset())


def neighbours(dim: Iterable[Atom]) -> Iterable[tuple[Atom, Atom]]:
    """Yields pairs of leaf atoms that stand behind each other in a dim."""
    before: Atom | None = None
    for atom in flat(list(dim)):
        if atom.segments is not None:
            for segment in atom.segments:
                yield from neighbours(segment)
            before = None
            continue
        if before is not None:
            yield before, atom
        before = atom


def last_atoms(dim: Iterable[Atom]) -> Iterable[Atom]:
    """Yields the leaf atoms that stand last on some index path through a dim: a part of them changes the dim's size in their units."""
    atoms = flat(list(dim))
    if atoms and atoms[-1].segments is None:
        yield atoms[-1]
    elif atoms:
        for segment in atoms[-1].segments or ():
            yield from last_atoms(segment)
