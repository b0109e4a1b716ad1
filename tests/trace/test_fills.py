"""What the first of alike blocks is given, and the next ones not: zeros, ones, something without a gradient."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from autotp.testing import assert_equivalent
from tests.support.slow import in_turns

STARTS = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "detached": lambda h: h.detach(),
    "detached zeros": lambda h: torch.zeros_like(h).view_as(h).detach(),
    "the argument": lambda h: 2 * h,
}


class Summed(nn.Module):
    """What is added to the partial sum is whole: it may be added before the reduction only where it is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(16, 24), nn.Linear(24, 16, bias=False), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        y = x + self.b(F.gelu(self.a(h)))
        return self.n(y[:, :1]).expand_as(x)


class Queried(nn.Module):
    """As in decoders of detection models: queries and values from the block's argument, one of them with positions."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.v, self.b, self.n = nn.Linear(16, 24), nn.Linear(16, 24), nn.Linear(24, 16), nn.LayerNorm(16)

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        return self.n(x + self.b(torch.tanh(self.q(x + h)) * self.v(x)))


class Nested(nn.Module):
    """The blocks that are given something else are inside of another block."""

    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block() for _ in range(2)])

    def forward(self, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, h=h)
        return x


class Stack(nn.Module):
    def __init__(self, start: str, block: type[nn.Module], nested: bool) -> None:
        super().__init__()
        self.start = start
        self.blocks = nn.ModuleList([Nested(block) if nested else block() for _ in range(3)])

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        x = STARTS[self.start](h)
        for block in self.blocks:
            x = block(x, h)
        return x


@pytest.mark.parametrize(("start", "block"), in_turns(STARTS, (Summed, Queried)))
def test_the_first_block_is_given_something_else(start, block):
    for nested, tp in ((False, 2), (True, 3)):
        result = assert_equivalent(lambda n=nested: Stack(start, block, n), tp=tp, inputs={"h": torch.randn(2, 6, 16)}, steps=1)
        assert result.plan.local_share < 0.75
        assert "gradients" in result.aspects


@pytest.mark.sweep
def test_over_processes():
    assert_equivalent(lambda: Stack("zeros", Queried, False), tp=2, inputs={"h": torch.randn(2, 6, 16)}, backend="gloo")
