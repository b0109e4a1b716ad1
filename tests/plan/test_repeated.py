"""Which local rows every rank holds, on random layouts."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from autotp.plan.layout import Concat, Expr, Factor, Product, intervals, repeated

TP = 2


def _exprs(depth: int) -> st.SearchStrategy[Expr]:
    whole = st.builds(Factor, st.just("d"), st.integers(1, 4))
    cut = st.builds(Factor, st.just("h"), st.sampled_from((2, 4)), st.just(True))
    if depth == 0:
        return whole | cut
    inner = _exprs(depth - 1)
    concat = st.lists(inner, min_size=2, max_size=3).map(lambda parts: Concat(tuple(parts)))
    product = st.tuples(inner, whole).map(Product)
    return whole | cut | concat | product


def _indices(runs: tuple[tuple[int, int], ...]) -> list[int]:
    return [i for a, b in runs for i in range(a, b)]


@given(_exprs(2))
def test_repeated_rows_are_those_that_all_ranks_hold(expr: Expr) -> None:
    held = [_indices(intervals(expr, rank, TP)) for rank in range(TP)]
    everywhere = set(held[0]) & set(held[1])
    if len(everywhere) == len(held[0]):
        assert repeated(expr, TP) == ()  # nothing is sharded
        return
    for rank in range(TP):
        assert {held[rank][i] for i in _indices(repeated(expr, TP))} == everywhere


def test_rows_beside_cut_heads() -> None:
    heads = Concat((Factor("h", 4, True), Factor("k", 1), Factor("v", 1)))
    assert repeated(Product((heads, Factor("d", 3))), TP) == ((6, 12),)
