"""Results that the model itself does not read may be parts or summands of the ranks; a call of the module by itself gives them whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.rewrite.guards.alone import Parts
from tests.support.ranks import Pool, RankError, mesh

X = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Encoder(nn.Module):
    """As encoders with a pooled state are."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.wide, self.pool = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        states = x + self.down(self.up(x).relu())
        return {"states": states, "pooled": self.pool(self.wide(states[:, 0]).tanh())}


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder()

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)["states"].square()


def by_itself(_: Any = None) -> tuple[float, float]:
    """The error of results and gradients of the encoder, and how much of the model a rank has."""
    torch.manual_seed(0)
    model = Model().double()
    parallel = copy.deepcopy(model)
    autotp.parallelize(parallel, mesh(), example_inputs={"x": X})
    errors = []
    results = []
    for each in (model, parallel):
        x = X.clone().requires_grad_()
        found = each.encoder(x)
        (grad,) = torch.autograd.grad(found["pooled"].square().sum() + found["states"].sum(), x)
        results.append((found["states"].detach(), found["pooled"].detach(), grad))
    errors = [float((a - b).abs().max()) for a, b in zip(*results, strict=True)]
    errors.append(float((model(X) - parallel(X)).abs().max()))
    return max(errors), autotp.plan_of(parallel).local_share


@pytest.mark.parametrize("world", [2, 3])
def test_what_nobody_reads_is_made_whole(pool: Pool, world: int) -> None:
    for error, share in pool.run(by_itself, world=world):
        assert error < 1e-9 and share < 0.65


def _as_it_is(self: Parts, result: Any) -> Any:
    return result


def without(_: Any = None) -> float:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "whole", _as_it_is)
        return by_itself()[0]


def test_it_is_a_part(pool: Pool) -> None:
    """The control: what the ranks compute is not the whole."""
    with pytest.raises(RankError, match=r"32\) must match the size of tensor b \(16"):
        pool.run(without, world=2)
