"""Texts that are no recipes: whatever they hold, the answer is an error with a place, and it comes soon."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest

from autotp.errors import InputError, RecipeError
from autotp.recipe.recipe import Recipe
from autotp.recipe.yaml_source import MOST, MOST_LEVELS, read

LETTERS = "abcdefgh"
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in pairwise(LETTERS))
CHAIN = "k0: &k0 [x]\n" + "".join(f"k{i}: &k{i} [*k{i - 1}]\n" for i in range(1, 2000))
BAD = {
    "aliases of aliases": (BOMB, "aliases repeat more than 10000 entries"),
    "a chain of aliases": (CHAIN, "nested too deep"),
    "brackets": ("a: " + "[" * 5000, "nested too deep"),
    "lists": ("a: " + "[" * 100 + "]" * 100, "nested too deep"),
    "an alias of itself": ("a: &a [*a]", "contains itself"),
    "a large file": ("# no\n" * MOST, "wanted at most"),
    "a NUL": ("a: \0", "not YAML"),
    "thousands of digits": ("granules: {h: " + "9" * 5000 + "}", "digits"),
    "no date": ("about: 2024-99-99", "month must be"),
    "parentheses in a layout": ("column: {q: '" + "(" * 5000 + "'}", "parentheses too deep"),
    "a large number in a layout": ("column: {q: '(h*" + "9" * 5000 + " d) e'}", "a number this large"),
    "a long size": ("sizes: {h: '" + "-" * 5000 + "1'}", "wanted at most 500"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_text_is_refused_soon(name):
    text, message = BAD[name]
    started = time.process_time()
    with pytest.raises(RecipeError, match=message):
        Recipe.loads(text)
    assert time.process_time() - started < 10


def test_a_few_aliases_are_read():
    source = read("a: &a [1, 2]\nb: [*a, *a]\n", "x.yaml")
    assert source.data == {"a": [1, 2], "b": [[1, 2], [1, 2]]}
    assert not source.problems


def test_data_of_a_program_may_be_as_wrong():
    deep: dict[str, object] = {}
    inner = deep
    for _ in range(MOST_LEVELS + 10):
        inner["a"] = inner = {}
    with pytest.raises(RecipeError, match="nested too deep"):
        Recipe.load(deep)
    ring: dict[str, object] = {}
    ring["a"] = ring
    with pytest.raises(RecipeError, match="nested too deep"):
        Recipe.load(ring)


@pytest.mark.parametrize("name", ["a" * 5000, "/a" * 5000 + ".yaml", "a\0b"])
def test_a_name_that_no_file_can_have(name):
    with pytest.raises(RecipeError, match=r"no .*recipe"):
        Recipe.load(name)


def test_bytes_that_are_no_text(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_bytes(bytes(range(256)))
    with pytest.raises(RecipeError, match="not text in UTF-8"):
        Recipe.load(file)
    file.write_bytes(b"#" * (MOST + 1))
    with pytest.raises(RecipeError, match="larger than"):
        Recipe.load(file)


def test_text_times_a_number_is_no_size():
    from torch import nn

    from autotp.recipe.sizes import size_of

    with pytest.raises(InputError, match="no arithmetic of whole numbers"):
        size_of("'x' * 9999999999", nn.Linear(2, 2))
