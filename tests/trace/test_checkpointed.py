"""Checkpoints around functions: what runs again in the backward runs outside of the forward of its module."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import autotp
from autotp.errors import TraceError
from autotp.testing import assert_equivalent
from tests.support.slow import in_turns

X = {"x": torch.linspace(-1, 1, 2 * 3 * 16, dtype=torch.float64).sin().view(2, 3, 16)}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 64), nn.Linear(64, 16)
        self.w, self.v = nn.Parameter(torch.rand(64)), nn.Parameter(torch.rand(16))

    def norm(self, h: Tensor) -> Tensor:
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3)

    def scaled(self, h: Tensor) -> Tensor:
        return torch.tanh(h * self.w)

    def with_norm(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(x)))  # type: ignore[no-any-return]

    def with_scale(self, x: Tensor) -> Tensor:
        return self.b(self.scaled(self.a(x))) * self.v  # type: ignore[no-any-return]


#: What is checkpointed, and whether the region is sharded all the same.
FORWARDS: dict[str, tuple[Callable[[Mlp, Tensor, Any], Tensor], bool]] = {
    "a method with a norm": (lambda m, x, again: again(m.with_norm, x), False),
    "a norm": (lambda m, x, again: m.b(again(m.norm, m.a(x))), False),
    "a lambda with a norm": (lambda m, x, again: m.b(again(lambda h: F.layer_norm(h, (64,)), m.a(x))), False),
    "a method that reads parameters": (lambda m, x, again: again(m.with_scale, x), True),
    "a method between": (lambda m, x, again: m.b(again(m.scaled, m.a(x))), True),
    "layers": (lambda m, x, again: again(lambda y: m.b(torch.tanh(m.a(y))), x), True),
}


class Checkpointed(nn.Module):
    """The block checkpoints functions of its own. `root`: it is the model."""

    def __init__(self, name: str, reentrant: bool) -> None:
        super().__init__()
        self.mlp, self.name, self.reentrant = Mlp(), name, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return x + FORWARDS[self.name][0](self.mlp, x * 1.0, partial(checkpoint, use_reentrant=self.reentrant))


class Inside(Mlp):
    """The functions are those of the module that runs."""

    def __init__(self, name: str, reentrant: bool) -> None:
        super().__init__()
        self.name, self.reentrant = name, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return x + FORWARDS[self.name][0](self, x * 1.0, partial(checkpoint, use_reentrant=self.reentrant))


class Around(nn.Module):
    def __init__(self, name: str, reentrant: bool) -> None:
        super().__init__()
        self.inner = Inside(name, reentrant)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("name", "reentrant"), in_turns(FORWARDS, (False, True)))
@pytest.mark.parametrize("kind", [Around, Inside, Checkpointed])
def test_checkpointed_functions(kind: Any, name: str, reentrant: bool) -> None:
    if kind is Inside and name in ("a method that reads parameters", "a method between"):  # the root's own: no subclass sees to it
        with pytest.raises(TraceError, match="put the parameter and that code into a module inside of the model"):
            autotp.plan(Inside(name, reentrant).double(), tp=2, example_inputs=X)
        return
    found = assert_equivalent(partial(kind, name, reentrant), tp=2, inputs=X, steps=1, certificate="graph")
    assert kind is Checkpointed or (found.plan.local_share < 0.6) is FORWARDS[name][1]
