"""The algebra of dims: which dims of which tensors must be sharded together.

A dim is a list of *atoms*, major to minor; its size is the product of theirs. Atoms are joined by union-find. An atom gets a
structure once something looks inside it: a *product* of atoms (a `view` split it) or a *concatenation* of dims (a `split`,
`slice` or `cat` cut it). Structure lives on the class, so refining one atom refines it everywhere at once.

Every function either succeeds or raises `Opaque` and says why; a failed join leaves a correct, if less joined, state behind:
the caller marks the dims opaque where it happened.

Invariant: joined dims have equal sizes and, after `flat`, the same atoms in the same order.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import count

_ids = count()


class Opaque(Exception):
    """Two dims cannot be described in common terms."""


class Atom:
    """A class of dims or parts of dims; mutable only through this module. `parts` (product) and `segments` exclude each other."""

    __slots__ = ("id", "parent", "parts", "segments", "size")

    def __init__(self, size: int) -> None:
        self.id = next(_ids)
        self.size = size
        self.parent: Atom | None = None
        self.parts: list[Atom] | None = None
        self.segments: list[Dim] | None = None

    def __hash__(self) -> int:
        return self.id  # sets of atoms have the same order in every process

    def __eq__(self, other: object) -> bool:
        return self is other

    def __repr__(self) -> str:
        return f"a{self.id}:{self.size}"


Dim = list[Atom]


def new(size: int) -> Dim:
    """Makes a fresh dim; size 1 carries nothing."""
    return [] if size == 1 else [Atom(size)]


def find(atom: Atom) -> Atom:
    """Returns the representative of an atom's class."""
    while atom.parent is not None:
        if atom.parent.parent is not None:
            atom.parent = atom.parent.parent
        atom = atom.parent
    return atom


def flat(dim: Sequence[Atom]) -> Dim:
    """Returns the dim as representatives without product structure."""
    out: Dim = []
    for atom in dim:
        root = find(atom)
        if root.parts is None:
            out.append(root)
        else:
            out += flat(root.parts)
    return out


def leaf_atoms(dim: Sequence[Atom]) -> Iterator[Atom]:
    """Yields the leaf atoms of a dim, in order."""
    for atom in flat(dim):
        if atom.segments is None:
            yield atom
        else:
            for segment in atom.segments:
                yield from leaf_atoms(segment)


def axes_in(dim: Sequence[Atom]) -> Iterator[Atom]:
    """Yields the leaf atoms of a dim, in order, and as one each that was cut up into single rows."""
    for atom in flat(dim):
        if atom.segments is None:
            yield atom
        elif inside := [a for segment in atom.segments for a in axes_in(segment)]:
            yield from inside
        else:
            yield atom


def dim_size(dim: Sequence[Atom]) -> int:
    """Returns the number of indices of a dim."""
    size = 1
    for atom in dim:
        size *= atom.size
    return size


def join(left: Sequence[Atom], right: Sequence[Atom]) -> None:
    """Make two dims of equal size the same."""
    if dim_size(left) != dim_size(right):
        raise Opaque(f"sizes {dim_size(left)} and {dim_size(right)} differ")
    a, b = flat(left)[::-1], flat(right)[::-1]
    while a and b:
        x, y = find(a.pop()), find(b.pop())
        if x.parts is not None:
            a += flat(x.parts)[::-1]
            b.append(y)
        elif y.parts is not None:
            b += flat(y.parts)[::-1]
            a.append(x)
        elif x is y:
            continue
        elif x.size == y.size:
            _join_atoms(x, y)
        elif x.size > y.size:
            split_atom(x, y.size)
            a += flat([x])[::-1]
            b.append(y)
        else:
            split_atom(y, x.size)
            b += flat([y])[::-1]
            a.append(x)


def _join_atoms(x: Atom, y: Atom) -> None:
    if x.segments is None:
        x.parent = y
    elif y.segments is None:
        y.parent = x
    else:
        bounds = sorted({*_bounds(x.segments), *_bounds(y.segments)})
        _refine(x, bounds)
        _refine(y, bounds)
        pairs = list(zip(x.segments, y.segments, strict=True))
        x.parent = y
        for a, b in pairs:
            join(a, b)


def _bounds(segments: Sequence[Dim]) -> list[int]:
    out, at = [], 0
    for segment in segments:
        at += dim_size(segment)
        out.append(at)
    return out


def split_atom(atom: Atom, major: int) -> None:
    """Give `atom` the structure `major × (size / major)`."""
    atom = find(atom)
    if major in (1, atom.size):
        return
    if atom.size % major:
        raise Opaque(f"{major} does not divide {atom.size}")
    minor = atom.size // major
    if atom.segments is None:
        atom.parts = [Atom(major), Atom(minor)]
        return
    sizes = [dim_size(s) for s in atom.segments]
    if all(n % minor == 0 for n in sizes):
        halves = [split(s, [n // minor, minor]) for s, n in zip(atom.segments, sizes, strict=True)]
        for half in halves[1:]:
            join(halves[0][1], half[1])
        head = concat([half[0] for half in halves])
        atom.parts, atom.segments = [*head, *halves[0][1]], None
        return
    number = len(sizes)
    if len(set(sizes)) == 1 and (major % number == 0 or number % major == 0):
        segments = atom.segments
        for other in segments[1:]:
            join(segments[0], other)
        if major % number == 0:
            inner = split(segments[0], [major // number, minor])
            atom.parts, atom.segments = [*new(number), *inner[0], *inner[1]], None
        else:
            atom.parts, atom.segments = [*new(major), *concat(segments[: number // major])], None
        return
    raise Opaque(f"a concatenation of {sizes} cannot be split into {major} × {minor}")


def split(dim: Sequence[Atom], sizes: Sequence[int]) -> list[Dim]:
    """Returns the dims that a `view` of `dim` to `sizes` (major to minor) makes."""
    rest = flat(dim)[::-1]
    out: list[Dim] = []
    for size in sizes:
        part: Dim = []
        need = size
        while need > 1:
            if not rest:
                raise Opaque(f"{dim_size(dim)} indices cannot be viewed as {list(sizes)}")
            atom = find(rest.pop())
            if atom.parts is not None:
                rest += flat([atom])[::-1]
            elif need % atom.size == 0:
                part.append(atom)
                need //= atom.size
            elif atom.size % need == 0:
                split_atom(atom, need)
                rest += flat([atom])[::-1]
            else:
                raise Opaque(f"a factor of {atom.size} straddles the view's {need}")
        out.append(part)
    return out


def cut(dim: Sequence[Atom], sizes: Sequence[int]) -> list[Dim]:
    """Returns the dims of consecutive pieces of `dim`."""
    sizes = list(sizes)
    if sum(sizes) != dim_size(dim):
        raise Opaque(f"pieces {sizes} do not add up to {dim_size(dim)}")
    if len(sizes) == 1:
        return [list(dim)]
    if any(n == 0 for n in sizes):
        filled = iter(cut(dim, [n for n in sizes if n]))
        return [next(filled) if n else [Atom(0)] for n in sizes]
    atoms = flat(dim)
    if not atoms:
        raise Opaque("a dim of size 1 cannot be cut")
    major, minor = find(atoms[0]), atoms[1:]
    unit = dim_size(minor)
    bounds = []
    at = 0
    for n in sizes:
        at += n
        bounds.append(at)
    if any(b % unit for b in bounds):
        raise Opaque(f"cut at {next(b for b in bounds if b % unit)} is inside a factor of {unit}")
    wanted = [b // unit for b in bounds]
    if major.segments is None:
        edges = [0, *wanted]
        major.segments = [new(b - a) for a, b in zip(edges, wanted, strict=False)]
    else:
        _refine(major, sorted({*_bounds(major.segments), *wanted}))
    assert major.segments is not None
    pieces: list[Dim] = []
    ends = _bounds(major.segments)
    start = 0
    for stop in wanted:
        inside = major.segments[bisect_right(ends, start) : bisect_right(ends, stop)]
        pieces.append([*concat(inside), *minor])
        start = stop
    return pieces


def _refine(atom: Atom, bounds: Sequence[int]) -> None:
    """Cut the segments of `atom` at `bounds`, which are in order."""
    assert atom.segments is not None
    if list(bounds) == _bounds(atom.segments):
        return
    out: list[Dim] = []
    start = 0
    for segment in atom.segments:
        stop = start + dim_size(segment)
        inner = [b - start for b in bounds[bisect_right(bounds, start) : bisect_right(bounds, stop)]]
        edges = [0, *inner]
        out += [list(segment)] if len(inner) == 1 else cut(segment, [b - a for a, b in zip(edges, inner, strict=False)])
        start = stop
    atom.segments = out


def concat(dims: Sequence[Dim]) -> Dim:
    """Returns the dim of tensors laid end to end; nested concatenations are opened."""
    dims = [d for d in dims if dim_size(d)]
    if len(dims) == 1:
        return list(dims[0])
    segments: list[Dim] = []
    for dim in dims:
        atoms = flat(dim)
        if len(atoms) == 1 and atoms[0].segments is not None:
            segments += atoms[0].segments
        else:
            segments.append(list(dim))
    total = sum(dim_size(s) for s in segments)
    if total == len(segments):
        return new(total)
    atom = Atom(total)
    atom.segments = segments
    return [atom]
