"""Layouts: reversible, of equal parts, every index owned once; padding and shared indices as the module says."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotp.errors import InputError
from autotp.plan.expressions import Concat, Expr, Factor, Product, notation, size
from autotp.plan.layout import Layout, intervals, owned, owners, replicated, runs, shared
from autotp.testing.strategies import layouts

QUICK = settings(max_examples=80, deadline=None)
TPS = st.sampled_from([1, 2, 3, 4])


def filled(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(prod(shape)).reshape(shape)


def held(expr: Expr, at: int, rank: int, tp: int, piece: int = 0) -> int | None:
    """The full index that entry `at` of the local dim stands for, None for padding: the module's docstring, for one entry."""
    if isinstance(expr, Factor):
        if expr.sharded and tp > 1:
            slot = at + (piece if expr.of else rank) * size(expr, tp)
            at = slot if expr.of else slot // expr.pieces
        return at if at < expr.size else None
    if isinstance(expr, Concat):
        before = 0
        for part in expr.parts:
            if at < size(part, tp):
                inside = held(part, at, rank, tp, piece)
                return None if inside is None else before + inside
            at, before = at - size(part, tp), before + size(part)
        raise AssertionError("the entry is outside")
    index = 0
    for i, part in enumerate(expr.parts):
        here, at = divmod(at, prod(size(p, tp) for p in expr.parts[i + 1 :]))
        inside = held(part, here, rank, tp, piece)
        if isinstance(part, Factor) and part.sharded and part.pieces > 1 and not part.of:
            piece = (here + rank * size(part, tp)) % part.pieces
        if inside is None:
            return None
        index = index * size(part) + inside
    return index


def indices(parts: Iterable[tuple[int, int]]) -> list[int | None]:
    """Runs, or intervals, one by one."""
    return [i if a >= 0 else None for a, b in parts for i in range(a, b)]


@QUICK
@given(layouts())
def test_shard_then_unshard_is_the_identity(layout: Layout) -> None:
    full = filled(layout.shape)
    shards = [layout.shard(full, r) for r in range(layout.tp)]
    assert all(tuple(s.shape) == layout.local_shape for s in shards)
    assert layout.dim is None or all(s.untyped_storage().data_ptr() != full.untyped_storage().data_ptr() for s in shards)
    assert torch.equal(layout.unshard(shards), full)


@QUICK
@given(layouts())
def test_each_rank_holds_what_the_expression_says(layout: Layout) -> None:
    if layout.dim is None:
        assert all(layout.shard(filled(layout.shape), r).shape == layout.shape for r in range(layout.tp))
        return
    expr = layout.dims[layout.dim]
    for rank in range(layout.tp):
        wanted = [held(expr, i, rank, layout.tp) for i in range(layout.local_shape[layout.dim])]
        assert indices(layout.runs(rank)) == wanted
        assert indices(layout.intervals(rank)) == [i for i in wanted if i is not None]
        assert indices(layout.padding(rank)) == [i for i, full in enumerate(wanted) if full is None]
        assert all(a < b for a, b in (*layout.runs(rank), *layout.intervals(rank), *layout.padding(rank)))
        one = Layout((layout.shape[layout.dim],), (expr,), layout.tp).shard(torch.arange(1, 1 + layout.shape[layout.dim]), rank)
        assert one.tolist() == [0 if i is None else 1 + i for i in wanted]


@QUICK
@given(layouts())
def test_every_index_has_one_owner(layout: Layout) -> None:
    if layout.dim is None:
        return
    expr, n, tp = layout.dims[layout.dim], layout.shape[layout.dim], layout.tp
    copies = [[i for i in indices(layout.runs(r)) if i is not None] for r in range(tp)]
    owners_of: list[int] = []
    for rank in range(tp):
        runs, mine = indices(layout.runs(rank)), indices(layout.owned(rank))
        assert None not in [runs[i] for i in mine if i is not None]
        owners_of += [index for i in mine if i is not None and (index := runs[i]) is not None]
        assert indices(layout.owned_runs(rank)) == [index if i in mine else None for i, index in enumerate(runs)]
    assert sorted(owners_of) == list(range(n))
    joined = [indices(layout.runs(rank))[i] for rank, at, length in owners(expr, tp) for i in range(at, at + length)]
    assert joined == list(range(n))
    assert layout.is_padded == any(len(c) < layout.local_shape[layout.dim] for c in copies)
    assert layout.is_shared == (sum(map(len, copies)) > n)


@QUICK
@given(layouts())
def test_sums_over_the_copies_of_shared_indices(layout: Layout) -> None:
    """What the run time does with a gradient: into the buffer, summed, back into each copy."""
    if layout.dim is None:
        return
    tp, local = layout.tp, layout.local_shape[layout.dim]
    grads = [torch.randint(1, 100, (local,)) for _ in range(tp)]
    total = torch.zeros(layout.shape[layout.dim], dtype=torch.long)
    for rank, grad in enumerate(grads):
        for i, index in enumerate(indices(layout.runs(rank))):
            if index is not None:
                total[index] += grad[i]
    summed = torch.zeros(layout.shared(0).size, dtype=torch.long)
    for rank, grad in enumerate(grads):
        assert layout.shared(rank).size == len(summed)
        for at, start, length in layout.shared(rank).pieces:
            summed[start : start + length] += grad[at : at + length]
    for rank, grad in enumerate(grads):
        for at, start, length in layout.shared(rank).pieces:
            grad[at : at + length] = summed[start : start + length]
        assert [total[i] for i in indices(layout.intervals(rank))] == [
            grad[at] for at, i in enumerate(indices(layout.runs(rank))) if i is not None
        ]


@QUICK
@given(st.data())
def test_local_order_is_the_order_of_a_view(data: st.DataObject) -> None:
    """Sharding a factor of a product is slicing that dim of the view."""
    tp = data.draw(st.sampled_from([2, 3]))
    sizes = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    at = data.draw(st.integers(0, len(sizes) - 1))
    sizes[at] *= tp
    expr = Product(tuple(Factor(f"f{i}", n, i == at) for i, n in enumerate(sizes)))
    layout = Layout((prod(sizes),), (expr,), tp)
    full = filled(layout.shape)
    for rank in range(tp):
        assert torch.equal(layout.shard(full, rank), full.view(sizes).chunk(tp, at)[rank].flatten())


def test_phi3_qkv() -> None:
    """(kv* group d | kv* d | kv* d) over 2 ranks."""
    kv, group, d = Factor("kv", 4, True), Factor("group", 2), Factor("d", 3)
    expr = Concat((Product((kv, group, d)), Product((kv, d)), Product((kv, d))))
    assert notation(expr) == "(kv* group d | kv* d | kv* d)"
    layout = Layout((48, 5), (expr, Factor("e", 5)), 2)
    assert str(layout) == "(kv* group d | kv* d | kv* d) e"
    assert layout.intervals(0) == ((0, 12), (24, 30), (36, 42))
    assert layout.intervals(1) == ((12, 24), (30, 36), (42, 48))
    assert not layout.is_shared and not layout.is_padded
    assert layout.local_shape == (24, 5)


def test_bloom_qkv_and_multi_query() -> None:
    bloom = Product((Factor("h", 4, True), Factor("3", 3), Factor("d", 2)))
    assert notation(bloom) == "(h* 3 d)"
    assert intervals(bloom, 1, 2) == ((12, 24),)
    fused = Concat((Product((Factor("h", 4, True), Factor("d", 2))), Factor("k", 2), Factor("v", 2)))
    layout = Layout((12,), (fused,), 2)
    assert notation(fused) == "(h* d | k | v)"
    assert layout.intervals(1) == ((4, 12),)
    assert layout.shared(1).pieces == ((4, 0, 4),) and layout.owned(0) == ((0, 8),) and layout.owned(1) == ((0, 4),)
    wrong = torch.arange(12).chunk(2)[1]
    assert not torch.equal(layout.shard(torch.arange(12), 1), wrong)  # a plain even cut is another layout


def test_padding() -> None:
    """3 heads of width 2 over 2 ranks: the second rank has one and a padded one."""
    layout = Layout((6,), (Product((Factor("h", 3, True), Factor("d", 2))),), 2)
    assert layout.local_shape == (4,)
    assert layout.runs(1) == ((4, 6), (-2, 0)) and layout.intervals(1) == ((4, 6),) and layout.padding(1) == ((2, 4),)
    assert layout.shard(torch.arange(6), 1).tolist() == [4, 5, 0, 0]
    assert layout.is_padded and not layout.is_shared


def test_two_kv_heads_of_seven_over_four_ranks() -> None:
    """The example of the module's docstring."""
    kv, group = Factor("kv", 2, True, 2), Factor("group", 7, True, 2, "kv")
    q, k = Product((kv, group)), Product((kv, Factor("d", 3)))
    assert [intervals(q, r, 4) for r in range(4)] == [((0, 4),), ((4, 7),), ((7, 11),), ((11, 14),)]
    assert [intervals(k, r, 4) for r in range(4)] == [((0, 3),), ((0, 3),), ((3, 6),), ((3, 6),)]
    assert (size(q, 4), size(k, 4)) == (4, 3)
    layout = Layout((6,), (k,), 4)
    assert [layout.owned(r) for r in range(4)] == [((0, 3),), (), ((0, 3),), ()]


def test_three_kv_heads_of_three_over_two_ranks() -> None:
    """A rank holds the kv head of two of its slots twice: once beside each piece of its group."""
    kv, group = Factor("kv", 3, True, 2), Factor("group", 3, True, 2, "kv")
    assert [runs(kv, r, 2) for r in range(2)] == [((0, 1), (0, 2)), ((1, 3), (2, 3))]
    assert runs(Product((kv, group)), 1, 2) == ((5, 6), (-1, 0), (6, 9), (-1, 0))
    assert shared(kv, 0, 2).pieces == ((0, 0, 1), (1, 0, 2)) and owned(kv, 0, 2) == ((0, 1), (2, 3))


def test_rows_beside_cut_heads() -> None:
    heads = Concat((Factor("h", 4, True), Factor("k", 1), Factor("v", 1)))
    assert shared(Product((heads, Factor("d", 3))), 1, 2).pieces == ((6, 0, 6),)


def test_replicated() -> None:
    layout = replicated((3, 5), 4)
    full = torch.randn(3, 5)
    assert layout.dim is None
    assert layout.shard(full, 3) is full
    assert torch.equal(layout.unshard([full] * 4), full)
    assert layout.intervals(2) == ((0, 3),)


@pytest.mark.parametrize(
    ("shape", "dims", "tp", "says"),
    [
        ((4,), (Factor("n", 5),), 2, "multiply out"),
        ((4, 2), (Factor("n", 4),), 2, "multiply out"),
        ((), (Factor("n", 1),), 2, "multiply out"),
        ((4, 4), (Factor("a", 4, True), Factor("b", 4, True)), 2, "more than one dim"),
        ((12,), (Product((Factor("kv", 2, True, 2), Factor("group", 6, True, 3, "kv"))),), 2, "cut into 3 pieces of kv"),
        ((6,), (Factor("group", 6, True, 2, "kv"),), 2, "not cut so before it"),
        ((6,), (Factor("n", 6, True, 0),), 2, "cut into 0 pieces of nothing"),
    ],
)
def test_invalid_layouts(shape: tuple[int, ...], dims: tuple[Expr, ...], tp: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Layout(shape, dims, tp)
