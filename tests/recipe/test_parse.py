"""Reading, merging and writing recipes."""

from __future__ import annotations

import pytest
from torch import nn

import autotp
from autotp.errors import RecipeError
from autotp.recipe.recipe import Recipe
from autotp.recipe.yaml_source import read

SMALL = """\
# a comment
recipe: small
sizes: { e: hidden_size, h: 4 }
shard: [h]
column:
  q.weight: "(h d) e"
  q.bias?: "(h d)"
row:
  o.weight: "e (h d)"
"""


def test_what_is_read():
    recipe = Recipe.loads(SMALL, file="small.yaml")
    assert recipe.name == "small"
    assert [(e.key, e.role.value, e.layout, e.optional) for e in recipe.entries] == [
        ("q.weight", "column", "(h d) e", False),
        ("q.bias", "column", "(h d)", True),
        ("o.weight", "row", "e (h d)", False),
    ]
    assert str(recipe.entries[1].pos) == "small.yaml:7:3"
    assert str(recipe.entries[1].at) == "small.yaml:7:13"
    assert {s.name: s.value for s in recipe.sizes} == {"e": "hidden_size", "h": 4}


def test_places_do_not_count():
    assert Recipe.loads(SMALL) == Recipe.loads("\n\n" + SMALL, file="other.yaml")
    assert Recipe.loads(SMALL) != Recipe.loads(SMALL.replace("h: 4", "h: 8"))


def test_written_and_read_back(tmp_path):
    recipe = Recipe.loads(SMALL)
    assert Recipe.loads(recipe.dump()) == recipe
    assert Recipe.load(recipe.to_dict()) == recipe
    recipe.dump(tmp_path / "out.yaml")
    assert Recipe.load(tmp_path / "out.yaml") == recipe
    assert Recipe.load(str(tmp_path / "out.yaml")) == recipe
    assert Recipe.load(recipe) is recipe
    assert Recipe.load(SMALL) == recipe


def test_extends_overrides_and_takes_out(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "big.yaml").write_text('extends: small.yaml\nsizes: { h: 8 }\ncolumn: { q.bias: null }\npart: { o.weight: "e (h d)" }\n')
    recipe = Recipe.load(tmp_path / "big.yaml")
    assert recipe.name == "big"
    assert {e.key: e.role.value for e in recipe.entries} == {"q.weight": "column", "o.weight": "part"}
    assert {s.name: s.value for s in recipe.sizes} == {"e": "hidden_size", "h": 8}
    assert [s.names for s in recipe.shard] == [("h",)]
    assert recipe.entries[0].pos.file.endswith("small.yaml")  # a mistake is reported where it stands


def test_merge_is_what_extends_does(tmp_path):
    top = Recipe.loads('recipe: big\nsizes: { h: 8 }\npart: { o.weight: "e (h d)" }\n')
    (tmp_path / "small.yaml").write_text(SMALL)
    (tmp_path / "big.yaml").write_text('recipe: big\nextends: small.yaml\nsizes: { h: 8 }\npart: { o.weight: "e (h d)" }\n')
    assert Recipe.loads(SMALL).merge(top) == Recipe.load(tmp_path / "big.yaml")
    with pytest.raises(RecipeError, match=r"merge takes an autotp\.Recipe, got dict"):
        top.merge({})


def test_merge_is_associative_and_idempotent():
    a, b, c = Recipe.load("llama"), Recipe.loads("shard: [kv]\n"), Recipe.loads('sizes: { i: 3 }\nwhole: { norm.weight: "e" }\n')
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(a) == a


def test_extends_in_a_circle(tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    with pytest.raises(RecipeError, match="extends itself"):
        Recipe.load(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", r"x.yaml:1:5: not YAML"),
        ("- a", "wanted a mapping"),
        ("sizes: { 1a: 3 }", r"x.yaml:1:14: sizes.1a: '1a' cannot be the name of a factor"),
        ("sizes: { a: f(x) }", r"f\(x\) may not stand in a size"),
        ("sizes: { a: 0 }", "wanted a positive number"),
        ("shard: [a b c]", "wanted a name, or a major and a minor name"),
        ("shard: [a, a]", "a stands twice; first at x.yaml:1:9"),
        ('column: { q.weight: "a b" }\nrow: { q.weight: "a b" }', "q.weight stands in column and in row; first at x.yaml:1:11"),
        ("column: { .q: a }", "'.q' is no name"),
        ("column: { q.weight: a | b }", r"x.yaml:1:23: q.weight: layout 'a | b': \| outside of parentheses"),
        ("column: { q.weight: { layot: a } }", r"x.yaml:1:23: unknown key 'layot'; did you mean layout\?"),
        ("column: { x: null }", "takes out 'x', which is not inherited"),
        ("on: 3", "YAML reads the key on as a truth value"),
        ("arguments: { m: { x: leave } }", "wanted an argument's name with `enter` or a layout"),
        ("extends: nowhere", "extends 'nowhere': no recipe 'nowhere'"),
        ("reason: because", "says why a recipe is unsafe, and this one is not"),
        ("plan: { model: 3 }", r"x.yaml:1:1: plan: not what a plan is written as"),
        ("about: a\nplan: { model: a, tp: 2 }", r"x.yaml:2:1: plan: not what a plan is written as"),
        ('column: { q.weight: "(h | ) e" }', r"x.yaml:1:25: q.weight: layout '\(h \| \) e': nothing stands behind the \|"),
        ('column: { q.weight: "( | h) e" }', r"nothing stands before the \|"),
        ("sizes: { h: '-1' }", r"x.yaml:1:14: sizes.h: size '-1': -1 may not stand in a size"),
        ("sizes: { h: a / 2 }", r"size 'a / 2': a / 2 may not stand in a size"),
        ("sizes: { h: a in b }", r"size 'a in b': a in b may not stand in a size"),
        ("sizes: { h: a + f(b) }", r"size 'a \+ f\(b\)': f\(b\) may not stand in a size"),
        ("sizes: { h: a.5 }", r"is no expression"),
        ("granules: { i: 0 }", "granules.i: got 0"),
        ("a: &x [*x]", "an alias that contains itself"),
    ],
)
def test_mistakes_of_form(text, message):
    with pytest.raises(RecipeError, match=message):
        Recipe.loads(text, file="x.yaml")


def test_words_of_yaml_in_quotes_are_text():
    assert read('a: "no"\nb: true\n', "x").problems == []
    assert read('a: "no"\nb: true\n', "x").data == {"a": "no", "b": True}


def test_a_dict_has_no_lines():
    with pytest.raises(RecipeError, match=r"<dict>: unknown key 'colum'"):
        Recipe.load({"colum": {}})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r, _: Recipe.from_plan(r), "from_plan takes an autotp.Plan, got Recipe"),
        (lambda r, _: r.to_plan({}, tp=2), "to_plan takes an nn.Module, got dict"),
        (lambda r, _: r.to_plan(nn.Linear(2, 2)), "needs tp=, the number of ranks; got None"),
        (lambda r, _: r.to_plan(nn.Linear(2, 2), tp=0), "got 0"),
        (lambda r, _: Recipe.loads(3), "loads takes YAML text, got int"),
        (lambda r, folder: r.dump(folder), "cannot be written"),
        (lambda r, _: Recipe.loads("a: " + "[" * 3000), "nested too deep"),
        (lambda r, folder: Recipe.load(folder), "no recipe|no such recipe file"),
    ],
)
def test_bad_input_is_an_error_of_ours(tmp_path, call, message):
    with pytest.raises(autotp.AutoTPError, match=message):
        call(Recipe.loads(SMALL), tmp_path)


def test_public_names():
    assert autotp.Recipe is Recipe
    assert len(autotp.__all__) <= 16
