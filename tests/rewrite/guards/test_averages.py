"""How batch norms average their statistics may change, as `update_bn` does it; what they compute with may not."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

import autotp
from autotp.api import parallelize_as
from autotp.testing.ranks.run import run
from tests.support.ranks import mesh

X = torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


class Own(nn.BatchNorm2d):
    """Does something else with it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.momentum is not None else super().forward(x.flip(1))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(8),
    "batch, over all": lambda: nn.BatchNorm2d(8, momentum=None),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
}


class Net(nn.Module):
    """Channels with statistics."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Conv2d(3, 8, 3, padding=1), norm(), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.norm(self.up(x)).relu())  # type: ignore[no-any-return]


def averaged(model: Any) -> list[Tensor]:
    """What comes out after a step, statistics of other batches, another momentum, and none."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.train()(X).square().mean().backward()
    optimizer.step()
    update_bn([X, 2 * X, X + 1], model)
    found = [model.eval()(X)]
    for momentum in (0.3, None):
        model.norm.momentum = momentum
        model.train()(3 * X)
        found.append(model.eval()(X))
    return [x.detach() for x in found]


@pytest.mark.parametrize(("name", "tp"), [("batch", 2), ("batch, over all", 4), ("instance", 2)])
def test_statistics_are_averaged_in_another_way(name: str, tp: int) -> None:
    torch.manual_seed(0)
    one = Net(NORMS[name]).double()
    plan, wanted = autotp.plan(one, tp=tp, example_inputs={"x": X}, check="graph"), averaged(copy.deepcopy(one))
    assert plan.params["norm.weight"].layout.dim == 0

    def work(_: Any) -> list[Tensor]:
        model = copy.deepcopy(one)
        parallelize_as(model, mesh(), plan)
        return averaged(model)

    for found in run("local", work, None, tp, 60):
        for got, expected in zip(found, wanted, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("norm", "change"), [(nn.BatchNorm2d, "track_running_stats"), (nn.BatchNorm2d, "eps"), (Own, "momentum")])
def test_what_they_compute_with_is_watched(norm: type[nn.BatchNorm2d], change: str) -> None:
    one = Net(lambda: norm(8)).double()
    plan = autotp.plan(one, tp=2, example_inputs={"x": X}, check="graph")

    def work(_: Any) -> None:
        model = copy.deepcopy(one)
        parallelize_as(model, mesh(), plan)
        setattr(model.norm, change, None)
        with pytest.raises(autotp.AutoTPError, match=change):
            model(X)

    run("local", work, None, 2, 60)
