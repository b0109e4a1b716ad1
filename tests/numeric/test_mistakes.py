"""Every mistake that a plan could have is caught by its numbers."""

from __future__ import annotations

import inspect

import pytest
import torch

import autotp
from autotp.inputs.paths import user_examples
from autotp.numeric.check import judge
from autotp.testing.sabotage import mutations
from tests.models.custom import CUSTOM

MODELS = {entry.name: entry for entry in CUSTOM}
CASES = [("fused_qkv", 2), ("one_projection_grouped", 3), ("per_head", 2), ("gqa_two_kv", 4), ("parallel_residual", 2)]
#: A key's bias moves all scores of a query alike, so that its gradient is zero, summed or not.
HARMLESS = {"drop the gradient's sum of b.bias in b"}


@pytest.mark.parametrize(("name", "tp"), CASES)
def test_no_mistake_survives(name: str, tp: int) -> None:
    entry = MODELS[name]
    torch.manual_seed(0)
    model = entry.factory()
    inputs = dict(zip(inspect.signature(model.forward).parameters, entry.inputs(model), strict=False))
    plan = autotp.plan(model, tp=tp, example_inputs=inputs, check="graph")
    examples = user_examples(model, inputs)
    right = judge(model, examples, plan)
    assert not right.unknown and right.module is None
    made = [m for m in mutations(plan) if m.old is not None]
    assert len(made) > 3
    survived = {str(m) for m in made if judge(model, examples, m.change(plan)).module is None}
    assert survived <= HARMLESS if name == "gqa_two_kv" else not survived
