"""Which partial sums are reduced together, and what the plan says about those that are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import autotp
from autotp import Plan
from autotp.plan.conversions import Op
from tests.models.custom import WIDTH
from tests.models.parallel import APART, JOINT, OneTwice, ParallelBlock, Residual, Returned, SharedExit, Stack, ThreeBlock, Twins
from tests.support.families import transformer
from tests.support.slow import few, halved


def planned(model: nn.Module, tp: int = 2) -> Plan:
    return autotp.plan(model, tp=tp, example_inputs={"x": torch.randn(2, 3, WIDTH)})


def exits(plan: Plan) -> dict[str, list[Op]]:
    return {m.path: [c.op for s in m.outputs for c in s.conversions] for m in plan.modules if m.outputs}


def reductions(plan: Plan, when: str = "forward") -> Counter[str]:
    """All-reduces of activations by the first three names of the module."""
    reduced = (t for t in plan.traffic if t.kind == "all_reduce" and t.when == when and not t.elements)
    return Counter(".".join(t.module.split(".")[:3]) for t in reduced)


def single(plan: Plan) -> list[str]:
    return [n for n in plan.notes if "one by one" in n]


@pytest.mark.parametrize("kind", JOINT)
def test_summands_of_one_sum_are_reduced_once(kind: str) -> None:
    plan = planned(Stack(partial(ParallelBlock, kind)))
    found = exits(plan)
    for i in range(2):
        assert found[f"blocks.{i}.a.b"] == [Op.HOLD]
        assert found[f"blocks.{i}.m.b"] == [Op.JOIN, Op.REDUCE]
    assert {m.path: m.joint for m in plan.modules if m.joint} == {f"blocks.{i}": (("a.b", "m.b"),) for i in range(2)}
    assert sum(reductions(plan).values()) == sum(reductions(plan, "backward").values()) == 2
    assert not single(plan)


@pytest.mark.parametrize("kind", APART)
def test_other_sums_are_left_alone_and_the_plan_says_why(kind: str) -> None:
    plan = planned(Stack(partial(ParallelBlock, kind)))
    assert not any(m.joint for m in plan.modules)
    assert sum(reductions(plan).values()) == 4
    (note,) = single(plan)
    assert "blocks.*.a.b and blocks.*.m.b meet in a sum" in note
    assert APART[kind][1] in note


def test_three_summands() -> None:
    plan = planned(Stack(ThreeBlock))
    assert [m.joint for m in plan.modules if m.joint] == [(("a.b", "m.b", "k.b"),)] * 2
    assert [exits(plan)[f"blocks.1.{p}.b"] for p in "amk"] == [[Op.HOLD], [Op.HOLD], [Op.JOIN, Op.REDUCE]]


def test_two_results_through_one_module() -> None:
    plan = planned(Stack(SharedExit))
    assert [m.joint for m in plan.modules if m.joint] == [(("a.b", "m.b"),)] * 2


def test_a_sum_inside_the_later_module() -> None:
    plan = planned(Stack(Residual))
    assert [m.joint for m in plan.modules if m.joint] == [(("a.b", "m.two.b"),)] * 2


def test_a_sum_in_the_root() -> None:
    plan = planned(Returned(returns=False))
    assert {m.path: m.joint for m in plan.modules if m.joint} == {"": (("a.b", "m.b"),)}


def test_a_summand_that_is_returned() -> None:
    plan = planned(Returned())
    assert sum(reductions(plan).values()) == 2
    assert single(plan) == ["a.b and m.b meet in a sum but are all-reduced one by one: the result of a.b is used 2 times"]


@pytest.mark.parametrize("block", [Twins, OneTwice])
def test_blocks_that_share_their_plan_are_left_alone(block: Callable[[], nn.Module]) -> None:
    assert not any(m.joint for m in planned(Stack(block)).modules)


def test_a_sequential_model_has_no_note() -> None:
    assert not single(autotp.plan(transformer("llama"), tp=2))


def test_the_plan_shows_it() -> None:
    plan = planned(Stack(ParallelBlock))
    assert "in blocks.*: a.b (held), m.b (×2)" in str(plan)
    assert "the others zeros" in plan.explain("blocks.0")
    assert {"path": "blocks.1", "inputs": {}, "outputs": {}, "sites": [], "joint": [["a.b", "m.b"]]} in plan.to_dict()["modules"]


FAMILIES: list[tuple[str, dict[str, Any], int]] = [
    ("gptj", {}, 1),
    ("codegen", {}, 1),
    ("phi", {}, 1),
    ("cohere", {}, 1),
    ("cohere2", {}, 1),
    ("stablelm", {"use_parallel_residual": True}, 1),
    ("gpt_neox", {}, 2),
    ("falcon", {"new_decoder_architecture": False, "parallel_attn": True, "alibi": False}, 1),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 4, "alibi": False}, 2),
]


@pytest.mark.parametrize(("model_type", "fields", "norms"), few(FAMILIES, *FAMILIES[:1], *FAMILIES[-3:]))
def test_one_all_reduce_a_block(model_type: str, fields: dict[str, Any], norms: int) -> None:
    model = transformer(model_type, **fields)
    plan = autotp.plan(model, tp=2)
    blocks = [m.path for m in plan.modules if m.joint]
    assert len(blocks) == model.config.num_hidden_layers
    assert {b: reductions(plan)[b] for b in blocks} == dict.fromkeys(blocks, 1)
    assert {b: reductions(plan, "backward")[b] for b in blocks} == dict.fromkeys(blocks, norms)


@pytest.mark.parametrize("model_type", halved(["qwen2_moe", "deepseek_v3"]))
def test_shared_and_routed_experts_leave_as_one_sum(model_type: str) -> None:
    plan = autotp.plan(transformer(model_type, experts="eager"), tp=2)
    layer = "model.layers.1.mlp"
    assert plan.params[f"{layer}.shared_expert{'s' if model_type == 'deepseek_v3' else ''}.down_proj.weight"].layout.dim is not None
    assert [(t.module, t.kind) for t in plan.traffic if t.module.startswith(layer) and t.when == "forward"] == [(layer, "all_reduce")]
