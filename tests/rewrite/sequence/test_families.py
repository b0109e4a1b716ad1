"""Families of transformers with hidden states in token parts: outputs, gradients and tokens are those of one device."""

from __future__ import annotations

from functools import partial

import pytest

from autotp.plan.experts import whole_experts
from autotp.plan.sequence_parallel import tokens_in_parts
from autotp.testing import assert_equivalent
from autotp.testing.sabotage import survey
from tests.support.families import transformer
from tests.support.slow import few, thinned

EAGER = {"experts": "eager"}
#: decoders with sequential and parallel residuals, pre-, post- and sandwich norms; encoders, both, images, recurrent, experts
FAMILIES = [
    "llama", "gpt2", "gemma2", "phi3", "bloom", "cohere", "gptj", "bert", "t5", "whisper", "llava", "vit", "mamba", "deepseek_v3",
    "gpt_oss", "mixtral",
]  # fmt: skip
SEQUENCE = {"placements": {"sequence_parallel": True}}
TURNS = [(family, (2, 4)[at % 2]) for at, family in enumerate(FAMILIES)]
QUICK = (("gemma2", 2), ("bert", 3), ("mixtral", 2))


@pytest.mark.parametrize(("family", "tp"), thinned([(f, tp) for f in FAMILIES for tp in (2, 3, 4)], TURNS, *QUICK))
def test_family(family: str, tp: int) -> None:
    options = EAGER if family in ("deepseek_v3", "gpt_oss", "mixtral") else {}
    placements = {"sequence_parallel": True, "loss_parallel": True, "experts": "whole" if family == "mixtral" else "width"}
    recipe = {"placements": placements}
    found = assert_equivalent(partial(transformer, family, **options), tp=tp, steps=1, certificate="graph", recipe=recipe)
    assert tokens_in_parts(found.plan) and bool(whole_experts(found.plan)) is (family == "mixtral")


@pytest.mark.sweep
@pytest.mark.parametrize("family", few(["phi3", "gptj", "bert"], "gptj"))
def test_every_mistake_is_caught(family: str) -> None:
    found = survey(partial(transformer, family, attn_implementation="eager"), tp=2, recipe=SEQUENCE)
    kinds = {m.where.rpartition(" ")[0] or m.where for m, _ in found.caught}
    assert not found.survived and any("scatter" in k for k in kinds) and any("enter" in k for k in kinds), kinds
