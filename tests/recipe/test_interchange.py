"""Recipes out of a `tp_plan` and out of torch's styles."""

from __future__ import annotations

import pytest
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

import autotp
from autotp.errors import RecipeError
from autotp.recipe.recipe import Recipe
from tests.support.families import transformer

SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama", "qwen3", "deepseek_v3")]


@pytest.mark.parametrize("kind", ["mixtral", *SLOW])
def test_tp_plans_of_transformers_are_proven(kind):
    model = transformer(kind)
    recipe = Recipe.from_tp_plan(model.tp_plan, model)
    assert Recipe.from_tp_plan(model.tp_plan) == recipe
    assert Recipe.loads(recipe.dump()) == recipe
    assert autotp.plan(model, tp=2, recipe=recipe).local_share < 0.53


def test_there_and_back():
    model = transformer("llama")
    plan = autotp.plan(model, tp=2)
    recipe = Recipe.from_tp_plan(plan.to_tp_plan())
    torchs = Recipe.from_parallelize_module(plan.to_parallelize_module(), model)
    assert (torchs.entries, torchs.shard) == (recipe.entries, recipe.shard)
    again = autotp.plan(model, tp=2, recipe=recipe)
    assert {n: p.layout.dim for n, p in again.params.items()} == {n: p.layout.dim for n, p in plan.params.items()}
    assert again.modules == plan.modules


def test_a_wrong_tp_plan_is_not_proven():
    """Even parts of a fused weight, as a `colwise` entry would cut it, are not what the axes of phi3 allow."""
    model = transformer("phi3")
    recipe = Recipe.from_tp_plan({"model.layers.*.self_attn.qkv_proj": "colwise", "model.layers.*.self_attn.o_proj": "rowwise"})
    with pytest.raises(RecipeError, match="is not proven, the axes of the model give"):
        autotp.plan(model, tp=2, recipe=recipe)


def test_styles_without_a_counterpart():
    with pytest.raises(RecipeError, match="the style 'diagonal' has no counterpart; known are colwise"):
        Recipe.from_tp_plan({"lm_head": "diagonal"})
    with pytest.raises(RecipeError, match=r"plan\['norm'\]: SequenceParallel has no counterpart"):
        Recipe.from_parallelize_module({"norm": SequenceParallel()})
    with pytest.raises(RecipeError, match="has no counterpart"):
        Recipe.from_parallelize_module({"q": ColwiseParallel(input_layouts=Shard(1))})
    with pytest.raises(RecipeError, match="has no counterpart"):
        Recipe.from_parallelize_module({"o": RowwiseParallel(output_layouts=Shard(1))})
    with pytest.raises(RecipeError, match="got list"):
        Recipe.from_tp_plan([])


def test_names_that_the_model_does_not_have():
    model = transformer("llama")
    with pytest.raises(RecipeError, match=r"layers.\*.self_attn.qproj; did you mean .*q_proj\?: the model has no such module"):
        Recipe.from_parallelize_module({"layers.*.self_attn.qproj": ColwiseParallel()}, model)
    with pytest.raises(RecipeError, match="the model has nothing that the tp_plan names"):
        Recipe.from_tp_plan({"layers.*.self_attn.qproj": "colwise"}, model)


def test_a_tp_plan_of_a_family_names_more_than_a_model_has():
    """qwen2_moe's plan names dense MLPs too; what is left out is said."""
    model = transformer("qwen2_moe")
    recipe = Recipe.from_tp_plan(model.tp_plan, model)
    assert "left out, as the model does not have them: model.layers.*.mlp.gate_proj" in recipe.about
    assert autotp.plan(model, tp=2, recipe=recipe).local_share < 0.53


def test_roles():
    styles = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "block.up": ColwiseParallel(),
        "block.down": RowwiseParallel(),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    entries = {e.key: e.role.value for e in Recipe.from_parallelize_module(styles).entries if e.key.endswith("weight")}
    assert entries == {"embed.weight": "lookup", "block.up.weight": "column", "block.down.weight": "row", "head.weight": "gathered"}
