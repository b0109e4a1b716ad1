"""Which experts are dealt whole, by whose numbers, and what the plan says."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import autotp
from autotp.errors import AutoTPError, InputError, RecipeError
from autotp.experts import place
from autotp.experts.worth import NARROW
from autotp.plan.experts import Routing, whole_experts
from autotp.plan.loss_parallel import logits_in_parts
from tests.experts.models import HIDDEN, Batched, Block, Experts, Model, inputs
from tests.support.ranks import Pool, mesh
from tests.support.slow import swept

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 40}


def mixtral(**options: Any) -> nn.Module:
    """A Mixtral without weights."""
    config = transformers.MixtralConfig(**{**SMALL, "intermediate_size": 32, "num_local_experts": 4, **options})
    with torch.device("meta"):
        return transformers.MixtralForCausalLM(config)


def planned(model: nn.Module, **options: Any) -> Any:
    given = {"experts": "whole", "tp": 2, **options}
    return autotp.plan(model, example_inputs=inputs() if isinstance(model, Model) else None, **given)


def test_a_large_model_by_its_twin() -> None:
    """No weights, and more of them than are run: a smaller twin tells."""
    model = mixtral(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_local_experts=8)
    plan = planned(model)
    assert plan.checked.startswith("numbers of a smaller twin") and len(whole_experts(plan)) == 2
    assert plan.params["model.layers.1.mlp.experts.down_proj"].layout.local_shape == (4, 512, 1024)
    assert any("its 8 experts are dealt whole, 4 to a rank" in note for note in plan.notes)


def test_a_twin_that_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    """An attribute that counts experts in the twin, and not in the model."""
    model = mixtral(hidden_size=512, intermediate_size=1024, num_attention_heads=8)
    for layer in model.model.layers:  # type: ignore[union-attr]
        layer.mlp.experts.num_experts = 3
    plan = autotp.plan(mixtral(), tp=2, check="graph", experts="whole")
    twins = {path: Routing("x", "i", "w", ("num_experts",)) for path in whole_experts(plan)}
    found, reasons = place._moved(plan, model, tuple(twins), twins, {})
    assert not found and all("num_experts is not the number of its experts" in reason for reason in reasons.values())


def test_a_large_model_without_a_twin() -> None:
    """Nothing can be run, so nothing is proven."""
    with torch.device("meta"):
        model = Model(Batched, 40_000)
    plan = planned(model)
    assert not whole_experts(plan) and any("only a transformers model has a smaller twin" in note for note in plan.notes)


AUTO = {
    "narrow": ({}, "because products would be 16 wide with the width cut"),
    "wide": ({"intermediate_size": 2 * NARROW}, f"{NARROW} wide with the width cut, not below {NARROW}"),
    "uneven": ({"num_local_experts": 5}, "1.20 times the elements on a rank"),
}


@pytest.mark.parametrize("kind", swept(AUTO, "uneven"))
def test_auto(kind: str) -> None:
    options, told = AUTO[kind]
    plan = planned(mixtral(**options), experts="auto", check="graph")
    assert len(whole_experts(plan)) == (2 if kind == "narrow" else 0)
    assert any(told in note for note in plan.notes), plan.notes


def test_beside_logits_in_parts() -> None:
    plan = planned(mixtral(), check="graph", loss_parallel=True)
    assert len(whole_experts(plan)) == 2 and logits_in_parts(plan)


def test_nothing_to_deal() -> None:
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    plan = autotp.plan(plain, tp=2, example_inputs={"input": torch.randn(3, 8)}, experts="whole")
    assert any("no module has sharded parameters [experts, out, in]" in note for note in plan.notes)
    assert not autotp.plan(plain, tp=2, example_inputs={"input": torch.randn(3, 8)}).notes


class Reads(Block):
    """Reads its experts' parameters itself."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.experts.up.square().mean((0, 1))
        return super().forward(x * scale)


class Routes(Experts):
    """Routes for itself."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.route = nn.Parameter(torch.randn(number, HIDDEN))

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        weights, index = (x @ self.route.T).softmax(-1).topk(2)
        return super().forward(x, index, weights)


class Three(Experts):
    """Takes rows of another form."""

    def forward(self, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        return super().forward(x, index, weights)[None]


def reading(number: int) -> Model:
    model = Model(number=number)
    model.blocks = nn.ModuleList(Reads(Experts(number), number) for _ in range(2))
    return model


@pytest.mark.parametrize(
    ("model", "why"),
    [(lambda: reading(4), "reads its parameters"), (lambda: Model(Three), "its result has no row for each token")],
)
def test_what_the_code_around_shows(model: Any, why: str) -> None:
    torch.manual_seed(0)
    plan = planned(model())
    assert not whole_experts(plan) and any(why in note for note in plan.notes), plan.notes


def test_a_router_inside() -> None:
    """Its weights are no expert's; a module that chooses by them for itself does not show which experts it wants."""
    torch.manual_seed(0)
    plan = planned(Model(Routes))
    assert not whole_experts(plan) and any("does not treat each token" in note for note in plan.notes), plan.notes


def test_bad_words() -> None:
    with pytest.raises(InputError, match="plan: experts is 'all', wanted one of 'width', 'whole', 'auto'"):
        autotp.plan(Model(), tp=2, experts="all")
    with pytest.raises(RecipeError, match=r'placements.experts: got "all", wanted width, whole or auto'):
        autotp.plan(Model(), tp=2, example_inputs=inputs(), recipe={"placements": {"experts": "all"}})


def refused() -> list[str]:
    """Calls that no rank could answer are errors on every rank, and the model goes on."""
    torch.manual_seed(0)
    model = Model().double()
    alone = copy.deepcopy(model)
    made: Any = autotp.parallelize(model, mesh(), example_inputs=inputs(), experts="whole")
    x, found = inputs()["x"].double(), []
    made.blocks[0].gate.register_forward_hook(lambda *_: None)
    made.blocks[0].k = 2
    experts = made.blocks[0].experts
    for index in (torch.full((4, 2), 4), torch.full((4, 2), -1)):
        try:
            experts(torch.randn(4, HIDDEN).double(), index, torch.rand(4, 2).double())
        except AutoTPError as error:
            found.append(str(error))
    assert torch.allclose(made(x), alone(x))
    return found


def test_experts_that_no_rank_holds(pool: Pool) -> None:
    for found in pool.run(refused):
        assert len(found) == 2 and all("outside of 0 to 3" in text for text in found)
