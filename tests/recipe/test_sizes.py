"""Sizes: arithmetic over the fields of a config, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from torch import nn

from autotp.errors import InputError
from autotp.recipe.config_fields import expressions
from autotp.recipe.patterns import Pattern, best, nearest
from autotp.recipe.sizes import parse_size, size_of


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            heads=8, kv=4, none=None, new=True, width=64, text=SimpleNamespace(width=32), per_layer=[3, 5], odd=2.5
        )
        self.own = 7
        self.layer = nn.Linear(4, 40)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (12, 12),
        ("heads", 8),
        ("heads // kv", 2),
        ("none or width // heads", 8),
        ("missing or width", 64),
        ("kv if new else heads", 4),
        ("1 if not new else 2 * heads + 3 - 1", 18),
        ("text.width", 32),
        ("per_layer[1]", 5),
        ("own", 7),
        ("heads if kv == 4 else 1", 8),
        ("width % 24", 16),
    ],
)
def test_values(text, value):
    assert size_of(text, Model()) == value


def test_none_counts_as_missing():
    with pytest.raises(InputError, match="has no field 'none'"):
        size_of("none", Model())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hedas", "SimpleNamespace has no field 'hedas'; near it: heads"),
        ("odd", "is 2.5, wanted a positive int"),
        ("new", "is True, wanted a positive int"),
        ("kv - heads", "is -4, wanted a positive int"),
        ("heads // 0", "cannot be computed"),
        ("text", "wanted a positive int"),
        ("per_layer[9]", "cannot be computed"),
        ("layer.weight", "size 'layer.weight' is of type Parameter, wanted a positive int"),
        ("1 if layer.weight else 2", "size '1 if layer.weight else 2' cannot be computed: .*Boolean value"),
    ],
)
def test_bad_values(text, message):
    with pytest.raises(InputError, match=message):
        size_of(text, Model())


@pytest.mark.parametrize("text", ["f()", "lambda: 1", "[1]", "a ** 2", "a / 2", "__import__('os')", "a; b", "a = 1", "'a' + b @ c", "1.5"])
def test_nothing_else_is_read(text):
    with pytest.raises(InputError):
        parse_size(text)


def test_most_specific_key_wins():
    keys = [Pattern(k) for k in ("weight", "proj.weight", "*_proj.weight", "layers.*.up_proj.weight", "layers.1.up_proj.weight")]
    assert best(keys, "layers.0.up_proj.weight") == [3]
    assert best(keys, "layers.1.up_proj.weight") == [4]
    assert best(keys, "down_proj.weight") == [2]
    assert best(keys, "my.proj.weight") == [1]
    assert best(keys, "norm.weight") == [0]
    assert best(keys, "bias") == []
    assert not Pattern("q.weight").matches("qq.weight")
    assert Pattern("a.*.b").matches("x.a.3.b")
    assert not Pattern("a.*.b").matches("a.3.4.b")
    assert Pattern("").matches("")
    assert not Pattern("").matches("a")


def test_nearest():
    assert nearest("q_prj.weight", ["layers.0.q_proj.weight", "norm.weight"]) == "; did you mean q_proj.weight?"
    assert nearest("zzz", ["layers.0.q_proj.weight"]) == ""


def test_sizes_that_a_program_writes():
    config = SimpleNamespace(num_attention_heads=16, num_key_value_heads=4, hidden_size=128, vocab_size=128, pad_token_id=8)
    found = expressions({"kv": 4, "group": 4, "d": 8, "e": 128, "v": 128, "i": 512, "n": 77}, config)
    assert found == {
        "kv": "num_key_value_heads", "group": "num_attention_heads // num_key_value_heads", "d": "hidden_size // num_attention_heads",
        "e": "hidden_size", "v": "vocab_size", "i": "4 * hidden_size", "n": 77,
    }  # fmt: skip
    assert expressions({"h": 16}, config) == {"h": "num_attention_heads"}
