"""Families of transformers with logits in parts: outputs, losses, gradients and tokens are those of one device."""

from __future__ import annotations

from functools import partial

import pytest

from autotp.plan.loss_parallel import logits_in_parts
from autotp.testing import assert_equivalent
from tests.support.families import transformer
from tests.support.slow import swept

RECIPE = {"placements": {"loss_parallel": True}}
#: decoders, encoders, both, with images, recurrent and with experts; tied, capped, scaled and biased heads
FAMILIES = ["llama", "gpt2", "gemma2", "phi3", "bloom", "cohere", "gptj", "bert", "t5", "whisper", "llava", "mamba", "deepseek_v3"]


@pytest.mark.parametrize("family", swept(FAMILIES, "gemma2"))
def test_family(family: str) -> None:
    experts = {"experts": "eager"} if family == "deepseek_v3" else {}  # grouped products have no float64
    found = assert_equivalent(partial(transformer, family, **experts), tp=2, recipe=RECIPE)
    assert logits_in_parts(found.plan)
