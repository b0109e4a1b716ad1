"""Checks of data that raise: the answer with which the code goes on is traced, whichever it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.errors import TraceError
from autotp.testing import assert_equivalent

X = {"x": torch.linspace(-1, 1, 2 * 3 * 16, dtype=torch.float64).view(2, 3, 16)}


def _raise_if(wrong: Any) -> None:
    if wrong:
        raise ValueError("these data are wrong")


CHECKS: dict[str, Callable[[Tensor], None]] = {
    "not all finite": lambda y: _raise_if(not y.isfinite().all()),
    "not small": lambda y: _raise_if(not bool(y.max() < 1e6)),
    "any nan": lambda y: _raise_if(y.isnan().any()),
    "a number that is not small": lambda y: _raise_if(not (y.mean() < 5 and y.std() < 7)),
    "distributions": lambda y: _distributions(y),
}


def _distributions(y: Tensor) -> None:
    torch.distributions.Normal(y, torch.ones_like(y))
    torch.distributions.Categorical(logits=y)


class Checked(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.up, self.down, self.name = nn.Linear(16, 64), nn.Linear(64, 16), name

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.tanh(self.up(x)))
        CHECKS[self.name](y)
        return y


@pytest.mark.parametrize("name", CHECKS)
def test_checks_that_raise(name: str) -> None:
    assert assert_equivalent(partial(Checked, name), tp=2, inputs=X, certificate="graph").plan.local_share < 0.6


class Never(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        _raise_if(bool(self.up(x).max() < 0) is not None)
        return x


def test_code_that_raises_either_way_is_told() -> None:
    with pytest.raises(TraceError, match="these data are wrong"):
        autotp.plan(Never(), tp=2, example_inputs={"x": X["x"].float()})


class Many(nn.Module):
    """More modules of one class than answers are reversed; each checks what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"check": Checked("not all finite"), str(i): nn.Identity()}) for i in range(10))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block["check"](x)
        return x


def test_a_check_of_many_modules() -> None:
    assert assert_equivalent(Many, tp=2, inputs=X, certificate="graph").plan.local_share < 0.6
