"""Models whose backward, or whose branches on gradients, the operators of a forward do not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

OUTER, WIDTH = 16, 24
Operation = Callable[[Tensor], Tensor]


class Clip(torch.autograd.Function):
    """Each element of the gradient by itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp(-0.02, 0.02)


class ClipSame(Clip):
    """Returns its argument."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x


class ClipApart(torch.autograd.Function):
    """The same with a `setup_context`."""

    @staticmethod
    def forward(x: Tensor, scale: float = 2.0) -> Tensor:
        return x * scale

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.scale = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.clamp(-0.02, 0.02) * ctx.scale, None


class StraightThrough(torch.autograd.Function):
    """The forward has no gradient, the backward has."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach().round()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Centred(torch.autograd.Function):
    """The backward crosses the last dim, the forward does not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad - grad.mean(-1, keepdim=True)


class Flipped(Centred):
    """The backward changes places."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad.flip(-1)


class OwnNorm(torch.autograd.Function):
    """An rms norm with its backward written out: what autograd gives, of a statistic over the last dim."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        r = x.pow(2).mean(-1, keepdim=True).add(1e-6).rsqrt()
        ctx.save_for_backward(x, r)
        return x * r

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        x, r = ctx.saved_tensors
        return r * grad - x * r**3 * (grad * x).mean(-1, keepdim=True)


class OwnGelu(torch.autograd.Function):
    """Plain operators with their backward written out."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        s = torch.sigmoid(x)
        return grad * (s + x * s * (1 - s))


clip = Clip.apply  # bound before anything watches


class Mid(nn.Module):
    """An operation inside the sharded region."""

    def __init__(self, operation: Operation = F.relu) -> None:
        super().__init__()
        self.a, self.b, self.operation = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER), operation

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.operation(self.a(x)))


class Gated(Mid):
    """An operation on the whole value that enters the region twice."""

    def __init__(self, operation: Operation) -> None:
        super().__init__(operation)
        self.g = nn.Linear(OUTER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = self.operation(x)
        return self.b(self.g(x).sigmoid() * self.a(x))


class Up(nn.Module):
    """Parameters before a region."""

    def __init__(self, operation: Operation = lambda x: x) -> None:
        super().__init__()
        self.p, self.m = nn.Linear(OUTER, OUTER), Gated(operation)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(self.p(x))


class Checkpointed(Mid):
    """Runs its forward again in the backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.p, self.reentrant = nn.Linear(OUTER, OUTER), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, self.p(x), use_reentrant=self.reentrant)  # type: ignore[no-any-return]


def hooked(hook: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`x` with a hook on its gradient, where it has one."""
    if x.requires_grad:
        x.register_hook(hook)
    return x * 1


def clipped(grad: Tensor) -> Tensor:
    return grad.clamp(-0.02, 0.02)


def centred(grad: Tensor) -> Tensor:
    return grad - grad.mean(-1, keepdim=True)
