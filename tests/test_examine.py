"""A plan whose numbers differ is made again without what is wrong; a large model is judged by its twin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autotp
from autotp import Plan
from autotp import examine as examine_module
from autotp.errors import PlanError
from autotp.numeric.check import Verdict
from autotp.planner.bans import Accused
from autotp.planner.make_plan import Examined, make_plan
from tests.support.rules import give_rule


class Softly(nn.Module):
    """A softmax over what is sharded in one region, and a region without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.c, self.d = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        x = self.b(self.a(x).softmax(-1))
        return self.d(self.c(x).tanh())


@pytest.fixture
def wrong_softmax(monkeypatch):
    """A rule that takes softmax for an operator on elements."""
    give_rule(monkeypatch, "softmax")


@pytest.mark.parametrize("tp", [2, 3])
def test_a_wrong_rule_is_caught_and_the_rest_stays_sharded(wrong_softmax, tp: int) -> None:
    x = {"x": torch.randn(2, 5, 16)}
    assert autotp.plan(Softly(), tp=tp, example_inputs=x, check="graph").params["a.weight"].layout.dim is not None
    plan = autotp.plan(Softly(), tp=tp, example_inputs=x)
    assert plan.checked == "numbers"
    assert plan.params["a.weight"].layout.dim is None and "numbers differ" in plan.params["a.weight"].reason
    assert plan.params["c.weight"].layout.dim is not None
    assert "checked: numbers" in str(plan) and plan.to_dict()["checked"] == "numbers"


@pytest.mark.sweep
def test_a_large_model_without_weights_is_judged_by_its_twin() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("llama", num_hidden_layers=4, vocab_size=1000, hidden_size=1024, intermediate_size=2048)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    plan = autotp.plan(model, tp=4)
    assert plan.checked == "numbers of a smaller twin" and plan.local_share < 0.3
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    assert "not what its config builds" in autotp.plan(model, tp=4).checked


class Regions(nn.Module):
    """Two regions with a norm between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(16, 24), nn.Linear(24, 16), nn.LayerNorm(16)
        self.c, self.d = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x):
        x = self.n(x + self.b(self.a(x).tanh()))
        return x + self.d(self.c(x).tanh())


@pytest.mark.parametrize(("module", "backward", "whole"), [("n", False, "a"), ("n", True, "c"), ("c", False, "c"), (None, False, "ac")])
def test_what_is_accused_is_what_the_numbers_came_through(module: str | None, backward: bool, whole: str) -> None:
    """A wrong result was made before, a wrong gradient after; where nothing can be told everything stays whole."""
    told: list[Plan] = []

    def examine(plan: Plan, _: object) -> Examined:
        told.append(plan)
        return Examined("so", (Accused(module, "it is wrong", backward),) if len(told) == 1 else ())

    plan = make_plan(Regions(), 2, {"x": torch.randn(2, 5, 16)}, examine=examine)
    assert plan.checked == "so" and len(told) == 2
    for region in "ac":
        p = plan.params[f"{region}.weight"]
        assert (p.layout.dim is None) == (region in whole)
        assert ("it is wrong" in p.reason) == (region in whole)


def test_a_model_that_is_wrong_with_everything_whole_is_refused() -> None:
    wrong = lambda plan, _: Examined("so", (Accused(None, "it is wrong"),))  # noqa: E731
    with pytest.raises(PlanError, match="cannot be made parallel, even with everything whole on each rank: it is wrong"):
        make_plan(Regions(), 2, {"x": torch.randn(2, 5, 16)}, examine=wrong)


def test_what_is_wrong_with_the_twin_stays_whole_in_the_model(monkeypatch) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("llama", num_hidden_layers=4, vocab_size=1000, hidden_size=1024, intermediate_size=2048)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    judged: list[Plan] = []

    def judge(twin: nn.Module, examples: object, plan: Plan) -> Verdict:
        judged.append(plan)
        return Verdict(module="model.layers.1.mlp.down_proj", reason="it is wrong") if len(judged) == 1 else Verdict()

    monkeypatch.setattr(examine_module, "judge", judge)
    plan = autotp.plan(model, tp=4)
    assert plan.checked == "numbers of a smaller twin"
    for name, p in plan.params.items():
        assert ".mlp." not in name or (p.layout.dim is None and "it is wrong" in p.reason), name
    assert plan.params["model.layers.3.self_attn.q_proj.weight"].layout.dim == 0


def test_a_twin_says_nothing_of_what_is_whole_in_it() -> None:
    planned = [autotp.plan(Regions(), tp=tp, example_inputs={"x": torch.randn(2, 5, 16)}, check="graph") for tp in (2, 1)]
    text = examine_module._but_for(*planned)
    assert text == ", but for a.weight, a.bias, b.weight, c.weight, c.bias, d.weight: whole in the twin"
    assert examine_module._but_for(planned[0], planned[0]) == ""
