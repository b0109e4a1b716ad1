"""Negative controls of the harness: equal models pass every aspect, each kind of difference fails the right one."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.support import standin
from tests.support.equivalence import check, error_of
from tests.support.families import transformer, transformer_inputs
from tests.support.ranks import Pool

LLAMA = partial(transformer, "llama", attn_implementation="eager")


def test_equal_models_pass_every_aspect(pool: Pool) -> None:
    report = check(pool, LLAMA, transformer_inputs, subject=standin.replicated)
    report.require("forward", "masked", "whole", "generate", "state_dict", "grad", "loss", "step")
    assert report.local_share == 1.0
    assert not report.sharded


def test_a_nudged_weight_is_found(pool: Pool) -> None:
    failed = check(pool, LLAMA, transformer_inputs, subject=standin.replicated, sabotage=standin.nudge).failed()
    assert {"forward", "masked", "whole", "generate", "state_dict", "grad", "loss", "step"} <= set(failed)


def test_swapped_heads_are_found(pool: Pool) -> None:
    failed = check(pool, LLAMA, transformer_inputs, subject=standin.replicated, sabotage=standin.swap_heads).failed()
    assert {"forward", "grad"} <= set(failed)


def test_wrong_gradients_are_found(pool: Pool) -> None:
    report = check(pool, partial(transformer, "gpt2"), transformer_inputs, subject=standin.replicated_with_wrong_gradients)
    assert set(report.failed()) == {"grad", "loss"}


def test_a_failing_rank_is_a_problem(pool: Pool) -> None:
    report = check(pool, LLAMA, transformer_inputs, subject=standin.replicated, sabotage=standin.rank_one_raises)
    assert "rank one fails" in report.failed()["ranks"]


def test_an_aspect_that_was_not_compared_fails_when_required(pool: Pool) -> None:
    report = check(pool, partial(transformer, "vit"), transformer_inputs, subject=standin.replicated)
    with pytest.raises(AssertionError, match="generate: was not compared"):
        report.require("generate")


@pytest.mark.parametrize(
    ("wanted", "got", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 3.0], 0.5),
        ([0.0], [1.0], float("inf")),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("nan")], [1.0, 2.0], float("inf")),
        ([1.0, float("-inf")], [1.0, float("inf")], float("inf")),
        ([1, 2], [1, 3], float("inf")),
        ([1.0], [1.0, 1.0], float("inf")),
    ],
)
def test_error_of(wanted: list[float], got: list[float], error: float) -> None:
    assert error_of(torch.tensor(wanted), torch.tensor(got)) == error
