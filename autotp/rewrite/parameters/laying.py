"""Makes a parameter whole, and lays a whole gradient out: each is the other's gradient, so second derivatives are right too.

What is whole is the same on every rank, and so is every copy of an index. A rank's part and what is laid out of it are such a pair, too.
DTensor's own functions would give an ordinary DTensor for a gradient, which the operators before do not take beside plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


class Whole(torch.autograd.Function):
    """The whole tensor of one that is laid out."""

    @staticmethod
    def forward(ctx: Any, p: Any) -> Tensor:
        ctx.of = p.detach()
        whole: Tensor = p._whole()
        return whole.detach() if whole is p._local_tensor else whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return lay_out(grad, ctx.of._laid)


class Local(torch.autograd.Function):
    """This rank's part of a tensor that is laid out; its gradient is laid out so too."""

    @staticmethod
    def forward(ctx: Any, x: Any) -> Tensor:
        ctx.of = x.detach()
        local: Tensor = x._local_tensor
        return local.view_as(local)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _OfLocal.apply(grad, ctx.of)  # type: ignore[no-any-return, no-untyped-call]


class _OfLocal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, of: Any) -> Tensor:
        return of._of_local(local)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Any) -> tuple[Tensor, None]:
        return grad.to_local(), None


class _Lay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole: Tensor, lay: Callable[[Tensor], Tensor]) -> Tensor:
        return lay(whole)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.full_tensor() if isinstance(grad, DTensor) else grad, None


def lay_out(whole: Tensor, lay: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns `lay(whole)`, a gradient in some layout; differentiable where `whole` is, for second derivatives."""
    if whole.requires_grad and torch.is_grad_enabled():
        return _Lay.apply(whole, lay)  # type: ignore[no-any-return, no-untyped-call]
    return lay(whole)
