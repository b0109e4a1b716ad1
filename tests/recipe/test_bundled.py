"""The bundled recipes on their models: proven against the axes, and right without a trace.

Untraced, the roles of a recipe alone place the collectives; nothing but the numbers tells whether they are the right ones. So each
recipe is run so on real ranks and compared with one device in everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
import yaml

import autotp
from autotp.recipe import bundled
from tests.recipe.untraced import untraced
from tests.support.families import transformer
from tests.support.pooled import PLAIN, equivalent
from tests.support.ranks import Pool

#: recipe → the model types and fields that it is tested with; the first of them also runs untraced in the quick suite.
MODELS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "llama": [
        ("qwen3", {"num_key_value_heads": 4}),
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("mistral", {}),
        ("qwen2", {}),
        ("gemma", {}),
        ("gemma2", {}),
        ("gemma3_text", {}),
        ("olmo", {}),
        ("granite", {}),
        ("helium", {}),
        ("smollm3", {}),
        ("ministral", {}),
        ("seed_oss", {}),
    ],
    "olmo2": [("olmo2", {}), ("olmo3", {})],
    "gpt2": [("gpt2", {})],
    "gpt_neox": [("gpt_neox", {})],
    "gptj": [("gptj", {})],
    "bloom": [("bloom", {})],
    "falcon": [
        ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4, "alibi": False}),
        ("falcon", {}),
        ("falcon", {"multi_query": False, "new_decoder_architecture": False, "alibi": True, "bias": True, "parallel_attn": False}),
    ],
    "phi3": [("phi3", {"num_key_value_heads": 4}), ("phi3", {})],
    "opt": [("opt", {}), ("opt", {"word_embed_proj_dim": 32, "do_layer_norm_before": False})],
    "mpt": [("mpt", {})],
    "mixtral": [("mixtral", {"experts": "eager"})],
    "qwen3_moe": [("qwen3_moe", {"experts": "eager"}), ("qwen3_moe", {"experts": "eager", "mlp_only_layers": [0]})],
    "deepseek_v3": [("deepseek_v3", {"experts": "eager"}), ("deepseek_v3", {"experts": "eager", "q_lora_rank": None})],
    "bert": [("bert", {}), ("roberta", {}), ("camembert", {}), ("xlm-roberta", {})],
    "t5": [("t5", {"feed_forward_proj": "gated-gelu"}), ("t5", {}), ("mt5", {})],
    "vit": [("vit", {})],
    "whisper": [("whisper", {})],
    "starcoder2": [("starcoder2", {}), ("starcoder2", {"use_bias": False})],
}
CASES = [(recipe, *model) for recipe, models in MODELS.items() for model in models]
NAMES = [f"{recipe}-{kind}-{i}" for i, (recipe, kind, _) in enumerate(CASES)]
FIRST = [models[0] for models in MODELS.values()]
#: Every rank holds at most this share of the parameters at two ranks.
SHARE = 0.76


def _marked(case: tuple[str, str, dict[str, Any]], quick: Sequence[Any], swept: Sequence[Any] = ()) -> Any:
    pair = case[1], case[2]
    return case if pair in quick else pytest.param(*case, marks=pytest.mark.sweep if pair in swept else pytest.mark.slow)


@pytest.mark.parametrize(("recipe", "kind", "fields"), [_marked(case, FIRST[1::4], FIRST[3::4]) for case in CASES], ids=NAMES)
def test_is_proven(recipe, kind, fields):
    plan = autotp.plan(transformer(kind, **fields), tp=2, recipe=recipe)
    assert plan.local_share < SHARE
    assert not any("proven" in note for note in plan.notes)


@pytest.mark.parametrize(
    ("recipe", "kind", "fields"),
    [_marked(case, FIRST[::4], FIRST[2::4]) for case in CASES if case[0] != "olmo2"],
    ids=[n for n in NAMES if "olmo2" not in n],
)
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_is_right_untraced(pool: Pool, recipe: str, kind: str, fields: dict[str, Any], world: int):
    needs = (*PLAIN, "with hidden states")
    found = equivalent(pool, partial(transformer, kind, **fields), tp=world, recipe=recipe, around=untraced, needs=needs)
    assert found.local_share < SHARE


def test_what_needs_a_trace_says_so():
    model = transformer("olmo2")
    with pytest.raises(autotp.AutoTPError, match="only a traced model tells"):
        autotp.Recipe.load("olmo2").to_plan(model, tp=2)


def test_every_recipe_is_tested_and_every_family_with_it():
    assert set(MODELS) == set(bundled.names())
    for name, models in MODELS.items():
        assert set(autotp.Recipe.load(name).families) == {kind for kind, _ in models}
        for kind, _ in models:
            assert autotp.Recipe.load(kind).name == name


@pytest.mark.parametrize("name", bundled.names())
def test_reads_back(name):
    recipe = autotp.Recipe.load(name)
    assert autotp.Recipe.loads(recipe.dump()) == recipe
    assert autotp.Recipe.load(recipe.to_dict()) == recipe


def test_nothing_is_written_twice():
    """What extends another repeats none of its lines."""
    for name in bundled.names():
        data = yaml.safe_load((bundled.folder() / f"{name}.yaml").read_text(encoding="utf-8"))
        if "extends" in data:
            theirs = autotp.Recipe.load(data["extends"]).to_dict()
            for section, items in data.items():
                if section in theirs and isinstance(items, dict) and section not in ("arguments", "results"):
                    assert not items.items() & theirs[section].items(), (name, section)


def test_a_result_leaves_where_no_row_has_summed_it(pool: Pool):
    """`"?": leave` on every MLP: those of the mixture leave, the dense one has a row of its own."""
    data = autotp.Recipe.load("deepseek_v3").to_dict()
    data["part"]["mlp.shared_experts.down_proj.weight"] = data["row"].pop("mlp.shared_experts.down_proj.weight")
    data["results"]["mlp"] = {"?": "leave"}
    del data["results"]["mlp.experts"]
    factory = partial(transformer, "deepseek_v3", experts="eager")
    equivalent(pool, factory, recipe=data, around=untraced, needs=PLAIN)


def test_numbers_of_blocks_are_no_sizes():
    """Layer 8 of a model with 8 heads has an int attribute of the value 8."""
    plan = autotp.Recipe.load("llama").to_plan(transformer("llama", num_hidden_layers=10), tp=2)
    assert plan.attributes == {}
