"""What running an autograd function shows of its backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from autotp.trace.functions import Applied, TensorLike, prove
from tests.models.backward import Centred, Clip, ClipApart, ClipSame, Flipped, OwnGelu, OwnNorm, StraightThrough

X = TensorLike((2, 3, 8), torch.float32)
EVERY = frozenset((-1, -2, -3))


class Dropped(torch.autograd.Function):
    """Draws the same mask in the forward that stands alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mask = torch.rand_like(x) < 0.5
        return x.masked_fill(ctx.mask, 0.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.masked_fill(ctx.mask, 0.0)


class Scaled(torch.autograd.Function):
    """The gradient of a number is a sum over every element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        return (x * scale).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        return grad * scale, 2 * (grad * x).sum()


class Thresholded(Clip):
    """A norm of the gradient that only large ones exceed."""

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        norm = grad.norm()
        return grad / norm if norm > 100 else grad


class Written(Clip):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        return x.mul_(2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Broken(Clip):
    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        raise NotImplementedError


@pytest.mark.parametrize(
    ("function", "shown", "local"),
    [
        (OwnGelu, True, EVERY),
        (OwnNorm, True, EVERY - {-1}),
        (Dropped, True, frozenset()),  # another part, another mask
        (Written, True, EVERY),
        (Clip, False, EVERY),
        (ClipSame, False, EVERY),
        (ClipApart, False, EVERY),
        (StraightThrough, False, EVERY),
        (Centred, False, EVERY - {-1}),
        (Flipped, False, EVERY - {-1}),
        (Thresholded, False, frozenset()),
        (Broken, False, frozenset()),
    ],
)
def test_proof(function: Any, shown: bool, local: frozenset[int]) -> None:
    scope = prove(Applied(function, (X,), {}))
    assert (scope.shown, scope.local) == (shown, local)


def test_gradients_that_sum_over_what_would_be_cut() -> None:
    scope = prove(Applied(Scaled, (X, TensorLike((), torch.float32)), {}))
    assert (scope.shown, scope.local) == (False, frozenset())


def test_what_is_too_large_is_not_run() -> None:
    scope = prove(Applied(OwnGelu, (TensorLike((1 << 12, 1 << 12), torch.float32),), {}))
    assert (scope.shown, scope.local) == (False, frozenset())


def test_running_leaves_the_random_state() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    prove(Applied(Dropped, (X,), {}))
    assert torch.equal(torch.get_rng_state(), before)
