"""Dim expressions: their text, and the free ones of activations."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from autotp.plan.expressions import Concat, Factor, Product, fitted, freed, is_free, is_sharded, notation, size
from autotp.plan.layout import replicated

QUICK = settings(max_examples=80, deadline=None)


def test_notation_of_a_concatenation_inside_a_product() -> None:
    expr = Product((Factor("h", 2, True), Concat((Factor("q", 3), Factor("k", 1)))))
    assert notation(expr) == "(h* (q | k))"
    assert notation(Factor("n", 3)) == "n"
    assert str(replicated((2, 3), 2)) == "n2 n3"
    assert str(replicated((), 2)) == "()"


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
