"""Negative controls of the checks on a pool: equal models pass every aspect, each kind of difference fails the right one."""

from __future__ import annotations

from functools import partial

import pytest

from autotp.testing import NotEquivalent
from tests.support import standin
from tests.support.families import transformer
from tests.support.pooled import CAUSAL, equivalent
from tests.support.ranks import Pool, RankError

LLAMA = partial(transformer, "llama", attn_implementation="eager")


def failed(pool: Pool, model: partial[object], around: object) -> NotEquivalent:
    with pytest.raises(NotEquivalent) as caught:
        equivalent(pool, model, around=around)
    assert caught.value.found is not None
    return caught.value


def test_equal_models_pass_every_aspect(pool: Pool) -> None:
    found = equivalent(pool, LLAMA, around=standin.replicated, needs=CAUSAL)
    assert found.local_share == 1.0
    assert not found.sharded


def test_a_nudged_weight_is_found(pool: Pool) -> None:
    found = failed(pool, LLAMA, standin.nudged).found
    assert set(found.failed) == {"state", "outputs", "gradients", "generation", "training", "steps"}
    outputs = found.aspects["outputs"].wrong
    assert {"loss", "logits", "logits with padding", "loss with padding"} <= set(outputs)
    assert any(path.endswith("with hidden states") for path in outputs)


def test_swapped_heads_are_found(pool: Pool) -> None:
    found = failed(pool, LLAMA, standin.swapped_heads).found
    assert {"state", "outputs", "gradients"} <= set(found.failed)


def test_wrong_gradients_are_found(pool: Pool) -> None:
    found = failed(pool, partial(transformer, "gpt2"), standin.wrong_gradients).found
    assert set(found.failed) <= {"gradients", "training"} and "gradients" in found.failed
    assert all(path.endswith("bias") for path in found.aspects["gradients"].wrong)


def test_a_failing_rank_is_an_error(pool: Pool) -> None:
    with pytest.raises(RankError, match="rank one fails"):
        equivalent(pool, LLAMA, around=standin.failing)


def test_an_aspect_that_was_not_compared_fails_when_needed(pool: Pool) -> None:
    with pytest.raises(AssertionError, match="generation: was not compared"):
        equivalent(pool, partial(transformer, "vit"), around=standin.replicated, needs=["generation"])
