"""The page of a plan: it stands alone, nothing breaks out of its text, and it says what the plan says."""

from __future__ import annotations

import base64
import hashlib
import re
import sys
from dataclasses import replace

import pytest
import torch
from torch import nn

import autotp
from autotp.errors import InputError
from autotp.plan.kinds import Kind, kinds
from autotp.plan.page.outline import Block, outline
from autotp.plan.plan import Plan
from autotp.plan.rows import table
from tests.support.families import transformer
from tests.support.html import Page

HOSTILE = "<script>alert(1)</script>"
QUOTES = "\" onclick='alert(2)' x=\""


class Hostile(nn.Module):
    """Names that would be markup; a dot is the one sign that a module's name cannot have."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module(HOSTILE, nn.Linear(4, 8))
        self.add_module(QUOTES, nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what two products give."""
        first, second = self.children()
        return second(first(x).relu())


@pytest.fixture(scope="module")
def llama() -> Plan:
    return autotp.plan(transformer("llama", num_hidden_layers=3), tp=2, check="graph")


@pytest.fixture(scope="module")
def page(llama) -> Page:
    return Page(llama.to_html())


def test_the_page_stands_alone(llama, page):
    text = llama.to_html()
    assert page.open == [] and page.tags.isdisjoint(("link", "img", "iframe", "object", "base", "form"))
    assert "://" not in text and "@import" not in text and "url(" not in text and " src=" not in text
    assert text.count("prefers-color-scheme: dark") == 2 and text.count("<style>") == 1
    script = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script[0].encode()).digest()).decode()
    assert len(script) == 1 and f"script-src &#39;sha256-{digest}&#39;" in text


def test_names_cannot_break_out():
    plan = autotp.plan(Hostile(), tp=2, example_inputs={"x": torch.ones(2, 4)})
    plan = replace(plan, model=HOSTILE, notes=(HOSTILE,), checked=QUOTES)
    name = f"{HOSTILE}.bias"
    plan = replace(plan, params={**plan.params, name: replace(plan.params[name], reason=HOSTILE, axis=HOSTILE)})
    for text, scripts in ((plan.to_html(against={HOSTILE: replace(plan, tp=3)}), 1), (plan._repr_html_(), 0)):
        found = Page(text)
        assert found.open == [] and found.count["script"] == scripts
        assert not [a for a in found.attributes if a.startswith("on")]
        assert HOSTILE in found.text and QUOTES in found.text


def test_the_parser_of_these_tests_finds_what_breaks_out():
    """A control: the same names, not escaped."""
    found = Page(f'<p title="{QUOTES}">{HOSTILE}</p><b>')
    assert found.count["script"] == 1 and "onclick" in found.attributes and found.open == ["b"]


def test_blocks_are_folded_and_say_what_is_sent(llama, page):
    text = page.visible
    assert "layers.0…2 ×3" in text and "layers.1" not in text
    hidden = llama.params["model.norm.weight"].layout.shape[0]
    assert text.count(f"all-reduce, forward: {2 * hidden} B a token") == 3
    assert "q_proj.weight column-parallel" in text and "o_proj.weight row-parallel" in text
    assert "Layout (h* d) e. Cut along dim 0 (attention)." in text
    assert "Layout e. Whole on every rank: it carries the width of the model" in text


def test_every_parameter_is_in_the_outline_once(llama):
    def count(block: Block) -> int:
        return block.count * (len(block.lines) + sum(map(count, block.blocks)))

    root = outline(llama, table(llama), torch.bfloat16)
    assert count(root) == len(llama.params)
    arrows = {(a.kind, a.when) for b in _all(root) for a in (*b.entering, *b.leaving)}
    assert arrows == {(t.kind, t.when) for t in llama.traffic}


def test_blocks_that_differ_are_not_folded(llama):
    """A control: one parameter of one layer has another reason."""
    name = "model.layers.1.input_layernorm.weight"
    changed = replace(llama, params={**llama.params, name: replace(llama.params[name], reason="asked for")})
    names = [b.name for b in _all(outline(changed, table(changed), torch.bfloat16))]
    assert {"0", "1", "2"} <= set(names) and "layers.0…2" not in names


def _all(block: Block) -> list[Block]:
    return [block, *(found for inside in block.blocks for found in _all(inside))]


def test_memory_is_that_of_the_weights(llama, page):
    elements = sum(p.numel() for p in transformer("llama", num_hidden_layers=3).parameters())
    assert f"{elements:,} parameters" in page.visible
    whole = Page(llama.to_html(dtype=torch.float32)).visible
    assert "Memory of weights, in float32" in whole and whole != page.visible


def test_against_another_tp_and_itself(llama):
    other = autotp.plan(transformer("llama", num_hidden_layers=3), tp=3, check="graph")
    text = Page(llama.to_html(against={"tp=3": other, "itself": llama})).visible
    first, _, second = text.partition("Against itself")
    assert "Against tp=3: LlamaForCausalLM over tp=3" in first
    assert "Cut in other ways" in first and ", padded" in first
    assert f"{len(llama.params)} parameters are cut in the same way." in second and "Cut in other ways" not in second


def test_a_plan_of_thousands_of_parameters_is_below_one_megabyte(llama):
    """None of them is like another, so nothing folds; the page says what it leaves out."""
    p = llama.params["model.layers.0.self_attn.q_proj.weight"]
    names = (f"model.a{i // 50}.block_{i}.self_attention.q_proj.weight" for i in range(6000))
    text = replace(llama, params={name: replace(p, name=name) for name in names}).to_html()
    assert len(text.encode()) < 1_000_000 and "more rows are left out" in text and "more are left out" in text
    assert Page(text).open == []


def test_what_is_refused(llama, monkeypatch):
    with pytest.raises(InputError, match=r"dtype is 'bfloat16', wanted a torch\.dtype"):
        llama.to_html(dtype="bfloat16")
    with pytest.raises(InputError, match="against is no mapping"):
        llama.to_html(against=[llama])
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(InputError, match="pip install 'autotp"):
        llama.to_html()
    assert Page(llama._repr_html_()).open == []  # a notebook needs none


def test_the_short_form_of_notebooks(llama):
    text = llama._repr_html_()
    found = Page(text)
    present = set(kinds(llama).values())
    assert found.tags.isdisjoint(("script", "link", "style", "html")) and len(text) < 20_000
    assert all(f"{kind}: " in found.visible for kind in present)
    assert not any(f"{kind}: " in found.visible for kind in set(Kind) - present)
    assert found.visible.count("it carries the width of the model") == 1
