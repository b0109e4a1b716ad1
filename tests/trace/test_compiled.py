"""Functions that torch.compile compiles, called by code of a model: nothing can be done inside of them, or to what they return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from tests.support.ranks import Pool, mesh

X = torch.linspace(-1, 1, 2 * 6 * 24, dtype=torch.float64).sin().view(2, 6, 24)

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "mean": lambda h, g: h * h.mean(-1, keepdim=True),
    "softmax": lambda h, g: h.softmax(-1) + g,
    "layer norm": lambda h, g: F.layer_norm(h, (48,)) * g,
    "matmul": lambda h, g: g * (h @ h.mT @ h),
    "pointwise": lambda h, g: F.silu(h) * g,
}


class Gated(nn.Module):
    def __init__(self, name: str, compiled: bool) -> None:
        super().__init__()
        self.a, self.g, self.b = nn.Linear(24, 48), nn.Linear(24, 48), nn.Linear(48, 24)
        function = FUNCTIONS[name]
        self.function = torch.compile(function, backend="eager") if compiled else function

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.b(self.function(self.a(x), self.g(x)))
        return h


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(48))

    def forward(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * self.w


class Normed(nn.Module):
    """With a module that is compiled by itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.n, self.b = nn.Linear(24, 48), Inner(), nn.Linear(48, 24)
        if how == "in place":
            self.n.compile(backend="eager")
        elif how == "wrapped":
            self.n = torch.compile(self.n, backend="eager")
        else:
            self.n.forward = torch.compile(self.n.forward, backend="eager")  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.b(self.n(self.a(x)))
        return h


def found(make: Callable[..., nn.Module], *arguments: Any) -> tuple[float, float]:
    """The relative error of outputs and gradients, and the share of the parameters on a rank."""
    torch.manual_seed(0)
    model = make(*arguments).double()
    with torch.compiler.set_stance("force_eager"):
        wanted = model(X)
        wanted.sin().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad()
    autotp.parallelize(model, mesh(), example_inputs={"x": X}, check="graph")
    got = model(X)
    got.sin().sum().backward()
    errors = [(wanted - got).abs().max() / wanted.abs().max()]
    errors += [(grads[n] - g).abs().max() / (grads[n].abs().max() + 1e-30) for n, g in autotp.full_grads(model).items()]  # type: ignore[operator, union-attr]
    return float(max(errors)), autotp.plan_of(model).local_share


@pytest.mark.parametrize("name", FUNCTIONS)
def test_compiled_functions(pool: Pool, name: str) -> None:
    """What is sharded uncompiled stays whole where a collective would be inside, and is sharded where none is."""
    for error, share in pool.run(found, Gated, name, True):
        assert error < 1e-9 and (share < 0.6) is (name == "pointwise")
    if name in ("mean", "pointwise"):
        assert all(error < 1e-9 and share < 0.7 for error, share in pool.run(found, Gated, name, False))


@pytest.mark.parametrize("how", ["in place", "wrapped", "its forward"])
def test_compiled_modules(pool: Pool, how: str) -> None:
    for error, share in pool.run(found, Normed, how):
        assert error < 1e-9 and (share < 0.6) is (how != "its forward")
