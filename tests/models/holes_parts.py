"""What the modules of `holes` are put together from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTER = 8


class Mid(nn.Module):
    """`b(f(a(x)))`."""

    def __init__(self, f: Callable[[Tensor], Tensor] = torch.tanh, width: int = 12) -> None:
        super().__init__()
        self.a, self.b, self.f = nn.Linear(OUTER, width), nn.Linear(width, OUTER), f

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.f(self.a(x)))


class Gate(nn.Module):
    """`b(tanh(a(x)) * c(y))`, weights of its own: two arguments of which a caller may make one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Parameter(torch.randn(12, OUTER)), nn.Parameter(torch.randn(12, OUTER))
        self.b = nn.Linear(12, OUTER)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.b(torch.tanh(F.linear(x, self.a)) * F.linear(y, self.c))


class Norm(nn.Module):
    """A model of a LayerNorm and what a subclass does after it."""

    def __init__(self) -> None:
        super().__init__()
        self.n = nn.LayerNorm(OUTER)


class Elementwise(torch.autograd.Function):
    """The backward looks at each entry alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.02, 0.02)


class Mixing(torch.autograd.Function):
    """The forward is elementwise, the backward is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g - g.mean(-1, keepdim=True)


class Flipping(Mixing):
    """The backward reverses the entries."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g.flip(-1)


class RmsNorm(torch.autograd.Function):
    """A norm with its formula for the backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = x.pow(2).mean(-1, keepdim=True).add(1e-3).rsqrt()
        ctx.save_for_backward(x, r)
        return x * r

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        x, r = ctx.saved_tensors
        return r * g - x * r**3 * (g * x).mean(-1, keepdim=True)
