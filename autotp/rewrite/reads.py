"""How a module's forward reads parameters and buffers: as plain local tensors.

A parameter is a DTensor leaf; its local tensor enters the computation through one `autograd.Function` whose backward sums
what is still partial and returns a DTensor gradient with the parameter's placements, so that no DTensor is dispatched on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.distributed.tensor import DTensor

from autotp.plan.layout import Interval, Layout
from autotp.plan.model import Conversion, GradSum
from autotp.rewrite.comm import Comm
from autotp.rewrite.convert import bind_all
from autotp.rewrite.grads import grad_of


def local_tensor(p: Tensor) -> Tensor:
    """The plain tensor that this rank holds of `p`; carries no gradient for a DTensor."""
    return p._local_tensor if type(p) is DTensor else p


class GradFix:
    """What the gradient of one use of a parameter still needs: nothing, a sum, or a sum of the repeated runs of `dim`."""

    __slots__ = ("comm", "dim", "grad", "runs")

    def __init__(self, grad: GradSum, layout: Layout | None, comm: Comm) -> None:
        runs: tuple[Interval, ...] = layout.repeated if layout is not None else ()
        self.grad = grad if comm.size > 1 and (grad is not GradSum.REPEATED or runs) else GradSum.NONE
        self.runs = runs
        self.dim = 0 if layout is None or layout.dim is None else layout.dim
        self.comm = comm

    def __call__(self, grad: Tensor, *, owned: bool = False) -> Tensor:
        """The finished gradient; `grad` itself is changed only if `owned`."""
        if self.grad is GradSum.NONE:
            return grad
        if self.grad is GradSum.ALL:
            return self.comm.all_reduce_(grad) if owned and grad.is_contiguous() else self.comm.all_reduce(grad)
        dim = self.dim
        parts = [grad.narrow(dim, a, b - a) for a, b in self.runs]
        summed = self.comm.all_reduce(torch.cat(parts, dim))
        pieces, end, start = [], 0, 0
        for a, b in self.runs:
            pieces += [grad.narrow(dim, end, a - end), summed.narrow(dim, start, b - a)]
            end, start = b, start + b - a
        pieces.append(grad.narrow(dim, end, grad.shape[dim] - end))
        return torch.cat(pieces, dim)


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, fix: GradFix) -> Tensor:
        ctx.fix = fix
        ctx.spec = p._spec if type(p) is DTensor else None
        return local_tensor(p).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = ctx.fix(grad)
        spec = ctx.spec
        return grad if spec is None else grad_of(spec, grad), None


class _Fix(torch.autograd.Function):
    """The gradient's part of `_Read` alone, for code being compiled, where `to_local` makes the DTensor gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fix: GradFix) -> Tensor:
        ctx.fix = fix
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.fix(grad), None


class Read:
    """One use: how `name` of module `owner` is read. `value()` gives the tensor for one forward."""

    __slots__ = ("conversions", "convert", "fix", "is_buffer", "layout", "name", "owner")

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        comm: Comm,
        layout: Layout | None = None,
        grad: GradSum = GradSum.NONE,
        conversions: tuple[Conversion, ...] = (),
    ) -> None:
        self.owner = owner
        self.name = name
        self.layout = layout
        self.fix = GradFix(grad, layout, comm)
        self.conversions = conversions
        self.is_buffer = name in owner._buffers
        self.convert = bind_all(conversions, comm) if conversions else None

    def value(self) -> Tensor | None:
        """The local tensor with gradient recording where it is needed; None for an absent parameter."""
        p = (self.owner._buffers if self.is_buffer else self.owner._parameters)[self.name]
        if p is None:
            return None
        if not (p.requires_grad and torch.is_grad_enabled()):
            x = p._local_tensor if type(p) is DTensor else p
        elif is_dynamo_compiling():
            x = p.to_local() if isinstance(p, DTensor) else p
            x = x if self.fix.grad is GradSum.NONE else _Fix.apply(x, self.fix)  # type: ignore[no-untyped-call]
        elif type(p) is DTensor or self.fix.grad is not GradSum.NONE:
            x = _Read.apply(p, self.fix)  # type: ignore[no-untyped-call]
        else:
            x = p
        return x if self.convert is None else self.convert(x)
