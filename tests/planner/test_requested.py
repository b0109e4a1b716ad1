"""Layouts that are asked for: the planner's own come back the same, others are kept where they can be."""

from __future__ import annotations

from dataclasses import replace

import pytest

import autotp
from autotp.plan.codec import decode, encode
from autotp.plan.layout import Layout, alike, replicated
from autotp.plan.notation import parse, sized
from autotp.planner.make_plan import make_plan
from tests.support.families import transformer


@pytest.mark.parametrize(
    ("kind", "tp"), [("falcon", 3), *(pytest.param(k, 2, marks=pytest.mark.slow) for k in ("llama", "phi3", "mamba2"))]
)
def test_a_plan_that_is_asked_for_comes_out(kind, tp):
    model = transformer(kind)
    plan = autotp.plan(model, tp=tp)
    again = make_plan(model, tp, None, {n: p.layout for n, p in plan.params.items()})
    assert again.params == plan.params
    assert replace(again, checked=plan.checked) == plan


def test_what_is_asked_to_be_whole_is_and_the_rest_gives_way():
    model = transformer("llama")
    name = "model.layers.0.mlp.down_proj.weight"
    plan = make_plan(model, 2, None, {name: replicated((64, 128), 2)})
    assert plan.params[name].layout.dim is None
    up = plan.params["model.layers.0.mlp.up_proj.weight"]
    assert up.layout.dim is None
    assert up.reason == f"as asked for, {name} is laid out as n64 n128"
    assert up.ruled_out_by == (name,)
    norm = plan.params["model.layers.0.input_layernorm.weight"]
    assert norm.layout.dim is None and norm.reason and norm.ruled_out_by == ()
    assert decode(encode(plan)) == plan
    assert plan.params["model.layers.1.mlp.up_proj.weight"].layout.dim == 0


def test_a_layout_that_the_axes_do_not_have_is_not_made():
    model = transformer("gpt2")
    name = "transformer.h.0.attn.c_attn.weight"
    dims = sized(parse("e (h* 3 d)"), (64, 192), {"h": 8, "d": 8})
    plan = make_plan(model, 2, None, {name: Layout((64, 192), dims, 2)})
    assert plan.params[name].layout.dim is None


def test_pieces_that_are_asked_for():
    """3 key-value heads of 4 query heads over 2 ranks: 2 pieces of each group, where the planner might take others."""
    model = transformer("llama", num_attention_heads=12, num_key_value_heads=3, hidden_size=96, head_dim=8)
    for pieces in (2, 4):
        dims = sized(parse(f"(kv*{pieces} group*{pieces}/kv d) e"), (96, 96), {"kv": 3, "group": 4})
        wanted = Layout((96, 96), dims, 2)
        plan = make_plan(model, 2, None, {f"model.layers.{i}.self_attn.q_proj.weight": wanted for i in range(2)})
        assert alike(plan.params["model.layers.0.self_attn.q_proj.weight"].layout, wanted)


@pytest.mark.parametrize("pin", [True, False])
def test_heads_in_two_cuts_that_stand_inside_a_product(pin):
    """Slopes of ALiBi for 6 heads are those for 4 and those for 2: the heads are a concatenation, cut twice, and a factor of a product."""
    model = transformer("bloom", n_head=6, hidden_size=48)
    plan = autotp.plan(model, tp=2, check="graph")
    fused = plan.params["transformer.h.0.self_attention.query_key_value.weight"].layout
    assert str(fused) == "((h* | h2*) 3 n) e"
    again = autotp.plan(model, tp=2, check="graph", recipe=autotp.Recipe.from_plan(plan, pin=pin))
    assert again.params == plan.params


@pytest.mark.parametrize(("text", "cut"), [("((4* | 2*) 3 8) 48", True), ("(6* 3 8) 48", False), ("(6 3 8*) 48", False)])
def test_two_cuts_inside_a_product_are_not_one(text, cut):
    model = transformer("bloom", n_head=6, hidden_size=48)
    name = "transformer.h.0.self_attention.query_key_value.weight"
    wanted = Layout((144, 48), sized(parse(text), (144, 48), {}), 2)
    plan = make_plan(model, 2, None, {name: wanted})
    assert alike(plan.params[name].layout, wanted) is cut
