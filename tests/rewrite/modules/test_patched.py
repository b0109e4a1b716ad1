"""Forwards of classes that are replaced after parallelize, and before it in a process that has seen the class."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.testing.ranks.run import run
from tests.support.ranks import mesh

X = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.scale = nn.Parameter(torch.ones(24))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)) * self.scale)


class Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.norm, self.mlp = Scale(), nn.LayerNorm(16), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.scale(x)))


def doubled(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.weight * 2, self.bias)


def squared(self: Any, x: Tensor) -> Tensor:
    return self.down(self.up(x).square() * self.scale)


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    before = [(cls, cls.forward) for cls in (nn.Linear, Mlp, Scale)]
    yield
    for cls, forward in before:
        cls.forward = forward  # type: ignore[method-assign]


def build() -> nn.Module:
    torch.manual_seed(0)
    return Model().double()


def outcome(patches: list[tuple[Any, Any]], *, before: bool) -> str:
    """Ranks take turns from collective to collective, so what is patched is patched by all of them."""
    whole = build()

    def patch() -> None:
        for cls, forward in patches:
            cls.forward = forward

    def rank(_: object) -> Any:
        model = autotp.parallelize(copy.deepcopy(whole), mesh(), example_inputs={"x": X}, check="graph")
        if not before:
            patch()
        try:
            return model(X).detach()
        except autotp.AutoTPError as error:
            return str(error)

    if before:
        patch()
    found = run("local", rank, None, 2, 60.0)
    patch()
    wanted = whole(X).detach()
    if isinstance(found[0], str):
        return found[0]
    return "equal" if all(float((f - wanted).abs().max()) < 1e-9 for f in found) else "other"


@pytest.mark.parametrize(("cls", "forward"), [(nn.Linear, doubled), (Mlp, squared)])
def test_patched_afterwards_is_refused(cls: Any, forward: Any) -> None:
    assert "forward is another function than when the model was parallelized" in outcome([(cls, forward)], before=False)


def test_patched_between_regions_is_taken() -> None:
    assert outcome([(Scale, lambda self, x: x * 3)], before=False) == "equal"


@pytest.mark.parametrize(("cls", "forward"), [(nn.Linear, doubled), (Mlp, squared)])
def test_patched_before_in_a_process_that_has_seen_the_class(cls: Any, forward: Any) -> None:
    assert outcome([], before=True) == "equal"
    assert outcome([(cls, forward)], before=True) == "equal"
