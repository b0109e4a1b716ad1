"""Whatever makes a recipe gives users a `Recipe`, and everything that is wrong is said in the order of the file."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from autotp.errors import RecipeError
from autotp.recipe.recipe import Recipe

TEXT = "extends: llama\nsizes: {x: 2}\n"
WAYS = {
    "load a name": lambda: Recipe.load("mixtral"),
    "load a mapping": lambda: Recipe.load({"shard": ["i"], "column": {"up.weight": "i e"}}),
    "load text": lambda: Recipe.load(TEXT),
    "loads": lambda: Recipe.loads(TEXT),
    "merge": lambda: Recipe.load("llama").merge(Recipe.load("gpt2")),
    "from_tp_plan": lambda: Recipe.from_tp_plan({"layers.*.mlp.up_proj": "colwise"}),
    "replace": lambda: replace(Recipe.load("llama"), name="mine"),
    "pickle": lambda: pickle.loads(pickle.dumps(Recipe.load("llama"))),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_is_a_recipe(way):
    made = WAYS[way]()
    assert type(made) is Recipe and Recipe.load(made) is made
    assert made == Recipe.loads(made.dump()) == Recipe.load(made.to_dict())
    assert repr(made).startswith("Recipe(name=")


def test_problems_stand_in_the_order_of_their_lines():
    lines = [*(f"  a{i}.weight: h e" for i in range(8)), '  b.weight: "h ("', '  c..d: "e"']
    text = "\n".join(["extends: nowhere", "granules: {h: 0}", "column:", *lines, "row:", "  a0.weight: e h"])
    with pytest.raises(RecipeError) as caught:
        Recipe.loads(text, file="x.yaml")
    places = [p.split(": ")[0] for p in caught.value.problems]
    assert places == ["x.yaml:1:10", "x.yaml:2:15", "x.yaml:12:17", "x.yaml:13:3", "x.yaml:15:3"]
    assert caught.value.problems[-1] == "x.yaml:15:3: a0.weight stands in column and in row; first at x.yaml:4:3"
