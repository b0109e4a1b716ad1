"""Layout notation: what is written is read back, and mistakes say where they are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotp.errors import InputError
from autotp.plan.expressions import Concat, Expr, Factor, Product, notation, size
from autotp.plan.layout import Layout
from autotp.plan.notation import UNKNOWN, NotationError, parse, sized, spelled

NAMES = st.sampled_from(["h", "d", "kv", "group", "e", "n768", "long_name", "2", "3_2"])


@st.composite
def exprs(draw: st.DrawFn, depth: int = 3) -> Expr:
    """Any expression, well-formed or not: the notation does not ask what a layout allows."""
    kind = draw(st.sampled_from(["factor", "product", "concat"] if depth else ["factor"]))
    if kind == "factor":
        cut = draw(st.booleans())
        pieces = draw(st.integers(1, 5)) if cut else 1
        of = draw(st.sampled_from(["", "kv"])) if cut else ""
        return Factor(draw(NAMES), draw(st.integers(0, 40)), cut, pieces, of, draw(st.integers(1, 9)))
    parts = tuple(draw(exprs(depth - 1)) for _ in range(draw(st.integers(1, 3))))
    return Product(parts) if kind == "product" else Concat(parts)


@given(st.lists(exprs(), max_size=3))
@settings(max_examples=300, deadline=None)
def test_what_is_spelled_in_full_is_read_back(dims):
    assert parse(" ".join(map(spelled, dims))) == tuple(dims)


@pytest.mark.parametrize(
    "text",
    [
        "(kv group d) e",
        "e (h d | h d | h d)",
        "(kv group d | kv d | kv d) e",
        "(h 3 d) e",
        "v e",
        "(kv (group d | d | d)) e",
        "x (i | i) e",
        "()",
    ],
)
def test_what_a_table_shows_is_read_back(text):
    dims = parse(text)
    assert (" ".join(notation(d) for d in dims) or "()") == text


def test_marks():
    (product,) = parse("(kv*2 group:7*2/kv d)")
    assert product == Product((Factor("kv", UNKNOWN, True, 2), Factor("group", 7, True, 2, "kv"), Factor("d", UNKNOWN)))
    assert parse("i*%8") == (Factor("i", UNKNOWN, True, granule=8),)


@pytest.mark.parametrize(
    ("text", "at", "problem"),
    [
        ("(a b", 4, "not closed"),
        ("a)", 1, "outside of parentheses"),
        ("a | b", 2, "outside of parentheses"),
        ("(| a)", 1, "nothing stands before"),
        ("(a | | b)", 5, "nothing stands before"),
        ("a $b", 2, "got '$b'"),
        ("(a ,b)", 3, "got ',b'"),
        ("a-b", 0, "got 'a-b'"),
        ("a*0", 0, "granules of 0"),
        ("(a b*%0)", 3, "granules of 0"),
        ("(" * 60, 51, "too deep"),
    ],
)
def test_mistakes_say_where(text, at, problem):
    with pytest.raises(NotationError, match=f"character {at + 1}") as caught:
        parse(text)
    assert problem in str(caught.value)
    assert caught.value.at == at


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_one_unknown_of_a_dim_follows_from_its_length(h, d, e):
    dims = sized(parse("(h d | h d | 2 d) e"), ((2 * h + 2) * d, e), {"h": h})
    assert [size(x) for x in dims] == [(2 * h + 2) * d, e]
    assert Layout(((2 * h + 2) * d, e), dims, 1).shape == ((2 * h + 2) * d, e)


def test_sizes_that_nobody_tells():
    with pytest.raises(InputError, match="the sizes of a, b are not known"):
        sized(parse("(a b)"), (6,), {})
    with pytest.raises(InputError, match=r"2 dims are written, the shape \[6\] has 1"):
        sized(parse("a b"), (6,), {})
    assert size(sized(parse("(a b)"), (7,), {"a": 2})[0]) == 6  # does not multiply out: the layout says so
