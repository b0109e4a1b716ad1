"""Mistakes in recipes: each is found before anything is changed, with its place, what was found and what was wanted.

Every case changes a bundled recipe in one respect. The control is the recipe without the change, which passes.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from torch import nn

import autotp
from autotp.errors import RecipeError
from autotp.recipe import bundled
from tests.support.families import transformer
from tests.support.slow import halved, swept


@cache
def model(name: str) -> nn.Module:
    fields = {"llama": {"num_key_value_heads": 4}, "deepseek_v3": {"experts": "eager"}, "mixtral": {"experts": "eager"}}
    return transformer(name, **fields.get(name, {}))


def changed(folder: Path, name: str, *changes: tuple[str, str]) -> tuple[Path, str]:
    """A file with the changed text of a bundled recipe."""
    text = (bundled.folder() / f"{name}.yaml").read_text(encoding="utf-8")
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    file = folder / f"{name}.yaml"
    file.write_text(text, encoding="utf-8")
    return file, text


def place(text: str, part: str, after: str = "", at: str = "") -> str:
    """line:column of `at` (of `part` itself) in the first line that has `part`, behind the first one that has `after`."""
    lines = text.splitlines()
    start = next((i for i, line in enumerate(lines) if after and after in line), 0)
    number = next(i for i in range(start, len(lines)) if part in lines[i])
    return f"{number + 1}:{lines[number].index(at or part) + 1}"


#: what → recipe, changes, (part of the line with the mistake, what is pointed at in it), texts in the message
Q, K = 'self_attn.q_proj.weight: "(kv group d) e"', 'self_attn.k_proj.weight: "(kv d) e"'
DOWN, FUSED = '  mlp.down_proj.weight: "e i"\n', '"(h d | h d | h d)"'
MISTAKES: dict[str, tuple[str, list[tuple[str, str]], tuple[str, str], list[str]]] = {
    "unknown section": ("llama", [("gathered:", "gatherd:")], ("gatherd", ""), ["unknown key 'gatherd'; did you mean gathered?"]),
    "unmatched key": ("llama", [("q_proj.weight", "q_prj.weight")], ("self_attn.q_prj", ""), ["did you mean self_attn.q_proj.weight?"]),
    "sizes": (
        "llama",
        [(K, K.replace("(kv d)", "(kv kv d)"))],
        ("k_proj.weight", "(kv kv d) e"),
        ["model.layers.0.self_attn.k_proj.weight", "(4·4·8) = 128, wanted 32"],
    ),
    "dims": (
        "llama",
        [(K, K.replace("(kv d) e", "(kv d)"))],
        ("k_proj.weight", "(kv d)"),
        ["1 dims are written, the shape [32, 64] has 2"],
    ),
    "size of another field": ("llama", [("i: intermediate_size", "i: hidden_size")], ("gate_proj.weight", "i e"), ["i = 64, wanted 128"]),
    "unknown field": (
        "gpt2",
        [("h: num_attention", "h: num_atention")],
        ("num_atention_heads", ""),
        ["GPT2Config", "near it: num_attention_heads"],
    ),
    "column without its row": (
        "llama",
        [(DOWN, ""), ("whole:\n", 'whole:\n  mlp.down_proj.weight: "e n"\n')],
        ("gate_proj.weight", "i e"),
        ["a column without its row", "no row in model.layers.0 is cut along i"],
    ),
    "row without its columns": (
        "opt",
        [('  fc1.weight: "i e"\n  fc1.bias?: "i"\n', ""), ("whole:\n", 'whole:\n  fc1.weight: "n e"\n  fc1.bias?: "n"\n')],
        ("fc2.weight", "e i"),
        ["a row without its column"],
    ),
    "bias contradicts weight": (
        "gpt2",
        [(f"c_attn.bias: {FUSED}", 'c_attn.bias: "(h 3 d)"')],
        ("c_attn.bias", "(h 3 d)"),
        ['contradicts its weight, "e (h d | h d | h d)"'],
    ),
    "bias whole": (
        "gpt2",
        [(f"  attn.c_attn.bias: {FUSED}\n", ""), ("whole:\n", 'whole:\n  attn.c_attn.bias: "n"\n')],
        ("c_attn.bias", 'n"'),
        ["is whole, and its weight is column"],
    ),
    "row bias on every rank": (
        "gpt2",
        [('  attn.c_proj.bias: "e"\n', ""), ("whole:\n", 'whole:\n  attn.c_proj.bias: "e"\n')],
        ("attn.c_proj.bias", "e"),
        ["added once, not on every rank"],
    ),
    "heads cut in q but not in k": (
        "llama",
        [(f"  {K}\n", ""), ("whole:\n", f"whole:\n  {K}\n")],
        ("k_proj.weight", "(kv d) e"),
        ["is whole, and kv is cut"],
    ),
    "heads cut in q but not in k, otherwise named": (
        "llama",
        [(f"  {K}\n", ""), ("whole:\n", 'whole:\n  self_attn.k_proj.weight: "n e"\n')],
        ("k_proj.weight", "n e"),
        ["is whole beside model.layers.0.self_attn.v_proj.weight"],
    ),
    "heads cut in q but not in k, said to be inside": (
        "llama",
        [(f"  {K}\n", ""), ("inside:\n", 'inside:\n  self_attn.k_proj.weight: "n e"\n')],
        ("k_proj.weight", "n e"),
        ["is not proven", "(kv* d) e"],
    ),
    "attribute not named": ("gpt2", [('  attn.split_size: "(h d)"\n', "")], ("attn.c_attn.nf", ""), ["attn.split_size", "64 → 32"]),
    "attribute wrong": (
        "gpt2",
        [('split_size: "(h d)"', 'split_size: "h"')],
        ("attn.split_size", ""),
        ['got 64 in the model, and "h" is 8'],
    ),
    "attribute unknown": ("gpt2", [("split_size", "splitsize")], ("attn.splitsize", ""), ["did you mean attn.split_size?"]),
    "attribute said to stay whole": (
        "gpt2",
        [('split_size: "(h d)"', "split_size: whole")],
        ("attn.split_size", ""),
        ["must become 32 on a rank, and the recipe makes it 64"],
    ),
    "key twice": ("gpt2", [('  wte.weight: "v e"\n', '  wte.weight: "v e"\n  wte.weight: "v e"\n')], ("", ""), ["stands twice; first at"]),
    "no is false": ("gpt2", [("shard: [h, i, v]", "shard: [h, no, v]")], ("shard", "no"), ["YAML reads no as False"]),
    "open parenthesis": (
        "gpt2",
        [(f"bias: {FUSED}", 'bias: "(h d | h d | h d"')],
        ("", ""),
        ["gpt2.yaml:20:38: ", "a parenthesis is not closed"],
    ),
    "bad character": ("gpt2", [(f"bias: {FUSED}", 'bias: "(h d | h $ | h d)"')], ("c_attn.bias", "$"), ["got '$', wanted a name"]),
    "interleaved for concatenated": (
        "gpt2",
        [
            (f"weight: {FUSED[:1]}e (h d | h d | h d)", 'weight: "e (h 3 d)'),
            (f"bias: {FUSED}", 'bias: "(h 3 d)"'),
            (f"nf: {FUSED}", 'nf: "(h 3 d)"'),
        ],
        ("c_attn.weight", "e (h 3 d)"),
        ["is not proven", "e (h* d | h* d | h* d2)"],
    ),
    "head width cut": (
        "gpt_neox",
        [("shard: [h,", "shard: [d,"), ('"_ h _ _"', '"_ d _ _"')],
        ("query_key_value.weight", "(h 3 d) e"),
        ["is not proven", "(h* d) e"],
    ),
    "unsafe without a reason": ("llama", [("recipe: llama", "recipe: llama\nunsafe: true")], ("unsafe", "true"), ["wants a reason"]),
    "wrong type": ("llama", [('gate_proj.weight: "i e"', "gate_proj.weight: 3")], ("gate_proj.weight", "3"), ["got 3, wanted a layout"]),
    "size that no layout has": ("gpt2", [("  h: num_att", "  hh: num_att")], ("hh:", "num_att"), ["sizes.hh: stands in no layout"]),
    "name in shard that no layout has": (
        "llama",
        [("shard: [kv group,", "shard: [kv group, hh,")],
        ("shard", "hh"),
        ["hh stands in no layout"],
    ),
    "granule of no layout": (
        "mixtral",
        [("granules: { i: 8 }", "granules: { ii: 8 }")],
        ("granules:", "8 }"),
        ["granules.ii: stands in no layout"],
    ),
    "granule of a name that is not cut": (
        "mixtral",
        [("granules: { i: 8 }", "granules: { e: 8 }")],
        ("granules:", "8 }"),
        ["granules.e: is not cut, so that it has no parts (shard: kv group, i, v)"],
    ),
    "granule larger than the dim": (
        "mixtral",
        [("granules: { i: 8 }", "granules: { i: 4096 }")],
        ("granules:", "4096"),
        ["granules.i: got 4096, wanted at most the size of i, which is "],
    ),
    "argument that the module does not have": (
        "bloom",
        [("alibi:", "aliby:")],
        ("aliby", ""),
        ["its forward has no argument 'aliby'; did you mean alibi?"],
    ),
    "module unknown": (
        "bloom",
        [("self_attention: {", "selfattention: {")],
        ("selfattention", "alibi"),
        ["no module is called selfattention"],
    ),
    "summed twice": (
        "deepseek_v3",
        [('  mlp.experts: { "": leave }', '  mlp: { "": leave }')],
        ("mlp.down_proj.weight", "e i"),
        ["would be summed twice"],
    ),
    "column inside a region": (
        "deepseek_v3",
        [
            ('  self_attn.kv_b_proj.weight: "(h (dn | dv)) r"\n', ""),
            ("column:\n", 'column:\n  self_attn.kv_b_proj.weight: "(h (dn | dv)) r"\n'),
        ],
        ("kv_b_proj", "(h (dn"),
        ["its input is inside a region already", "say part"],
    ),
    "router whole": (
        "deepseek_v3",
        [('  mlp.gate.weight: "x e"\n', ""), ("whole:\n", 'whole:\n  mlp.gate.weight: "x e"\n')],
        ("mlp.gate.weight", "x e"),
        ["its gradient is a partial sum; say inside"],
    ),
    "row cut along the wrong dim": (
        "opt",
        [('fc2.weight: "e i"', 'fc2.weight: "e2 e3"'), ("shard: [h, i,", "shard: [h, e2,")],
        ("fc2.weight", "e2 e3"),
        ["cuts dim 0", "is cut along dim 1"],
    ),
    "table that is no lookup": (
        "gpt2",
        [('lookup:\n  wte.weight: "v e"\n\ncolumn:\n', 'column:\n  wte.weight: "v e"\n')],
        ("wte.weight", "v e"),
        ["belongs to a Embedding: wanted lookup or part"],
    ),
}


@pytest.mark.parametrize("what", halved(MISTAKES))
def test_is_found(tmp_path, what):
    name, changes, (part, at), texts = MISTAKES[what]
    file, text = changed(tmp_path, name, *changes)
    before = dict(model(name).named_parameters())
    with pytest.raises(RecipeError) as caught:
        autotp.plan(model(name), tp=2, recipe=file)
    message = str(caught.value)
    for wanted in texts:
        assert wanted in message
    if part:
        assert f"{file}:{place(text, part, at=at)}: " in message
    assert all(before[n] is p for n, p in model(name).named_parameters())


@pytest.mark.parametrize("name", swept(sorted({m[0] for m in MISTAKES.values()}), "gpt2", "llama"))
def test_control(name):
    assert autotp.plan(model(name), tp=2, recipe=name).local_share < 0.76


def test_norm_of_queries_is_inside_of_the_region(tmp_path):
    key = 'self_attn.q_norm.weight?: "d"'
    file, _ = changed(tmp_path, "llama", (f"  {key}\n", ""), ("whole:\n", f"whole:\n  {key}\n"))
    with pytest.raises(RecipeError, match="d stands behind a cut name in its block: cut it as well, or say inside"):
        autotp.plan(transformer("qwen3"), tp=2, recipe=file)


def test_all_at_once_in_order(tmp_path):
    changes = [
        ("q_proj.weight", "q_prj.weight"),
        ('gate_proj.weight: "i e"', 'gate_proj.weight: "i i"'),
        ("e: hidden_size", "e: hiden_size"),
    ]
    file, _ = changed(tmp_path, "llama", *changes)
    with pytest.raises(RecipeError) as caught:
        autotp.plan(model("llama"), tp=2, recipe=file)
    assert len(caught.value.problems) >= 3
    assert all(p.startswith(f"{file}:") for p in caught.value.problems)


def test_problems_of_many_layers_are_one(tmp_path):
    file, _ = changed(tmp_path, "llama", (K, K.replace("(kv d)", "(kv kv d)")))
    with pytest.raises(RecipeError) as caught:
        autotp.plan(model("llama"), tp=2, recipe=file)
    assert len(caught.value.problems) == 1
