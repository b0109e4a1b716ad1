"""Experts that are dealt whole give outputs, gradients, optimizer steps and tokens of one device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.experts import calls, place, prove
from autotp.experts.prove import Proven
from autotp.numeric.check import judge
from autotp.plan.experts import Routing, whole_experts, with_cut_width
from autotp.plan.plan import Plan
from autotp.rewrite.modules import pairs
from autotp.rewrite.modules.pairs import Picked
from autotp.testing import NotEquivalent, assert_equivalent
from autotp.testing.sabotage import mutations
from autotp.trace.example import Example
from tests.experts.models import HIDDEN, Batched, Checkpointed, Experts, Model, inputs, spoilt
from tests.support.families import transformer
from tests.support.slow import swept

RECIPE = {"placements": {"experts": "whole"}}
ALWAYS, NEVER = 9e3, -9e3
#: model → its ranks; experts that tp does not divide, ranks without any, all tokens to one expert, none to the last
OWN: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "loop": (Model, 2),
    "uneven": (partial(Model, Experts, 5), 3),
    "a rank has none": (partial(Model, Batched, 5), 4),
    "all to one": (partial(Model, Experts, 4, (0.0, 0.0, ALWAYS, 0.0), 1), 2),
    "batched, all to one": (partial(Model, Batched, 6, (0.0,) * 5 + (ALWAYS,), 1), 4),
    "none to the last": (partial(Model, Batched, 4, (0.0, 0.0, NEVER, NEVER)), 2),
    "run again": (Checkpointed, 2),
}


@pytest.mark.parametrize("name", swept(OWN, "uneven", "a rank has none", "all to one"))
def test_own(name: str) -> None:
    make, tp = OWN[name]
    found = assert_equivalent(make, tp=tp, inputs=inputs(), recipe=RECIPE, steps=2)
    assert len(whole_experts(found.plan)) == 2
    assert all(p.layout.dim == 0 for n, p in found.plan.params.items() if ".experts." in n)


#: (family, how its experts are computed, experts, tp)
FAMILIES = [
    ("mixtral", "eager", 4, 2), ("mixtral", "batched_mm", 5, 3), ("mixtral", "grouped_mm", 6, 4),
    ("qwen3_moe", "batched_mm", 4, 4), ("qwen3_moe", "grouped_mm", 5, 4), ("qwen3_moe", "eager", 6, 4),
    ("deepseek_v3", "grouped_mm", 4, 3), ("deepseek_v3", "eager", 4, 2), ("deepseek_v3", "batched_mm", 6, 4),
    ("gpt_oss", "batched_mm", 4, 2), ("gpt_oss", "grouped_mm", 5, 3), ("gpt_oss", "eager", 6, 4),
]  # fmt: skip
_FIELD = {"mixtral": "num_local_experts", "qwen3_moe": "num_experts", "deepseek_v3": "n_routed_experts", "gpt_oss": "num_local_experts"}


@pytest.mark.parametrize(("family", "how", "number", "tp"), swept(FAMILIES, ("deepseek_v3", "grouped_mm", 4, 3)))
def test_families(family: str, how: str, number: int, tp: int) -> None:
    dtype = torch.float32 if how == "grouped_mm" else torch.float64  # grouped products have no float64
    build = partial(transformer, family, experts=how, **{_FIELD[family]: number})
    found = assert_equivalent(build, tp=tp, recipe=RECIPE, dtype=dtype)
    assert whole_experts(found.plan)


def planned(make: Callable[[], nn.Module], tp: int) -> tuple[nn.Module, Plan]:
    torch.manual_seed(0)
    model = make()
    return model, autotp.plan(model, tp=tp, example_inputs=inputs(), experts="whole")


def wrong(model: nn.Module, plan: Plan) -> bool:
    return judge(model, (Example("x", lambda: dict(inputs())),), plan).module is not None


def shifted(index: Tensor, start: int, stop: int) -> Picked:
    """Pairs of one expert less."""
    return _pick(index, start, stop - 1)


def kept(index: Tensor, start: int, stop: int) -> Picked:
    """Numbers of experts that are those of all ranks."""
    found = _pick(index, start, stop)
    return Picked(found.token, found.slot, (found.local + start).clamp(max=stop - start - 1))


def first_slot(index: Tensor, start: int, stop: int) -> Picked:
    """The weights of other slots."""
    found = _pick(index, start, stop)
    return Picked(found.token, found.slot * 0, found.local)


def spent(rows: Tensor, count: int, *of: Tensor) -> Tensor:
    """A rank without pairs counts the one that stands in."""
    return rows.expand(count, -1) + 0 * sum(t.sum() for t in of)


def last_alone(rows: Tensor, picked: Picked, tokens: int) -> Tensor:
    """The last pair of a token in place of the sum."""
    return rows.new_zeros(tokens, rows.shape[1]).index_copy(0, picked.token, rows)


_pick = pairs.pick
MISTAKES = {"shifted": shifted, "kept": kept, "first_slot": first_slot}


@pytest.mark.parametrize("name", swept([*MISTAKES, "spent", "last_alone"], "first_slot", "spent"))
def test_a_mistake_in_picking_shows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, plan = planned(OWN["all to one" if name == "spent" else "loop"][0], 2)
    assert len(whole_experts(plan)) == 2 and not wrong(model, plan)
    if name in MISTAKES:
        monkeypatch.setattr(pairs, "pick", MISTAKES[name])
    elif name == "spent":
        monkeypatch.setattr(pairs, "_Dropped", SimpleNamespace(apply=spent))
    else:
        monkeypatch.setattr(pairs, "put_back", last_alone)
    assert wrong(model, plan)
    assert not whole_experts(planned(OWN["loop"][0], 2)[1]) or name == "spent"  # the proof of a new plan fails too


@pytest.mark.sweep
def test_the_number_of_experts_is_local_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    model = transformer("mixtral", experts="grouped_mm")
    plan = autotp.plan(model, tp=2, experts="whole")
    (one, *_) = (m for m in plan.modules if m.pairs is not None)
    assert one.pairs is not None and [(a.path, a.value, a.local) for a in one.pairs.attributes] == [("num_experts", 4, 2)]
    assert not one.attributes  # code outside reads the number of all
    ids = (Example("ids", lambda: {"input_ids": torch.arange(12).view(2, 6)}),)
    assert judge(model, ids, plan).module is None
    monkeypatch.setattr(pairs, "localised", lambda *_: nullcontext())
    assert judge(model, ids, plan).module is not None


def test_back_to_the_width() -> None:
    model, whole = planned(Model, 2)
    width = autotp.plan(model, tp=2, example_inputs=inputs())
    back = with_cut_width(whole)
    assert dict(back.params) == dict(width.params) and {m.path: m for m in back.modules} == {m.path: m for m in width.modules}
    assert with_cut_width(width) is width


@pytest.mark.parametrize("share", ["pairs", pytest.param("", marks=pytest.mark.sweep)])
def test_mistakes_in_the_plan_show(share: str) -> None:
    """Pairs that nobody picks; shards that are another rank's, or cut one expert too late."""
    torch.manual_seed(0)
    found = [m for m in mutations(planned(Model, 2)[1]) if "experts" in m.where and share in m.where]
    assert len(found) == (1 if share else 13)
    for mutation in found:
        with pytest.raises(NotEquivalent):
            assert_equivalent(Model, tp=2, inputs=inputs(), recipe=RECIPE, sabotage=mutation)


def test_a_module_by_itself() -> None:
    """The model is a module of experts."""

    def given() -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(3)
        index = torch.randint(5, (7, 2), generator=g)
        return {"x": torch.randn(7, HIDDEN, generator=g), "index": index, "weights": torch.rand(7, 2, generator=g)}

    found = assert_equivalent(partial(Experts, 5), tp=2, inputs=given(), recipe=RECIPE, steps=2)
    assert whole_experts(found.plan) == ("",)


def test_planning_leaves_random_numbers_alone() -> None:
    model = Model()
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    autotp.plan(model, tp=2, example_inputs=inputs(), experts="whole")
    assert torch.equal(torch.rand(3), wanted)


@pytest.mark.sweep
def test_more_ranks_than_are_run() -> None:
    """The module is proven on fewer of them."""
    plan = planned(partial(Model, Experts, 20), 20)[1]
    assert len(whole_experts(plan)) == 2 and plan.checked.startswith("graph only")


#: what a module does → what the plan says
RULED_OUT = {
    "drops": "does not treat each token and expert by itself",
    "drops in training": "does not treat each token and expert by itself",
    "normalises": "does not treat each token and expert by itself",
    "mixes": "does not treat each token and expert by itself",
    "dropout": "draws random numbers",
    "counts": "a buffer has a number for each expert",
    "prepares": "pre inside of it changes too",
    "looks": "look inside of it gets whole tokens",
    "remembers": "leaves tensors in its attributes",
}


@pytest.mark.parametrize("variant", swept(RULED_OUT, "drops in training", "dropout", "remembers"))
def test_ruled_out(variant: str) -> None:
    """The width stays cut, the answer is right, and the plan says why in a sentence."""
    found = assert_equivalent(spoilt(variant), tp=2, inputs=inputs(), recipe=RECIPE)
    assert not whole_experts(found.plan)
    assert found.plan.params["blocks.0.experts.up"].layout.dim == 1
    assert any(RULED_OUT[variant] in note for note in found.plan.notes), found.plan.notes


def test_one_slot_may_become_two() -> None:
    """The router gave one expert to a token; what the module does to two shows all the same."""
    make = partial(Model, partial(Experts, variant="normalises"), k=1)
    plan = planned(make, 2)[1]
    assert not whole_experts(plan) and any("treat each token" in note for note in plan.notes), plan.notes
    assert len(whole_experts(planned(partial(Model, k=1), 2)[1])) == 2


def overflowing() -> nn.Module:
    """The experts that nobody chooses have weights that overflow."""
    model: Any = OWN["all to one"][0]().double()
    with torch.no_grad():
        for block in model.blocks:
            block.experts.up[:2] = 1e300
            block.experts.down[:2] = 1e300
    return model  # type: ignore[no-any-return]


def test_nothing_comes_of_the_pair_that_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank without pairs runs one of them: its numbers are infinite, and its gradients zeros as on one device."""
    assert whole_experts(assert_equivalent(overflowing, tp=2, inputs=inputs(), recipe=RECIPE, steps=2).plan)
    monkeypatch.setattr(pairs, "_Dropped", SimpleNamespace(apply=lambda rows, count, *_: rows.expand(count, -1) * 0))  # the control
    assert not whole_experts(planned(overflowing, 2)[1])


#: what a module does → the check that alone rules it out, and what it says where all is well
CHECKS: dict[str, tuple[Any, str, Any]] = {
    "dropout": (prove, "_draws", ""),
    "remembers": (calls, "_kept_by", []),
    "looks": (place, "_on_parts", True),
}


@pytest.mark.parametrize("variant", CHECKS)
def test_each_check_is_needed(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results and gradients are right with them: hooks, attributes and later dropouts would be wrong."""
    where, name, answer = CHECKS[variant]
    monkeypatch.setattr(where, name, lambda *_: answer)
    assert whole_experts(planned(spoilt(variant), 2)[1])


@pytest.mark.parametrize("variant", swept(["normalises", "mixes", "drops"], "mixes", "drops"))
def test_without_the_proof(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Believed without its own run, such a module is caught by the run of the model, or gives other numbers."""

    def believed(module: nn.Module, call: Any, routing: Routing, *_: Any) -> Proven:
        return Proven(Routing(routing.tokens, routing.index, routing.weights, ("num_experts",)))

    monkeypatch.setattr(place, "proven", believed)
    torch.manual_seed(0)
    plan = autotp.plan(spoilt(variant)(), tp=2, example_inputs=inputs(), experts="whole")
    if variant == "drops":  # the model's own tokens are too few for one to be dropped: only the drawn ones tell
        assert whole_experts(plan)
        return
    assert not whole_experts(plan) and any("numbers differ" in note for note in plan.notes)
    monkeypatch.setattr(place, "judge", lambda *_: judge_nothing)
    with pytest.raises(NotEquivalent):
        assert_equivalent(spoilt(variant), tp=2, inputs=inputs(), recipe=RECIPE)


class _Nothing:
    module, reason = None, ""


judge_nothing = _Nothing()
