"""Every mistake in a plan is caught; a check that does not look lets mistakes through, and the survey says so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.errors import InputError
from autotp.numeric.exact import Precision
from autotp.testing import sabotage
from autotp.testing.architectures.architecture import Architecture
from autotp.testing.architectures.spec import Extra, Mlp, Position, Product, Projection, QKNorm
from autotp.testing.equivalence import check
from autotp.testing.equivalence.compare import Aspect
from autotp.testing.equivalence.mutation import Damage
from autotp.testing.sabotage import Kind, mutations, survey
from tests.models.custom import CUSTOM
from tests.support.families import transformer
from tests.support.slow import few

ENTRIES = {entry.name: entry for entry in CUSTOM}
ARCHITECTURES = {
    "gpt": Architecture(projection=Projection.CONCAT, position=Position.LEARNED, mlp=Mlp.PLAIN, bias=True, layer_norm=True, tied=True),
    "falcon": Architecture(kv=1, group=5, parallel=True, position=Position.ALIBI_MODEL, product=Product.WRITTEN, bias=True),
    "t5": Architecture(group=1, position=Position.RELATIVE, product=Product.EINSUM, projection=Projection.EINSUM),
    "mla": Architecture(group=1, kv=4, projection=Projection.LATENT, qk_norm=QKNorm.HEAD),
    "sinks": Architecture(product=Product.WRITTEN, extras=frozenset({Extra.SINK, Extra.HEAD_GATE, Extra.CONV}), vocab=64),
    "full_norm": Architecture(qk_norm=QKNorm.FULL, kv=3, group=1, bias=True),
}


@pytest.mark.parametrize(
    "name",
    few(
        ["fused_qkv", "per_head", "picked_rows_one_kv", "mqa", "wide_norm", "experts_dense", "parallel_residual"],
        "fused_qkv",
        "wide_norm",
        "experts_dense",
    ),
)
def test_every_mistake_in_a_hand_written_model_is_caught(name: str) -> None:
    found = survey(ENTRIES[name].factory, tp=2, inputs=ENTRIES[name].inputs)
    assert len(found.caught) > 10 and not found.survived


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("name", "tp"),
    [
        pytest.param(name, 3 if number % 3 == 2 else 2, marks=() if name == "sinks" else pytest.mark.slow)
        for number, name in enumerate(ARCHITECTURES)
    ],
)
def test_every_mistake_in_an_architecture_is_caught(name: str, tp: int) -> None:
    a = ARCHITECTURES[name]
    found = survey(a.build, tp=tp, inputs=a.inputs())
    assert len(found.caught) > 15 and not found.survived
    damaged = [by for mutation, by in found.caught if mutation.damage_by in (Damage.SWAP, Damage.ROLL)]
    assert damaged and all("outputs" in by or "gradients" in by for by in damaged)  # not only the state dict tells


@pytest.mark.sweep
@pytest.mark.parametrize(
    "model_type", ["phi3", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("bloom", marks=pytest.mark.slow)]
)
def test_every_mistake_in_a_transformers_model_is_caught(model_type: str) -> None:
    told: dict[sabotage.Mutation, str] = {}
    factory = partial(transformer, model_type, attn_implementation="eager")
    found = survey(factory, tp=2, on_mutation=lambda mutation, by: told.update({mutation: by}))
    assert len(found.caught) > 25 and not found.survived
    assert dict(found.caught) == told and all(told.values())
    assert all(found.count(kind)[0] == found.count(kind)[1] for kind in Kind)


class Two(nn.Module):
    """Linear, relu, Linear."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)))


X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def test_the_mistakes_of_two_linears() -> None:
    """Written out once: what is made of the smallest plan."""
    plan = autotp.plan(Two(), tp=2, example_inputs={"x": X})
    assert [str(m) for m in mutations(plan)] == [
        "drop reduce of result (the tensor) of b",
        "double reduce of result (the tensor) of b",
        "bias the bias of b.bias as read in b",
        "drop copy of argument input of a",
        "double copy of argument input of a",
        "swap shards 0 and 1 of a.weight",
        "shift the shard of a.weight",
        "swap shards 0 and 1 of a.bias",
        "shift the shard of a.bias",
        "swap shards 0 and 1 of b.weight",
        "shift the shard of b.weight",
        "repeat the gradient's sum of b.bias",
    ]
    assert mutations(autotp.plan(Two(), tp=1, example_inputs={"x": X})) == ()
    assert mutations(plan)[0].change(plan) != plan


def blind(name: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], precision: Precision, least: float) -> Aspect:
    """Sees outputs only."""
    return equivalence_compare(name, wanted, got if name == "outputs" else wanted, precision, least)


equivalence_compare = check.compare


def test_a_check_that_sees_outputs_only_lets_mistakes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "compare", blind)
    found = survey(Two, tp=2, inputs=X)
    assert [str(m) for m in found.survived] == [
        "drop copy of argument input of a",
        "double copy of argument input of a",
        "repeat the gradient's sum of b.bias",
    ]
    assert found.count(Kind.DROP) == (1, 2) and found.count(Kind.BIAS) == (1, 1)


def test_blocks_that_are_alike_are_mutated_once() -> None:
    a = Architecture(layers=3)
    plan = autotp.plan(a.build(), tp=2, example_inputs=a.inputs())
    one, all_ = mutations(plan), mutations(plan, every=True)
    assert len(one) < len(all_) and set(one) <= set(all_)


@pytest.mark.parametrize("plan", [None, {}, "llama"])
def test_bad_input(plan: Any) -> None:
    with pytest.raises(InputError, match="mutations takes a Plan"):
        mutations(plan)


def test_a_model_that_is_wrong_already_has_no_survey(monkeypatch: pytest.MonkeyPatch) -> None:
    def worse(name: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], precision: Precision, least: float) -> Aspect:
        return replace(equivalence_compare(name, wanted, got, precision, least), wrong=("x",))

    monkeypatch.setattr(check, "compare", worse)
    with pytest.raises(check.NotEquivalent, match="outputs"):
        survey(Two, tp=2, inputs=X)
