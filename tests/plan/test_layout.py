"""Layouts: reversible, and every index on exactly one rank unless it is repeated."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotp.errors import InputError
from autotp.plan.layout import (
    Concat,
    Expr,
    Factor,
    Layout,
    Product,
    fitted,
    freed,
    intervals,
    is_free,
    is_sharded,
    notation,
    replicated,
    size,
)

QUICK = settings(max_examples=80, deadline=None)
TPS = st.sampled_from([1, 2, 3, 4])


@st.composite
def exprs(draw: st.DrawFn, tp: int, depth: int = 2, cut: bool = True) -> Expr:
    """An expression with at most one sharded factor on each index path."""
    kind = draw(st.sampled_from(["factor", "product", "concat"] if depth else ["factor"]))
    if kind == "factor":
        sharded = cut and draw(st.booleans())
        return Factor("f", draw(st.integers(1, 3)) * (tp if sharded else 1), sharded)
    if kind == "concat":
        return Concat(tuple(draw(exprs(tp, depth - 1, cut)) for _ in range(draw(st.integers(1, 3)))))
    number = draw(st.integers(1, 3))
    at = draw(st.integers(0, number - 1))
    return Product(tuple(draw(exprs(tp, depth - 1, cut and i == at)) for i in range(number)))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    tp = draw(TPS)
    expr = draw(exprs(tp))
    others = draw(st.lists(st.integers(1, 3), max_size=2))
    at = draw(st.integers(0, len(others)))
    dims: list[Expr] = [Factor("n", n) for n in others]
    dims.insert(at, expr)
    return Layout(tuple(size(d) for d in dims), tuple(dims), tp)


def filled(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(prod(shape)).reshape(shape)


def owner(expr: Expr, index: int, tp: int) -> int | None:
    """The rank that holds an index, None for all: the docstring of the module, said again by recursion on the index."""
    if isinstance(expr, Factor):
        return index // (expr.size // tp) if expr.sharded else None
    if isinstance(expr, Concat):
        for part in expr.parts:
            if index < size(part):
                return owner(part, index, tp)
            index -= size(part)
        raise AssertionError("the index is outside")
    for part in reversed(expr.parts):
        held = owner(part, index % size(part), tp)
        if held is not None:
            return held
        index //= size(part)
    return None


@QUICK
@given(layouts())
def test_shard_then_unshard_is_the_identity(layout: Layout) -> None:
    full = filled(layout.shape)
    shards = [layout.shard(full, r) for r in range(layout.tp)]
    assert all(tuple(s.shape) == layout.local_shape for s in shards)
    assert torch.equal(layout.unshard(shards), full)


@QUICK
@given(layouts())
def test_each_rank_holds_what_the_expression_says(layout: Layout) -> None:
    if layout.dim is None:
        assert all(layout.shard(filled(layout.shape), r).shape == layout.shape for r in range(layout.tp))
        return
    expr, n = layout.dims[layout.dim], layout.shape[layout.dim]
    for rank in range(layout.tp):
        held = [i for a, b in layout.intervals(rank) for i in range(a, b)]
        assert held == [i for i in range(n) if owner(expr, i, layout.tp) in (rank, None)]
        assert len(held) == layout.local_shape[layout.dim]


@QUICK
@given(layouts())
def test_intervals_partition_the_dim_but_for_repeated_parts(layout: Layout) -> None:
    if layout.dim is None:
        return
    n = layout.shape[layout.dim]
    count = [0] * n
    everywhere: set[int] = set()
    for rank in range(layout.tp):
        held = [i for a, b in layout.intervals(rank) for i in range(a, b)]
        for i in held:
            count[i] += 1
        everywhere = {held[j] for a, b in layout.repeated for j in range(a, b)}
        assert all(a < b for a, b in layout.intervals(rank))
    if any(isinstance(p, Concat) for p in _inside(layout.dims[layout.dim])):
        assert all(c in (1, layout.tp) for c in count)
    if layout.tp > 1:
        assert everywhere <= {i for i, c in enumerate(count) if c == layout.tp}
        if isinstance(layout.dims[layout.dim], (Factor, Concat)):
            assert [c for i, c in enumerate(count) if i not in everywhere] == [1] * (n - len(everywhere))


def _inside(expr: Expr) -> list[Expr]:
    return [expr] if isinstance(expr, Factor) else [expr, *(e for p in expr.parts for e in _inside(p))]


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
    assert layout.repeated == ()
    assert layout.local_shape == (24, 5)


def test_bloom_qkv_and_multi_query() -> None:
    bloom = Product((Factor("h", 4, True), Factor("3", 3), Factor("d", 2)))
    assert notation(bloom) == "(h* 3 d)"
    assert intervals(bloom, 1, 2) == ((12, 24),)
    shared = Concat((Product((Factor("h", 4, True), Factor("d", 2))), Factor("k", 2), Factor("v", 2)))
    layout = Layout((12,), (shared,), 2)
    assert notation(shared) == "(h* d | k | v)"
    assert layout.intervals(1) == ((4, 12),)
    assert layout.repeated == ((4, 8),)
    wrong = torch.arange(12).chunk(2)[1]
    assert not torch.equal(layout.shard(torch.arange(12), 1), wrong)  # a plain even cut is another layout


def test_notation_of_a_concatenation_inside_a_product() -> None:
    expr = Product((Factor("h", 2, True), Concat((Factor("q", 3), Factor("k", 1)))))
    assert notation(expr) == "(h* (q | k))"
    assert notation(Factor("n", 3)) == "n"
    assert str(replicated((2, 3), 2)) == "n2 n3"
    assert str(replicated((), 2)) == "()"


def test_replicated() -> None:
    layout = replicated((3, 5), 4)
    full = torch.randn(3, 5)
    assert layout.dim is None
    assert layout.shard(full, 3) is full
    assert torch.equal(layout.unshard([full] * 4), full)
    assert layout.intervals(2) == ((0, 3),)


@QUICK
@given(st.data())
def test_freed_expressions_fit_any_length(data: st.DataObject) -> None:
    tp, b, n = data.draw(st.sampled_from([2, 3])), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    expr = freed(Product((Factor("b", 7), Factor("h", tp * n, True), Factor("d", 2))))
    assert is_free(expr)
    fit = fitted(expr, b * tp * n * 2)
    assert fit is not None
    assert size(fit) == b * tp * n * 2
    assert size(fit, tp) == b * n * 2
    assert fitted(expr, b * tp * n * 2 + 1) is None
    local = fitted(expr, b * n * 2, tp)
    assert local == fit


def test_a_sharded_major_factor_is_not_freed() -> None:
    expr = Product((Factor("h", 4, True), Factor("d", 2)))
    assert freed(expr) == expr
    assert not is_free(expr)
    assert is_sharded(expr)


@pytest.mark.parametrize(
    ("shape", "dims", "tp", "says"),
    [
        ((4,), (Factor("n", 5),), 2, "multiply out"),
        ((4, 2), (Factor("n", 4),), 2, "multiply out"),
        ((), (Factor("n", 1),), 2, "multiply out"),
        ((3,), (Factor("n", 3, True),), 2, "evenly"),
        ((6, 4), (Product((Factor("h", 3, True), Factor("d", 2))), Factor("e", 4)), 2, "evenly"),
        ((4, 4), (Factor("a", 4, True), Factor("b", 4, True)), 2, "more than one dim"),
        ((7,), (Concat((Factor("a", 4, True), Factor("b", 3, True))),), 2, "evenly"),
    ],
)
def test_invalid_layouts(shape: tuple[int, ...], dims: tuple[Expr, ...], tp: int, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Layout(shape, dims, tp)
