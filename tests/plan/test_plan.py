"""`Plan` is a value: what is copied, pickled and replaced is one again, and equal."""

from __future__ import annotations

import copy
import pickle
from dataclasses import fields, replace

import pytest

import autotp
from autotp.plan.plan import Plan
from autotp.plan.spec import PlanSpec
from tests.support.families import transformer


@pytest.fixture(scope="module")
def plan() -> Plan:
    return autotp.plan(transformer("llama"), tp=2)


@pytest.mark.parametrize("again", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy, replace])
def test_copies_are_plans(plan, again):
    made = again(plan)
    assert type(made) is Plan and made == plan and str(made) == str(plan)
    assert repr(made).startswith("Plan(model='LlamaForCausalLM', tp=2, params=mappingproxy(")


def test_equal_plans_have_one_hash(plan):
    again = pickle.loads(pickle.dumps(plan))
    assert {plan: 1}[again] == 1 and len({plan, again, replace(plan, tp=3)}) == 2
    assert hash(autotp.Recipe.from_plan(plan)) == hash(autotp.Recipe.from_plan(again))


def test_a_plan_has_the_fields_of_its_spec_and_no_others(plan):
    assert fields(Plan) == fields(PlanSpec)
    with pytest.raises(TypeError):
        plan.params["x"] = None
    with pytest.raises(AttributeError):
        plan.tp = 3
