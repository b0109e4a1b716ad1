"""The plan lists what a call with hidden states in token parts sends: regions, operators between them, and gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch

import autotp
from autotp.plan.conversions import CollectiveKind
from autotp.plan.plan import Plan
from tests.composition.training import mesh_of
from tests.support.collectives import noted
from tests.support.families import transformer
from tests.support.ranks import Pool
from tests.support.slow import swept

#: family → how its experts are dealt. Routers between regions (mixtral, deepseek_v3, gpt_oss), norms that read `1 + weight` (gemma2),
#: parallel residuals (cohere, gpt_neox), results that are hidden states (t5), positions that are added (opt)
FAMILIES = {
    "llama": "width", "gemma2": "width", "cohere": "width", "gpt_neox": "width", "falcon": "width", "t5": "width", "opt": "width",
    "deepseek_v3": "whole", "mixtral": "whole", "gpt_oss": "whole",
}  # fmt: skip
SHAPE = (2, 8)
Sent = Counter[tuple[str, str]]


def said(plan: Plan) -> Sent:
    """(pass, kind) → elements."""
    found: Sent = Counter()
    for t in plan.traffic:
        found[t.when.value, t.kind.value] += t.width * SHAPE[0] * SHAPE[1] + t.elements
    return found


def ran(family: str) -> tuple[Sent, Sent]:
    """(what the plan says, what ran), without what compares inputs between ranks."""
    model = transformer(family, experts="eager").double().train()
    model = autotp.parallelize(model, mesh_of(1, 2), sequence_parallel=True, experts=FAMILIES[family], check="graph")
    ids = torch.randint(0, 50, SHAPE, generator=torch.Generator().manual_seed(0))
    given = {"input_ids": ids} | ({"labels": ids} if family == "t5" else {})
    model(**given)  # the first calls compare inputs
    found: Sent = Counter()
    passed = ["forward"]

    def note(comm: Any, kind: str, tensor: torch.Tensor, nbytes: int) -> None:
        if tensor.is_floating_point():
            found[passed[0], kind] += nbytes // tensor.itemsize

    with noted(note):
        out = model(**given)
        passed[0] = "backward"
        (out.logits.sum() if given.keys() == {"input_ids"} else out.loss).backward()
    return said(autotp.plan_of(model)), found


@pytest.mark.parametrize("family", swept(FAMILIES, "gemma2", "cohere", "t5", "deepseek_v3"))
def test_what_runs_was_said(pool: Pool, family: str) -> None:
    """Elements by pass and kind; all-to-alls send at most what is said."""
    for wanted, found in pool.run(ran, family):
        routed = [key for key in wanted if key[1] == CollectiveKind.ALL_TO_ALL]
        assert all(0 < found[key] <= wanted[key] for key in routed) and bool(routed) is (FAMILIES[family] == "whole")
        assert {k: n for k, n in wanted.items() if k not in routed} == {k: n for k, n in found.items() if k not in routed}


def test_operators_between_regions_are_listed() -> None:
    """The control: without them the lists would differ."""
    plan = autotp.plan(transformer("gemma2"), tp=2, sequence_parallel=True, check="graph")
    norms = [t for t in plan.traffic if t.tokens and t.module.endswith("norm")]
    assert len(norms) == 9 and {(t.when.value, t.kind.value, t.elements) for t in norms} == {("backward", "all_reduce", 64)}
    assert not [t for t in autotp.plan(transformer("gemma2"), tp=2, check="graph").traffic if t.module.endswith("norm")]
