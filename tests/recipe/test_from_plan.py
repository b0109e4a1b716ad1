"""Plan → recipe → plan, exactly; and the recipe without the plan in it still says what the plan does."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import yaml

import autotp
from autotp.errors import RecipeError
from autotp.recipe.from_plan import comments_of
from autotp.recipe.recipe import Recipe
from tests.recipe.untraced import untraced
from tests.support.families import transformer
from tests.support.pooled import equivalent
from tests.support.ranks import Pool

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "deepseek_v3", "t5", "gpt2")]
KINDS = ["falcon", "mamba2", *SLOW]


@cache
def planned(kind: str, tp: int) -> tuple[Any, autotp.Plan]:
    model = transformer(kind)
    return model, autotp.plan(model, tp=tp)


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(kind):
    model, plan = planned(kind, 3)
    recipe = Recipe.from_plan(plan, model=model)
    assert recipe.to_plan() == plan
    read = Recipe.loads(recipe.dump())
    assert read == recipe
    assert read.to_plan() == plan
    assert Recipe.from_plan(read.to_plan(), model=model) == recipe


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("falcon", marks=pytest.mark.slow)])
def test_planning_by_it_gives_the_same_plan(kind):
    model, plan = planned(kind, 3)
    assert autotp.plan(model, tp=3, recipe=Recipe.from_plan(plan)) == plan


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("deepseek_v3", marks=pytest.mark.slow)])
def test_at_another_number_of_ranks(kind):
    """Without the plan in it a recipe is for any number of ranks."""
    model, plan = planned(kind, 3)
    recipe = Recipe.loads(Recipe.from_plan(plan, model=model, pin=False).dump())
    at_two = autotp.plan(model, tp=2, recipe=recipe)
    assert at_two.local_share == pytest.approx(autotp.plan(model, tp=2).local_share)


@pytest.mark.parametrize(
    ("kind", "tp"), [("gptj", 2), ("falcon", 3), *(pytest.param(k, 2, marks=pytest.mark.slow) for k in ("deepseek_v3", "gpt_bigcode"))]
)
def test_its_words_are_enough_without_a_trace(pool: Pool, kind: str, tp: int):
    """What the planner placed, said in roles and boundaries, and made into a plan again from these alone."""
    model, plan = planned(kind, tp)
    recipe = Recipe.loads(Recipe.from_plan(plan, model=model, pin=False).dump())
    assert not recipe.trace
    factory = partial(transformer, kind, **({"experts": "eager"} if kind == "deepseek_v3" else {}))
    needs = ("state", "outputs", "loss", "gradients", "generation", "steps")
    equivalent(pool, factory, tp=tp, recipe=recipe, around=untraced, needs=needs)


def test_changes_inside_of_forwards_want_a_trace():
    model, plan = planned("mamba2", 3)
    recipe = Recipe.from_plan(plan, model=model, pin=False)
    assert recipe.trace
    with pytest.raises(RecipeError, match="only a traced model tells where"):
        recipe.to_plan(model, tp=3)


def test_an_edited_recipe_does_not_go_with_its_plan():
    model, plan = planned("gpt2", 3)
    data = Recipe.from_plan(plan, model=model).to_dict()
    data["shard"] = [name for name in data["shard"] if name != "i"]
    for name in ("transformer.h.*.mlp.c_fc.weight", "transformer.h.*.mlp.c_fc.bias"):
        del data["column"][name]
    del data["row"]["transformer.h.*.mlp.c_proj.weight"], data["row"]["transformer.h.*.mlp.c_proj.bias"]
    data["attributes"] = {k: v for k, v in data["attributes"].items() if "c_fc" not in k}
    data["whole"]["mlp.c_*"] = data["whole"].pop("transformer.h.*.ln_1.weight")
    data["whole"] = {
        **{k: v for k, v in data["whole"].items() if k != "mlp.c_*"},
        "ln_1.weight": "e", "mlp.c_fc.weight": "e i", "mlp.c_fc.bias": "i", "mlp.c_proj.weight": "i e", "mlp.c_proj.bias": "e",
    }  # fmt: skip
    with pytest.raises(RecipeError, match="is not what the recipe's `plan:` was made with"):
        autotp.plan(model, tp=3, recipe=data)
    del data["plan"]
    assert autotp.plan(model, tp=3, recipe=data).params["transformer.h.0.mlp.c_fc.bias"].layout.dim is None


@pytest.mark.sweep
def test_sizes_are_fields_of_the_config():
    model = transformer("llama", num_key_value_heads=4)
    recipe = Recipe.from_plan(autotp.plan(model, tp=2), model=model, pin=False)
    sizes = {s.name: s.value for s in recipe.sizes}
    assert sizes["kv"] == "num_key_value_heads"
    assert sizes["i"] == "intermediate_size"
    assert sizes["d"] == "head_dim"
    other = transformer("llama", num_key_value_heads=2, hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8)
    assert autotp.plan(other, tp=2, recipe=recipe).local_share < 0.6


def test_comments_say_why():
    _, plan = planned("gpt2", 3)
    recipe = Recipe.from_plan(plan, pin=False)
    comments = comments_of(plan, recipe)
    assert comments["transformer.wpe.weight"] == "a lookup table this short costs more to reduce than it saves"
    assert comments["lm_head.weight"] == "tied to transformer.wte.weight"


def test_the_plan_in_a_recipe_is_checked_when_it_is_read():
    _, plan = planned("gpt2", 3)
    data = yaml.safe_load(Recipe.from_plan(plan).dump())
    data["plan"]["modules"][0]["path"] = 3
    with pytest.raises(RecipeError, match="not what a plan is written as"):
        Recipe.load(data)


def test_no_plan_of_its_own():
    with pytest.raises(RecipeError, match=r"gpt2.yaml: holds no plan of its own: give the model and tp="):
        Recipe.load("gpt2").to_plan()
