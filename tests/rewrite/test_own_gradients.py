"""Gradients that arrive at two parameters as one tensor, or as one number for many entries: each parameter keeps its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autotp
from tests.support.ranks import Pool, mesh

X = torch.linspace(-1, 1, 2 * 3 * 16, dtype=torch.float64).sin().view(2, 3, 16)


class Block(nn.Module):
    """`rows`: few for gradients that are summed together, many for others."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.a, self.b, self.o = nn.Linear(16, 64), nn.Linear(64, 16), nn.Linear(16, 64)
        self.u, self.v = nn.Parameter(torch.rand(rows, 64)), nn.Parameter(torch.rand(rows, 64))
        self.c, self.d = nn.Parameter(torch.rand(16)), nn.Parameter(torch.rand(16))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.a(x)) * (self.u + self.v)[:1] + self.o.weight.sum(1)
        return self.b(h) + (self.c + self.d)  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        self.m, self.n = Block(rows), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(self.n(x))  # type: ignore[no-any-return]


def _twice(m: nn.Module) -> None:
    for _ in range(2):
        m(X).sin().sum().backward()


def _halved(m: nn.Module) -> None:
    m(X).sin().sum().backward()
    for p in m.parameters():
        if p.grad is not None:
            p.grad.mul_(0.5)


def _penalty(m: Any) -> None:
    for _ in range(2):
        (m(X).sin().sum() + m.m.a.weight.sum() + (m.m.u + m.m.v).sum() + m.m.c.sum()).backward()


def _whole(m: Any) -> None:
    full = lambda p: p.full_tensor() if isinstance(p, DTensor) else p  # noqa: E731
    for _ in range(2):
        (m(X).sin().sum() + (full(m.m.c) + full(m.m.d)).sin().sum() + (full(m.m.u) + full(m.m.v)).sum()).backward()


USES = {"accumulated": _twice, "changed in place": _halved, "with a penalty": _penalty, "of whole tensors": _whole}


def compared(rows: int, use: str) -> dict[str, float]:
    torch.manual_seed(0)
    plain = Model(rows).double()
    model = copy.deepcopy(plain)
    autotp.parallelize(model, mesh(), example_inputs={"x": X}, check="graph")
    assert autotp.plan_of(model).local_share < 0.6
    apply: Callable[[Any], None] = USES[use]
    apply(plain)
    apply(model)
    got = autotp.full_grads(model)
    grads = {n: p.grad for n, p in plain.named_parameters() if p.grad is not None}
    assert got.keys() == grads.keys()
    return {n: float((got[n] - g).abs().max() / g.abs().max()) for n, g in grads.items()}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("rows", [1, 2000])
def test_each_parameter_has_a_gradient_of_its_own(pool: Pool, rows: int, use: str) -> None:
    for errors in pool.run(compared, rows, use):
        assert all(error < 1e-9 for error in errors.values()), errors
