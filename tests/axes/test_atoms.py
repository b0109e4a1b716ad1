"""The algebra of dims against a model of it: every index of a dim is a path, and joined dims have equal paths.

`paths(dim)` writes each index of a dim, in order, as the tuple of (atom, value) that it passes through. Two dims are the same
iff their paths are; a view regroups paths and a cut takes runs of them. So each operation is checked index by index.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from autotp.axes import atoms
from autotp.axes.atoms import Atom, Dim, Opaque
from autotp.planner.placements import leaf_atoms

Path = tuple[tuple[int, int], ...]
QUICK = settings(max_examples=60, deadline=None)


def paths(dim: Sequence[Atom]) -> list[Path]:
    """Every index of a dim, in order, as (leaf atom or position, value) pairs."""
    out: list[Path] = [()]
    for atom in atoms.flat(dim):
        if atom.segments is None:
            mine: list[Path] = [((atom.id, i),) for i in range(atom.size)]
        else:
            mine = [((atom.id, -k - 1), *p) for k, s in enumerate(atom.segments) for p in paths(s)]
        out = [(*a, *b) for a in out for b in mine]
    return out


def inner(path: Path) -> Path:
    """A path without the marks of which segment of a concatenation it is in."""
    return tuple(step for step in path if step[1] >= 0)


def places(dim: Sequence[Atom]) -> list[Path]:
    return [inner(p) for p in paths(dim)]


def sound(dim: Sequence[Atom]) -> None:
    """Structure multiplies and adds up, at every level."""
    for atom in atoms.flat(dim):
        assert atom.parts is None
        if atom.segments is not None:
            assert sum(atoms.dim_size(s) for s in atom.segments) == atom.size
            for segment in atom.segments:
                sound(segment)


SIZES = st.lists(st.sampled_from([2, 3, 4]), min_size=1, max_size=3)


@st.composite
def factorisations(draw: st.DrawFn) -> tuple[int, list[int], list[int]]:
    """A size and two ways to write it as a product, 1 included."""
    primes = draw(st.lists(st.sampled_from([2, 2, 3]), min_size=1, max_size=4))

    def grouped() -> list[int]:
        sizes, run = [], 1
        for p in draw(st.permutations(primes)):
            run *= p
            if draw(st.booleans()):
                sizes.append(run)
                run = 1
        return [*sizes, run]

    return prod(primes), grouped(), grouped()


@st.composite
def pieces(draw: st.DrawFn, size: int) -> list[int]:
    """Sizes of consecutive runs of `size` indices."""
    marks = sorted(draw(st.sets(st.integers(1, size - 1), max_size=3)))
    return [b - a for a, b in zip([0, *marks], [*marks, size], strict=True)]


def doubled(sizes: list[int]) -> list[int]:
    """Runs of 1 lose their name (a dim of size 1 carries nothing), so where names are compared no run is 1."""
    return [2 * n for n in sizes]


@st.composite
def dims(draw: st.DrawFn, depth: int = 2) -> Dim:
    """A dim made as rules make them: a product of leaves and concatenations."""
    out: Dim = []
    for _ in range(draw(st.integers(1, 2))):
        if depth == 0 or draw(st.booleans()):
            out += atoms.new(draw(st.sampled_from([2, 3, 4, 6])))
        else:
            out += atoms.concat([draw(dims(depth - 1)) for _ in range(draw(st.integers(2, 3)))])
    assume(atoms.dim_size(out) <= 96)
    return out


def test_new_of_one_carries_nothing() -> None:
    assert atoms.new(1) == []
    assert atoms.dim_size(atoms.new(1)) == 1
    assert atoms.dim_size(atoms.new(7)) == 7


@QUICK
@given(factorisations())
def test_split_is_a_view(case: tuple[int, list[int], list[int]]) -> None:
    size, one, _ = case
    dim = atoms.new(size)
    parts = atoms.split(dim, one)
    assert [atoms.dim_size(p) for p in parts] == one
    assert places([a for p in parts for a in p]) == places(dim)
    assert len(set(places(dim))) == size


@QUICK
@given(factorisations())
def test_two_views_of_one_dim_agree_or_are_opaque(case: tuple[int, list[int], list[int]]) -> None:
    size, one, two = case
    dim = atoms.new(size)
    atoms.split(dim, one)
    try:
        parts = atoms.split(dim, two)
    except Opaque:
        assert any(a % b and b % a for a in _prefixes(one) for b in _prefixes(two))  # the boundaries really cross
    else:
        assert [atoms.dim_size(p) for p in parts] == two
        assert places([a for p in parts for a in p]) == places(dim)
    assert atoms.dim_size(dim) == size


def _prefixes(sizes: list[int]) -> list[int]:
    return [prod(sizes[i:]) for i in range(len(sizes) + 1)]


@QUICK
@given(factorisations())
def test_joined_dims_are_flat_to_the_same_atoms(case: tuple[int, list[int], list[int]]) -> None:
    size, one, two = case
    a, b = atoms.new(size), atoms.new(size)
    atoms.split(a, one)
    atoms.split(b, two)
    try:
        atoms.join(a, b)
    except Opaque:
        assert any(x % y and y % x for x in _prefixes(one) for y in _prefixes(two))
    else:
        assert atoms.flat(a) == atoms.flat(b)
        assert places(a) == places(b)
    assert atoms.dim_size(a) == atoms.dim_size(b) == size


@QUICK
@given(st.data())
def test_cut_takes_consecutive_runs(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 12))
    minor = data.draw(st.sampled_from([1, 2, 3]))
    dim = [*atoms.new(size), *atoms.new(minor)]
    sizes = [n * minor for n in data.draw(pieces(size))]
    runs = atoms.cut(dim, sizes)
    assert [atoms.dim_size(r) for r in runs] == sizes
    assert [p for r in runs for p in places(r)] == places(dim)
    sound(dim)


@QUICK
@given(st.data())
def test_cutting_again_refines(data: st.DataObject) -> None:
    """Two cuts at different offsets see one and the same refinement; the pieces of the first keep their indices."""
    size = data.draw(st.integers(2, 12))
    dim = atoms.new(2 * size)
    first = atoms.cut(dim, doubled(data.draw(pieces(size))))
    second = atoms.cut(dim, doubled(data.draw(pieces(size))))
    assert [p for r in first for p in places(r)] == places(dim) == [p for r in second for p in places(r)]
    sound(dim)


@QUICK
@given(st.data())
def test_concatenations_join_segment_by_segment(data: st.DataObject) -> None:
    size = data.draw(st.integers(2, 12))
    one, two = doubled(data.draw(pieces(size))), doubled(data.draw(pieces(size)))
    a = atoms.concat([atoms.new(n) for n in one])
    b = atoms.concat([atoms.new(n) for n in two])
    atoms.join(a, b)
    assert atoms.flat(a) == atoms.flat(b)
    assert places(a) == places(b)
    sound(a)
    bounds = {sum(one[:i]) for i in range(1, len(one) + 1)} | {sum(two[:i]) for i in range(1, len(two) + 1)}
    (top,) = atoms.flat(a)
    if top.segments is not None:
        assert {sum(atoms.dim_size(s) for s in top.segments[:i]) for i in range(1, len(top.segments) + 1)} >= bounds


@QUICK
@given(st.data())
def test_join_of_any_two_dims(data: st.DataObject) -> None:
    """Whatever the structure, a join gives equal flat dims or says Opaque; sizes stay, and structure stays sound."""
    a, b = data.draw(dims()), data.draw(dims())
    size = atoms.dim_size(a)
    if size != atoms.dim_size(b):
        with pytest.raises(Opaque):
            atoms.join(a, b)
        return
    try:
        atoms.join(a, b)
    except Opaque:
        pass
    else:
        assert atoms.flat(a) == atoms.flat(b)
        assert places(a) == places(b)
    assert atoms.dim_size(atoms.flat(a)) == atoms.dim_size(atoms.flat(b)) == size
    sound(a)
    sound(b)


@QUICK
@given(st.data())
def test_split_of_any_dim(data: st.DataObject) -> None:
    """A view of a structured dim keeps its indices in order: paths may be renamed by joins, never reordered.

    Checked by joining a copy of the dim: whatever the split refines must hold for both.
    """
    dim = data.draw(dims())
    size = atoms.dim_size(dim)
    major = data.draw(st.sampled_from([d for d in range(1, size + 1) if size % d == 0]))
    try:
        parts = atoms.split(dim, [major, size // major])
    except Opaque:
        assert atoms.dim_size(atoms.flat(dim)) == size
        return
    assert [atoms.dim_size(p) for p in parts] == [major, size // major]
    assert places([a for p in parts for a in p]) == places(dim)
    sound(dim)


@QUICK
@given(st.data())
def test_cut_of_any_dim(data: st.DataObject) -> None:
    dim = data.draw(dims())
    sizes = data.draw(pieces(atoms.dim_size(dim)))
    try:
        runs = atoms.cut(dim, sizes)
    except Opaque:
        sound(dim)
        return
    assert [atoms.dim_size(r) for r in runs] == sizes
    # A single entry has no name, and several in one piece get one. It is none of the dim's: an operator shards its result by atoms that
    # an argument carries, so nothing is sharded by a name that begins here.
    carried = {atom.id for atom in leaf_atoms(dim)}
    for got, was in zip([p for r in runs for p in places(r)], places(dim), strict=True):
        assert got == was or (was == () and not {atom for atom, _ in got} & carried)


@QUICK
@given(st.lists(st.integers(2, 4), min_size=2, max_size=4))
def test_concat_opens_nested_ones(sizes: list[int]) -> None:
    leaves = [atoms.new(n) for n in sizes]
    nested = atoms.concat([atoms.concat(leaves[:-1]), leaves[-1]])
    assert atoms.dim_size(nested) == sum(sizes)
    (atom,) = nested
    assert atom.segments is not None
    assert [atoms.flat(s) for s in atom.segments] == leaves
    assert places(nested) == [p for leaf in leaves for p in places(leaf)]


def test_concat_of_single_indices_is_a_plain_dim() -> None:
    (atom,) = atoms.concat([atoms.new(1)] * 3)
    assert (atom.size, atom.segments) == (3, None)


def test_equal_segments_viewed_by_their_number_join() -> None:
    """`(3 × 4)` of three segments of 4: q, k and v of one width are one axis behind a factor of 3."""
    dims3 = [atoms.new(4) for _ in range(3)]
    fused = atoms.concat(dims3)
    number, width = atoms.split(fused, [3, 4])
    assert atoms.dim_size(number) == 3
    assert all(atoms.flat(d) == atoms.flat(width) for d in dims3)


def test_a_common_minor_factor_comes_out_of_a_concatenation() -> None:
    q, k = [*atoms.new(8), *atoms.new(4)], [*atoms.new(2), *atoms.new(4)]
    fused = atoms.concat([q, k])
    heads, width = atoms.split(fused, [10, 4])
    assert atoms.flat(q)[1:] == atoms.flat(k)[1:] == atoms.flat(width)
    (head,) = atoms.flat(heads)
    assert [atoms.dim_size(s) for s in head.segments or ()] == [8, 2]


def test_rotate_half_joins_its_halves() -> None:
    dim = atoms.new(8)
    left, right = atoms.cut(dim, [4, 4])
    atoms.join(dim, atoms.concat([right, left]))
    assert atoms.flat(left) == atoms.flat(right)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: atoms.join(atoms.new(6), atoms.new(4)),
        lambda: atoms.join([*atoms.new(2), *atoms.new(3)], [*atoms.new(3), *atoms.new(2)]),
        lambda: atoms.split(atoms.new(6), [4, 2]),
        lambda: atoms.split([*atoms.new(2), *atoms.new(3)], [3, 2]),
        lambda: atoms.split(atoms.concat([atoms.new(3), atoms.new(5)]), [4, 2]),
        lambda: atoms.cut(atoms.new(6), [2, 3]),
        lambda: atoms.cut([*atoms.new(2), *atoms.new(3)], [2, 4]),
        lambda: atoms.split_atom(atoms.new(6)[0], 4),
    ],
)
def test_opaque(wrong: object) -> None:
    with pytest.raises(Opaque):
        wrong()  # type: ignore[operator]


def test_a_failed_join_leaves_sizes_alone() -> None:
    a, b = [*atoms.new(2), *atoms.new(2), *atoms.new(3)], [*atoms.new(2), *atoms.new(3), *atoms.new(2)]
    with pytest.raises(Opaque):
        atoms.join(a, b)
    assert atoms.dim_size(atoms.flat(a)) == atoms.dim_size(atoms.flat(b)) == 12
    assert atoms.flat(a)[0] is atoms.flat(b)[0]  # what could be joined is
