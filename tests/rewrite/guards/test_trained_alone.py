"""Modules that are trained by themselves, of which a call of the model has gradients in summands at the boundary."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.rewrite.guards import alone
from autotp.testing.ranks.threads import ThreadRanks

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x)) * self.scale


class Functions(nn.Module):
    """Products that no module makes read the result of the part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.LayerNorm(8))
        self.up, self.gate, self.down = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24, 8)), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.part(x)
        return self.down(F.linear(h, self.up) * F.silu(F.linear(h, self.gate)))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, h: Tensor) -> Tensor:
        h = h * 2
        return self.down(self.up(h) * F.silu(self.gate(h)))


class Doubled(nn.Module):
    """An operator is between the part and the Linears that read it."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.up, self.gate, self.down = Encoder(), nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = self.part(x) * 2
        return self.down(self.up(h) * F.silu(self.gate(h)))


class Branches(nn.Module):
    """The gradients of two branches are summed together, before both; the part is one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.part, self.other = Encoder(), Mlp(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        h = self.before(x)
        return x + self.part(h) + self.other(h)


class Before(Branches):
    """As above; the part is what both branches read."""

    def __init__(self) -> None:
        super().__init__()
        self.part, self.before = self.before, self.part

    def forward(self, x: Tensor) -> Tensor:
        h = self.part(x)
        return x + self.before(h) + self.other(h)


class Joined(nn.Module):
    """The part is a leaf; learned rows join what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.part, self.up, self.down = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(24, 8)
        self.rows = nn.Parameter(torch.randn(4, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.part(self.stem(x)), self.rows.expand(x.shape[0], -1, -1)], dim=1)
        return self.down(self.up(x).relu())


MODELS = (Functions, Doubled, Branches, Before, Joined)


def largest_error(make: Callable[[], nn.Module], sequence_parallel: bool, frozen: bool) -> float:
    """The largest difference of the results of `part` called by itself, twice, and of all gradients, those of a call of the model too.

    `frozen`: `part` of a copy of the model, of which its parameters are not trained.
    """
    torch.manual_seed(0)
    model = make().double()
    parallel = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("tp",))
    autotp.parallelize(parallel, mesh, example_inputs={"x": X}, check="graph", sequence_parallel=sequence_parallel)
    assert autotp.plan_of(parallel).local_share < 0.8
    found: list[list[Tensor]] = []
    for each in (model, copy.deepcopy(parallel) if frozen else parallel):
        each.part.requires_grad_(not frozen)
        x = X.clone().requires_grad_()
        each(x).square().sum().backward()
        results = [each.part(x), each.part(x * 2)]
        sum(y.square().sum() for y in results).backward()
        grads = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in each.part.parameters() if p.grad is not None]
        found.append([*(y.detach() for y in results), x.grad, *grads])
    return max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))


def over(sequence_parallel: bool) -> list[float]:
    return [max(largest_error(make, sequence_parallel, frozen) for frozen in (False, True)) for make in MODELS]


def errors(world: int, sequence_parallel: bool = False) -> dict[str, float]:
    ranks = ThreadRanks(world, 120.0, turns=True)
    try:
        found = ranks.run(partial(over, sequence_parallel))
    finally:
        ranks.stop()
    return {make.__name__: max(errors) for make, errors in zip(MODELS, zip(*found, strict=True), strict=True)}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("world", [2, 3])
def test_parts_are_trained_by_themselves(world: int, sequence_parallel: bool) -> None:
    assert {name: error < 1e-9 for name, error in errors(world, sequence_parallel).items()} == {m.__name__: True for m in MODELS}


def test_without_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a gradient that is whole would be summed, or one that is a summand would not be."""
    monkeypatch.setattr(alone, "taken_once", lambda x, comm: x)
    monkeypatch.setattr(alone, "copy", lambda x, comm: x)
    assert min(errors(2).values()) > 1e-3
