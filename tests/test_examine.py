"""A plan whose numbers differ is made again without what is wrong; a large model is judged by its twin."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import autotp
from autotp.axes import rules


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
    monkeypatch.setitem(rules.RULES, "softmax", rules.pointwise)


@pytest.mark.parametrize("tp", [2, 3])
def test_a_wrong_rule_is_caught_and_the_rest_stays_sharded(wrong_softmax, tp: int) -> None:
    x = {"x": torch.randn(2, 5, 16)}
    assert autotp.plan(Softly(), tp=tp, example_inputs=x, check="graph").params["a.weight"].layout.dim is not None
    plan = autotp.plan(Softly(), tp=tp, example_inputs=x)
    assert plan.checked == "numbers"
    assert plan.params["a.weight"].layout.dim is None and "numbers differ" in plan.params["a.weight"].reason
    assert plan.params["c.weight"].layout.dim is not None
    assert "checked: numbers" in str(plan) and plan.to_dict()["checked"] == "numbers"


def test_a_large_model_without_weights_is_judged_by_its_twin() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model("llama", num_hidden_layers=4, vocab_size=1000, hidden_size=1024, intermediate_size=2048)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    plan = autotp.plan(model, tp=4)
    assert plan.checked == "numbers of a smaller twin" and plan.local_share < 0.3
    model.model.layers[1].mlp.act_fn = nn.Tanh()
    assert "not what its config builds" in autotp.plan(model, tp=4).checked
