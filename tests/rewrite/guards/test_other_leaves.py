"""Buffers and attributes that require a gradient: each rank would get a part of it, so a call that records gradients refuses them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.rewrite.guards.other_leaves import OtherLeaves
from autotp.testing.ranks.run import run
from tests.support.ranks import mesh
from tests.support.slow import swept


class Scaled(nn.Module):
    """Scales the width that is cut by a tensor that is no parameter; `shift` is on no region's way."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.register_buffer("scale", torch.ones(()))
        self.shift: Any = torch.zeros(6, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).tanh() * self.scale) + self.shift  # type: ignore[no-any-return]


def buffer(model: Any) -> Tensor:
    model.inner.scale.requires_grad_()
    return model.inner.scale  # type: ignore[no-any-return]


def replaced_buffer(model: Any) -> Tensor:
    model.inner.scale = torch.full((), 2.0, dtype=torch.float64, requires_grad=True)
    return model.inner.scale  # type: ignore[no-any-return]


def attribute(model: Any) -> Tensor:
    model.inner.shift = model.inner.shift.clone().requires_grad_()
    return model.inner.shift  # type: ignore[no-any-return]


#: whose gradient is wanted → what the refusal names
WANTED: dict[str, tuple[Callable[[Any], Tensor], str]] = {
    "buffer": (buffer, "inner.scale requires a gradient"),
    "replaced buffer": (replaced_buffer, "inner.scale requires a gradient"),
    "attribute": (attribute, "inner.shift requires a gradient"),
}


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


def build() -> nn.Module:
    torch.manual_seed(0)
    return Around().double()


def used(want: Callable[[Any], Tensor], late: bool, quiet: bool) -> list[Any]:
    """What the ranks get: a gradient, an output, or the text of a refusal. `late`: after parallelize; `quiet`: under no_grad."""
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)

    def rank(_: object) -> Any:
        model = build()
        if not late:
            want(model)
        try:
            autotp.parallelize(model, mesh(), example_inputs={"x": x}, check="graph")
            leaf = want(model) if late else None
            with torch.set_grad_enabled(not quiet):
                out = model(x)
            if quiet:
                return out
            out.sum().backward()
        except autotp.AutoTPError as error:
            return str(error)
        return None if leaf is None else leaf.grad

    return list(run("local", rank, None, 2, 120.0))


@pytest.mark.parametrize("late", [True, False])
@pytest.mark.parametrize("name", WANTED)
def test_refused(name: str, late: bool) -> None:
    want, text = WANTED[name]
    assert all(text in said and "make it an nn.Parameter" in said for said in used(want, late, False))


@pytest.mark.parametrize("name", swept(WANTED, "buffer"))
def test_without_gradients(name: str) -> None:
    """Where none are recorded, and where nothing is wanted, the answer is that of one device."""
    want, x = WANTED[name][0], torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)
    alone = build()
    want(alone)
    assert all(torch.allclose(alone(x), out, rtol=0, atol=1e-12) for out in used(want, True, True))
    assert used(lambda m: m.inner.scale, True, False) == [None, None]


def test_the_guard_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank's gradient is a summand."""
    monkeypatch.setattr(OtherLeaves, "check", lambda self: None)
    alone: Any = build()
    x = torch.linspace(-1, 1, 12, dtype=torch.float64).view(2, 6)
    leaf = buffer(alone)
    alone(x).sum().backward()
    assert leaf.grad is not None
    assert all(not torch.allclose(leaf.grad, grad) for grad in used(buffer, True, False))
