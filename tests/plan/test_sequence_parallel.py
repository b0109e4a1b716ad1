"""Plans with hidden states in token parts: what they say, and the way back."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import autotp
from autotp.errors import InputError, PlanError, RecipeError
from autotp.plan.conversions import Op
from autotp.plan.sequence_parallel import AUTO_FROM, tokens_in_parts, with_tokens_in_parts, with_whole_tokens
from tests.composition.training import build
from tests.support.slow import halved

planned = partial(autotp.plan, tp=2, check="graph")


@pytest.mark.parametrize("kind", halved(["even", "fused", "joint", "padded", "experts"]))
def test_there_and_back(kind: str) -> None:
    model = build(kind)
    plain, parts = planned(model), planned(model, sequence_parallel=True)
    assert tokens_in_parts(parts) and not tokens_in_parts(plain)
    assert with_whole_tokens(parts) == plain and with_tokens_in_parts(plain) == parts and with_tokens_in_parts(parts) == parts
    assert autotp.Recipe.from_plan(parts).to_plan() == parts
    ops = {c.op for m in parts.modules for s in (*m.inputs, *m.outputs) for c in s.conversions}
    assert {Op.SCATTER, Op.ENTER} <= ops and not ops & {Op.REDUCE, Op.COPY}


def test_what_it_says() -> None:
    model = build("even")
    plain, parts, auto = planned(model), planned(model, sequence_parallel=True), planned(model, sequence_parallel="auto")
    assert (parts.least_scattered, auto.least_scattered) == (0, AUTO_FROM) and auto.modules == parts.modules
    # per layer the inputs of q, k, v and of gate, up, and that of the head: 32 wide, half of them on a rank
    assert f"{5 * 32 // 2 * 2} B a token less" in str(parts) and "token parts" not in str(plain)
    assert "scatter" in parts.explain("model.layers.0.mlp.down_proj") and "scatter" not in plain.explain("model.layers.0.mlp.down_proj")
    for plan, placements in ((parts, {"sequence_parallel": True}), (auto, {"sequence_parallel": "auto"})):
        recipe = {"placements": placements}
        assert planned(model, recipe=recipe) == plan
        assert autotp.Recipe.from_plan(plan, pin=False).placements.sequence_parallel == placements["sequence_parallel"]
    forwards = [[c for c in p.collectives(tokens=64) if c.when == "forward"] for p in (plain, parts)]
    moved = [sum(c.bytes * (2 if c.kind == "all_reduce" else 1) for c in found) for found in forwards]
    assert moved[0] == moved[1]  # an all-reduce is a reduce-scatter and an all-gather
    with pytest.raises(PlanError, match="stays in parts"):
        parts.to_tp_plan()
    with pytest.raises(RecipeError, match=r'placements\.sequence_parallel: got "maybe", wanted true, false or auto'):
        planned(model, recipe={"placements": {"sequence_parallel": "maybe"}})
    for wrong in ("yes", 1, None):
        with pytest.raises(InputError, match=f"sequence_parallel is {wrong!r}, wanted True, False or 'auto'"):
            planned(model, sequence_parallel=wrong)


class Apart(nn.Module):
    """Its sum is read by a product over all tokens at once: nothing stays in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(x)))
        return y.mT @ y


def test_nothing_to_scatter() -> None:
    plan = planned(Apart(), example_inputs={"x": torch.randn(2, 3, 8)}, sequence_parallel=True)
    assert not tokens_in_parts(plan) and any("sequence_parallel changes nothing" in note for note in plan.notes)


class Norm(nn.Module):
    """Divides by a norm over the last dim, by the number of tokens, or over all of them; or keeps what it made."""

    def __init__(self, kind: str, made: list[torch.Tensor]) -> None:
        super().__init__()
        self.kind, self.weight, self.made = kind, nn.Parameter(torch.ones(8)), made

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x / x.shape[1] ** 0.5 if self.kind == "counts" else x
        dims = {"all": (1, 2), "tokens": (1,)}.get(self.kind, (2,))
        y = self.weight * x * torch.rsqrt(x.pow(2).mean(dims, keepdim=True) + 1e-6)
        if self.kind == "keeps":
            self.kept = y * 2
        if self.kind == "appends":
            self.made.append(y)
        return y


class Around(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.made: list[torch.Tensor] = []
        self.up, self.down, self.norm = nn.Linear(8, 32), nn.Linear(32, 8), Norm(kind, self.made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x + self.down(torch.relu(self.up(x))))
        return y + self.made.pop().mean() if self.made else y


@pytest.mark.parametrize(("kind", "proven"), [("each", True), *((kind, False) for kind in ("counts", "all", "tokens", "keeps", "appends"))])
def test_modules_that_treat_tokens_one_by_one(kind: str, proven: bool) -> None:
    plan = planned(Around(kind), example_inputs={"x": torch.randn(2, 3, 8)}, sequence_parallel=True)
    assert tokens_in_parts(plan) == ("down",) and ("norm" in plan.tokens.by_token) is proven
