"""The text of a plan: every parameter has a row and a kind, a reason is said once, explanations take the ends of names."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import autotp
from autotp.errors import InputError
from autotp.plan.kinds import Kind, kinds
from autotp.plan.plan import Plan
from autotp.plan.rows import table
from tests.support.families import transformer

WIDTH = "it carries the width of the model"


@pytest.fixture(scope="module")
def llama() -> Plan:
    return autotp.plan(transformer("llama", num_hidden_layers=3), tp=2, check="graph")


class Gated(nn.Module):
    """A norm over heads inside of a region, two products that are summed together, and a bias of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.up, self.gate = nn.Embedding(4096, 8), nn.Linear(8, 16), nn.Linear(8, 16)
        self.scale, self.down, self.side = nn.Parameter(torch.ones(16)), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Returns ids → width 8."""
        x = self.table(ids)
        wide = self.up(x).relu() * self.gate(x) * self.scale
        return self.down(wide) + self.side(wide)


def test_kinds_follow_from_what_runs():
    plan = autotp.plan(Gated(), tp=2, example_inputs={"ids": torch.zeros(2, 3, dtype=torch.long)})
    found = kinds(plan)
    assert {name: found[f"{name}.weight"] for name in ("table", "up", "gate", "down", "side")} == {
        "table": Kind.VOCABULARY,
        "up": Kind.COLUMN,
        "gate": Kind.COLUMN,
        "down": Kind.ROW,
        "side": Kind.ROW,  # one of the two has no sum of its own: their sums are made together
    }
    assert (found["up.bias"], found["down.bias"], found["scale"]) == (Kind.COLUMN, Kind.WHOLE, Kind.PART)


def test_kinds_of_experts():
    plan = autotp.plan(transformer("mixtral"), tp=2, check="graph")
    found = {name.rpartition(".")[2]: kind for name, kind in kinds(plan).items() if ".experts." in name}
    assert found == {"gate_up_proj": Kind.EXPERTS, "down_proj": Kind.EXPERTS}
    assert kinds(plan)["lm_head.weight"] is Kind.VOCABULARY


def test_every_parameter_is_in_one_row_and_each_reason_is_said_once(llama):
    found = table(llama)
    assert sum(row.count for row in found.rows) == len(llama.params)
    assert len(found.reasons) == 1 and [r.note for r in found.rows if r.kind is Kind.WHOLE] == ["[1]"] * 3
    text = str(llama)
    assert text.count(WIDTH) == 1 and text.count("[1]") == 4
    assert "×3" in text and "row-parallel" in text


def test_reasons_that_differ_are_told_apart(llama):
    """A control: another reason of one norm is a second entry, and its rows are told apart."""
    name = "model.norm.weight"
    params = {**llama.params, name: replace(llama.params[name], reason="asked for")}
    found = table(replace(llama, params=params))
    assert found.reasons[1:] == ("asked for",)
    assert list(found.names(2)) == [name]
    assert list(found.names(1)) == ["model.layers.*.input_layernorm.weight (×3)", "model.layers.*.post_attention_layernorm.weight (×3)"]


@pytest.mark.parametrize("end", ["self_attn.q_proj", "q_proj", "q_proj.weight"])
def test_the_last_parts_of_a_name_explain_all_that_end_so(llama, end):
    text = llama.explain(end)
    assert text.startswith("3 are alike but for numbers: model.layers.*.self_attn.q_proj")
    assert text.count("sharded along dim 0 (attention)") == 1
    assert "from model.layers.0.self_attn.q_proj" in text and "to model.layers.2.self_attn.q_proj" in text


def test_whole_names_go_before_ends(llama):
    """A control: one layer is explained alone."""
    whole = llama.explain("model.layers.1.self_attn.q_proj")
    assert "alike" not in whole and whole.startswith("model.layers.1.self_attn.q_proj.weight")
    assert whole in llama.explain("layers.1.self_attn.q_proj")


def test_what_is_not_alike_is_explained_by_itself(llama):
    name = "model.layers.1.self_attn.q_proj.weight"
    changed = replace(llama, params={**llama.params, name: replace(llama.params[name], axis="other")})
    text = changed.explain("q_proj")
    assert text.startswith("2 are alike but for numbers") and "\n\nmodel.layers.1.self_attn.q_proj.weight" in text


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("model.layers.0.self_atn", "model.layers.0.self_attn"),
        ("self_atn", "self_attn"),
        ("self_attn.q_prj", "self_attn.q_proj"),
        ("q_proj.weigt", "q_proj.weight"),
        ("model.layers.0.self_attn.q_prjo.weight", "model.layers.0.self_attn.q_proj.weight"),
        ("mlp.nothing_like_it_here", ""),
        ("proj", ""),  # a part of a name counts as a whole
    ],
)
def test_a_near_miss_gets_a_suggestion(llama, wrong, near):
    with pytest.raises(InputError) as caught:
        llama.explain(wrong)
    text = str(caught.value)
    assert text.startswith(f"the plan has no parameter or module {wrong!r}")
    assert near in text if near else True
    assert ("near it" in text) or not near


def test_attributes_are_explained(llama):
    plan = autotp.plan(transformer("gpt2"), tp=2, check="graph")
    attribute = next(iter(plan.attributes))
    assert attribute.rpartition(".")[2] in plan.explain(attribute)
    with pytest.raises(InputError):
        plan.explain(attribute + "x")
