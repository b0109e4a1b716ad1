"""How far two tensors are apart."""

from __future__ import annotations

import pytest
import torch

from autotp.numeric.exact import DOUBLE
from autotp.testing.equivalence.compare import compare, error_of

INF = float("inf")


@pytest.mark.parametrize(
    ("wanted", "got", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 3.0], 0.5),
        ([0.0], [1.0], INF),
        ([1.0, float("nan")], [1.0, float("nan")], 0.0),
        ([1.0, float("nan")], [1.0, 2.0], INF),
        ([1.0, float("-inf")], [1.0, INF], INF),
        ([1, 2], [1, 3], INF),
        ([1.0], [1.0, 1.0], INF),
        ([1.0], [1], INF),
    ],
)
def test_error_of(wanted: list[float], got: list[float], error: float) -> None:
    assert error_of(torch.tensor(wanted), torch.tensor(got)) == error


def test_a_floor_is_the_least_size() -> None:
    assert error_of(torch.tensor([0.0]), torch.tensor([1.0]), 4.0) == 0.25


@pytest.mark.parametrize(("least", "wrong"), [(0.01, ()), (0.0, ("weight",))])
def test_a_small_parameter_after_a_step(least: float, wrong: tuple[str, ...]) -> None:
    wanted = torch.tensor([1e-6], dtype=torch.float64)
    assert compare("steps", {"weight": wanted}, {"weight": wanted * (1 + 1e-6)}, DOUBLE, least).wrong == wrong
