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

from autotp.plan.layout import Layout, Shared
from autotp.plan.model import Conversion, GradSum, Op, Written
from autotp.plan.pieces import is_even
from autotp.rewrite.comm import Comm
from autotp.rewrite.convert import bind_all
from autotp.rewrite.grads import grad_of
from autotp.rewrite.split import split_of


def local_tensor(p: Tensor) -> Tensor:
    """The plain tensor that this rank holds of `p`; carries no gradient for a DTensor."""
    return p._local_tensor if isinstance(p, DTensor) else p


class GradFix:
    """What the gradient of one use of a parameter still needs before it is the parameter's.

    A sum over the ranks (`GradSum.ALL`), a sum over the copies of shared indices (`GradSum.SHARED`: copies of this rank and of
    others alike, so that they stay equal), and zeros in the padding of the layout, always: what padding gets from the
    computation is of no use, and a padded entry that starts at zero and has no gradient stays zero under any optimizer.
    """

    __slots__ = ("comm", "dim", "grad", "layout", "needed", "padding", "shared")

    def __init__(self, grad: GradSum, layout: Layout | None, comm: Comm) -> None:
        self.comm = comm
        self.layout = None if layout is None or is_even(layout) else layout  # of the gradient, see `grad_of`
        self.dim = 0 if layout is None or layout.dim is None else layout.dim
        self.padding = () if layout is None else layout.padding(comm.rank)
        self.shared = Shared(0, ()) if layout is None or grad is not GradSum.SHARED else layout.shared(comm.rank)
        crosses = comm.size > 1 and (grad is GradSum.ALL or self.shared.size > 0)
        self.grad = grad if crosses else GradSum.NONE
        self.needed = crosses or bool(self.padding)

    def __call__(self, grad: Tensor, *, owned: bool = False) -> Tensor:
        """The finished gradient; `grad` itself is changed only if `owned`."""
        if not self.needed:
            return grad
        if self.grad is GradSum.ALL:
            return self.comm.all_reduce_(grad) if owned and grad.is_contiguous() else self.comm.all_reduce(grad)
        if not owned:
            grad = grad.clone()
        for a, b in self.padding:
            grad.narrow(self.dim, a, b - a).zero_()
        if self.grad is GradSum.SHARED:
            self._sum_copies_(grad)
        return grad

    def _sum_copies_(self, grad: Tensor) -> None:
        """Every copy of a shared index gets the sum of all of them; a rank without one takes part in the collective."""
        dim, shape = self.dim, list(grad.shape)
        shape[dim] = self.shared.size
        total = grad.new_zeros(shape)
        for at, start, length in self.shared.pieces:
            total.narrow(dim, start, length).add_(grad.narrow(dim, at, length))
        total = self.comm.all_reduce_(total)
        for at, start, length in self.shared.pieces:
            grad.narrow(dim, at, length).copy_(total.narrow(dim, start, length))


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: Tensor, fix: GradFix) -> Tensor:
        ctx.fix = fix
        ctx.spec = p._spec if isinstance(p, DTensor) else None
        return local_tensor(p).detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        fix, spec = ctx.fix, ctx.spec
        grad = fix(grad)
        return grad if spec is None else grad_of(spec, grad, fix.layout), None


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

    __slots__ = ("comm", "conversions", "convert", "fix", "is_buffer", "layout", "name", "owner", "written")

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        comm: Comm,
        layout: Layout | None = None,
        grad: GradSum = GradSum.NONE,
        conversions: tuple[Conversion, ...] = (),
        written: Written = Written.NEVER,
    ) -> None:
        self.owner = owner
        self.name, self.comm = name, comm
        self.layout = layout
        self.fix = GradFix(grad, layout, comm)
        self.conversions, self.written = conversions, written
        self.is_buffer = name in owner._buffers
        self.convert = bind_all(conversions, comm) if conversions else None

    def value(self) -> Tensor | None:
        """The local tensor with gradient recording where it is needed; None for an absent parameter."""
        p = (self.owner._buffers if self.is_buffer else self.owner._parameters)[self.name]
        if p is None:
            return None
        if not (p.requires_grad and torch.is_grad_enabled()):
            x = p._local_tensor if isinstance(p, DTensor) else p
        elif is_dynamo_compiling():
            x = p.to_local() if isinstance(p, DTensor) else p
            x = _Fix.apply(x, self.fix) if self.fix.needed else x  # type: ignore[no-untyped-call]
        elif isinstance(p, DTensor) or self.fix.needed:
            x = _Read.apply(p, self.fix)  # type: ignore[no-untyped-call]
        else:
            x = p
        return x if self.convert is None else self.convert(x)

    def put_back(self, part: Tensor) -> None:
        """Write `part`, this rank's part of a buffer that is read in slices, and the other ranks' into the whole buffer. Collective."""
        whole = self.owner._buffers[self.name]
        assert whole is not None
        with torch.no_grad():
            for c in reversed(self.conversions):
                if c.op is Op.SLICE and c.dim is not None and c.expr is not None:
                    part = split_of(c.dim, c.expr, self.comm).join(part.detach())
            whole.data.copy_(part)  # like the operator's own write, no new version: what was saved for a backward is not used in it
