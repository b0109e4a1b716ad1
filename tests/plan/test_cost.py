"""Padding, repetition and work of plans written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autotp.plan.cost import padding_elements, repeated_elements
from autotp.plan.expressions import Concat, Expr, Factor, Product, size
from autotp.plan.layout import Layout, replicated
from autotp.plan.plan import Plan
from autotp.plan.spec import AxisInfo, PaddedAxis, ParamPlan


def layout(tp: int, *dims: Expr) -> Layout:
    return Layout(tuple(size(d) for d in dims), dims, tp)


def plan(
    tp: int,
    layouts: Mapping[str, Layout],
    products: tuple[str, ...] = (),
    aliases: Mapping[str, str] | None = None,
    axes: tuple[AxisInfo, ...] = (),
    axis: str = "attention",
) -> Plan:
    params = {n: ParamPlan(n, x, axis if x.dim is not None else "", "" if x.dim is not None else "why") for n, x in layouts.items()}
    return Plan("Toy", tp, params, (), axes, (), dict(aliases or {}), frozenset(products))


def heads(n: int) -> Factor:
    return Factor("h", n, True)


def grouped(kv: int, group: int, pieces: int) -> tuple[Factor, Factor]:
    return Factor("kv", kv, True, pieces), Factor("group", group, True, pieces, "kv")


D, WIDTH = Factor("d", 4), Factor("e", 6)


def test_nothing_is_lost_where_tp_divides() -> None:
    found = plan(2, {"q": layout(2, Product((heads(8), D)), WIDTH)}, ("q",))
    assert (found.padding_waste, found.repeated_share, found.busiest_work, found.padded_axes) == (0.0, 0.0, 1.0, ())


def test_nine_heads_over_four_ranks() -> None:
    """3 slots a rank, 12 in all: 3 of them are padding, each of 4 × 6 elements in q and in o."""
    q, o = layout(4, Product((heads(9), D)), WIDTH), layout(4, WIDTH, Product((heads(9), D)))
    found = plan(4, {"q": q, "o": o}, ("q", "o"))
    assert found.padding_waste == pytest.approx(3 / 9)
    assert found.repeated_share == 0.0
    assert found.busiest_work == pytest.approx(12 / 9)
    assert found.padded_axes == (PaddedAxis("attention", 9, 12),)


def test_ranks_that_hold_nothing_but_padding() -> None:
    """2 heads over 4 ranks: 1 slot each, two of them real."""
    assert padding_elements(layout(4, heads(2), WIDTH)) == 2 * 6


def test_key_value_heads_in_pieces() -> None:
    """2 kv heads of 7 query heads over 4 ranks: 4 + 3 query heads and a kv head on each; 14 → 16 slots, k and v twice."""
    kv, group = grouped(2, 7, 2)
    q, k = layout(4, Product((kv, group, D)), WIDTH), layout(4, Product((kv, D)), WIDTH)
    assert (padding_elements(q), repeated_elements(q)) == (2 * 4 * 6, 0)
    assert (padding_elements(k), repeated_elements(k)) == (0, 2 * 4 * 6)
    found = plan(4, {"q": q, "k": k, "v": k}, ("q", "k", "v"))
    assert found.padding_waste == pytest.approx(2 / (14 + 2 + 2))
    assert found.repeated_share == pytest.approx(4 / (14 + 2 + 2))
    assert found.busiest_work == pytest.approx((16 + 4 + 4) / (14 + 2 + 2))
    assert found.padded_axes == (PaddedAxis("attention", 14, 16),)


def test_several_slots_of_one_rank_that_hold_the_same_head() -> None:
    """3 kv heads of 3 over 2 ranks, one piece a query head: 5 slots a rank, k and v held 10 times less a slot of padding."""
    kv, _ = grouped(3, 3, 3)
    k = layout(2, Product((kv, D)), WIDTH)
    assert repeated_elements(k) == (9 - 3) * 4 * 6
    assert padding_elements(k) == 4 * 6


def test_multi_query_attention_in_one_weight() -> None:
    """Query heads are cut, the one key and value head beside them is whole on all 4 ranks: 3 more copies of 2 × 4 rows."""
    fused = layout(4, Concat((Product((heads(8), D)), D, D)), WIDTH)
    found = plan(4, {"c_attn": fused}, ("c_attn",))
    assert found.repeated_share == pytest.approx(3 * 8 / 40)
    assert found.padding_waste == 0.0
    assert found.busiest_work == pytest.approx(4 * 16 / 40)


def test_whole_products_cost_every_rank_all_of_them() -> None:
    """Half of the work is cut in two, half is not: 1.5 times the ideal. Whole copies are no repetition."""
    found = plan(2, {"up": layout(2, heads(8), WIDTH), "gate": replicated((8, 6), 2)}, ("up", "gate"))
    assert found.busiest_work == 1.5
    assert found.repeated_share == 0.0


def test_lookups_cost_nothing_but_a_tied_head_does_once() -> None:
    table, cut = replicated((8, 6), 2), layout(2, heads(8), WIDTH)
    assert plan(2, {"table": table, "up": cut}, ("up",)).busiest_work == 1.0
    tied = plan(2, {"table": table, "up": cut, "head": table}, ("up", "table", "head"), {"head": "table"})
    assert tied.busiest_work == 1.5
    assert plan(2, {"table": table}).busiest_work == 1.0


def test_tied_padding_counts_once() -> None:
    cut = layout(2, Factor("v", 5, True), WIDTH)
    tied = plan(2, {"embed": cut, "head": cut}, aliases={"head": "embed"})
    assert tied.padding_waste == pytest.approx(1 / 5)


PADDED = """\
Toy over tp=4: 0.321 of the parameter elements on each rank
padding 24.5 % · repeated 3.8 % · busiest rank 1.28 × the ideal
  attention heads or groups: 9 → 12 over 4 ranks
  vocabulary: 30 → 32 over 4 ranks
"""


def test_what_the_table_says() -> None:
    q, v = layout(4, Product((heads(9), D)), WIDTH), layout(4, Factor("v", 30, True), WIDTH)
    k = layout(4, Product((Factor("kv", 2, True, 2), Factor("d", 1))), WIDTH)
    names = {"layers.0.q": q, "layers.1.q": q, "layers.0.k": k, "layers.1.k": k, "wte": v, "head": v}
    axes = (AxisInfo("v", "embedding", 30, "", ("wte", "head")), AxisInfo("layers.0.h", "attention", 9, "layers.0", ("layers.0.q",)))
    found = plan(4, names, tuple(names), {"head": "wte"}, axes)
    text = str(found)
    assert text.startswith(PADDED)
    assert "tied to wte" in text
    assert "layers.*.q  ×2" in text
    assert "  h: 9 → 3 · d: 4 or 1 · e: 6 · kv: 2 → 1 · v: 30 → 8" in text
    listed = json.loads(json.dumps(found.to_dict()))
    assert listed["padding_waste"] == found.padding_waste
    assert listed["repeated_share"] == found.repeated_share
    assert listed["busiest_work"] == found.busiest_work
    assert listed["padded_axes"] == [
        {"pattern": "attention", "size": 9, "padded": 12},
        {"pattern": "embedding", "size": 30, "padded": 32},
    ]


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Plans of a few parameters, sharded alone, in pieces or beside whole segments, or not at all."""
    tp = draw(st.sampled_from([2, 3, 4, 8]))
    layouts = {}
    for name in "abc"[: draw(st.integers(1, 3))]:
        d, n, w = (Factor("d", draw(st.integers(1, 3))) for _ in range(3))
        kv, group = grouped(draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4)))
        alone = heads(draw(st.integers(1, 9)))
        dims: list[Expr] = [Product((alone, d)), Product((n, alone)), Product((kv, group, d)), Product((kv, d))]
        dims += [Concat((Product((alone, d)), n)), Concat((Product((kv, group, d)), Product((kv, d))))]
        layouts[name] = draw(st.sampled_from([replicated((2, 3), tp), *(layout(tp, dim, w) for dim in dims)]))
    return plan(tp, layouts, tuple(layouts))


@settings(max_examples=200, deadline=None)
@given(plans())
def test_what_is_held_is_the_model_padding_and_copies(found: Plan) -> None:
    sizes = {n: prod(p.layout.shape) for n, p in found.params.items()}
    whole = sum(sizes[n] for n in found.replicated) / sum(sizes.values())
    held = found.tp * found.local_share
    assert held == pytest.approx(1 + found.padding_waste + found.repeated_share + (found.tp - 1) * whole)
    assert found.busiest_work == pytest.approx(held)
    assert all(axis.padded > axis.size for axis in found.padded_axes)
    assert bool(found.padded_axes) <= (found.padding_waste > 0)
