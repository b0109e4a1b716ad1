"""Reads parameters and buffers for a module's forward, as plain local tensors.

A parameter is a DTensor leaf. Its local tensor enters the computation through one `autograd.Function`, so that no DTensor is
dispatched on. The backward of that function sums gradients that are still partial, and returns a DTensor gradient in the
parameter's layout. A whole tensor that someone put where the parameter was (`functional_call`, an assignment) is cut at each read.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.distributed.tensor import DTensor

from autotp.errors import AutoTPError
from autotp.plan.conversions import Conversion, Op
from autotp.plan.layout import Layout, Shared, alike
from autotp.plan.spec import GradSum, Written
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import bind_all
from autotp.rewrite.collectives.split import split_of
from autotp.rewrite.parameters.data_parallel import DataParallelDTensor, is_managed
from autotp.rewrite.parameters.laying import lay_out
from autotp.rewrite.parameters.layout_dtensor import (
    LayoutDTensor,
    in_layout,
    laid_out,
    own_gradient,
)
from autotp.rewrite.parameters.own_memory import refuse_sparse
from autotp.rewrite.parameters.quantized import QuantizedDTensor
from autotp.rewrite.parameters.quantized_form import is_quantized, refuse_quantized
from autotp.rewrite.transforms import direct, refuse_transforms


class GradFix:
    """Finishes the gradient of one use of a parameter, before it is the parameter's.

    It sums over the ranks (`GradSum.ALL`) or over the copies of shared indices (`GradSum.SHARED`: copies of this rank and of others
    alike, so that they stay equal). It always puts zeros in the padding of the layout: the gradient that padding gets from the
    computation is of no use. A padded entry that starts at zero and has no gradient stays zero under any optimizer.
    """

    __slots__ = ("comm", "dim", "grad", "layout", "needed", "padding", "shared")

    def __init__(self, grad: GradSum, layout: Layout | None, comm: Comm) -> None:
        self.comm = comm
        self.layout = layout
        self.dim = 0 if layout is None or layout.dim is None else layout.dim
        self.padding = () if layout is None else layout.padding(comm.rank)
        self.shared = Shared(0, ()) if layout is None or grad is not GradSum.SHARED else layout.shared(comm.rank)
        crosses = comm.size > 1 and (grad is GradSum.ALL or self.shared.size > 0)
        self.grad = grad if crosses else GradSum.NONE
        self.needed = crosses or bool(self.padding)

    def __call__(self, grad: Tensor, *, owned: bool = False) -> Tensor:
        """Returns the finished gradient; `grad` itself is changed only if `owned`."""
        if not self.needed:
            return grad
        if not is_dynamo_compiling() and grad.layout is not torch.strided:  # asked in code being compiled, it would break the graph
            return self._sum_sparse(grad)
        if self.grad is GradSum.ALL:
            return self.comm.all_reduce_(grad) if owned and grad.is_contiguous() else self.comm.all_reduce(grad)
        if not owned:
            grad = grad.clone()
        for a, b in self.padding:
            grad.narrow(self.dim, a, b - a).zero_()
        if self.grad is GradSum.SHARED:
            self._sum_copies_(grad)
        return grad

    def _sum_sparse(self, grad: Tensor) -> Tensor:
        """Returns the sum over the ranks of sparse gradients of a whole parameter, which name the same rows: the ids are whole on
        every rank.

        Raises:
            AutoTPError: on every rank, where they do not, or the parameter is cut.
        """
        if self.grad is not GradSum.ALL or grad.layout is not torch.sparse_coo:
            refuse_sparse()
        grad = grad.coalesce()
        rows, values = grad.indices(), grad.values()
        said = torch.stack([torch.tensor(rows.numel(), device=rows.device), (rows.flatten() * _odd(rows)).sum()])
        if any(not torch.equal(said, other) for other in self.comm.all_gather(said)):
            refuse_sparse()
        return torch.sparse_coo_tensor(rows, self.comm.all_reduce(values), grad.shape, is_coalesced=True)

    def _sum_copies_(self, grad: Tensor) -> None:
        """Gives every copy of a shared index the sum of all of them; a rank without one takes part in the collective."""
        dim, shape = self.dim, list(grad.shape)
        shape[dim] = self.shared.size
        total = grad.new_zeros(shape)
        for at, start, length in self.shared.pieces:
            total.narrow(dim, start, length).add_(grad.narrow(dim, at, length))
        total = self.comm.all_reduce_(total)
        for at, start, length in self.shared.pieces:
            grad.narrow(dim, at, length).copy_(total.narrow(dim, start, length))


def _odd(rows: Tensor) -> Tensor:
    """Factors that tell lists of numbers apart by one sum."""
    return torch.arange(rows.numel(), device=rows.device) * 0x9E3779B97F4A7C + 1


class _Read(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: DTensor, fix: GradFix) -> Tensor:
        ctx.fix, ctx.spec = fix, p._spec
        return p._local_tensor.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        refuse_transforms()
        return given(grad, ctx.fix, ctx.spec), None


_read = direct(_Read)


class _Give(torch.autograd.Function):
    """The dual of `_Read`, for second derivatives: the gradient of a use becomes the parameter's.

    Whatever it sums, every rank's summand, and every copy, has the whole sum's gradient as its own.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, fix: GradFix, spec: Any) -> Tensor:
        ctx.fix, ctx.spec = fix, spec
        return own_gradient(spec, fix(grad), grad, fix.layout)  # type: ignore[arg-type]  # a parameter has a layout

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        fix: GradFix = ctx.fix
        if not in_layout(grad, fix.layout):
            grad = grad.full_tensor() if isinstance(grad, DTensor) else grad
            grad = lay_out(grad, lambda whole: laid_out(ctx.spec, fix.layout.shard(whole.detach(), fix.comm.rank), fix.layout))  # type: ignore[arg-type, union-attr]
        if grad.requires_grad and torch.is_grad_enabled():
            return _Read.apply(grad, fix), None, None  # type: ignore[no-untyped-call]
        return grad._local_tensor, None, None  # type: ignore[attr-defined]


def given(grad: Tensor, fix: GradFix, spec: Any) -> Tensor:
    """Returns the gradient of a parameter placed as `spec`, made of that of one use: finished by `fix`, laid out, in memory of its own.

    It is differentiable where `grad` is, which is so for second derivatives alone.
    """
    if grad.requires_grad and torch.is_grad_enabled():
        return _Give.apply(grad, fix, spec)  # type: ignore[no-any-return, no-untyped-call]
    return own_gradient(spec, fix(grad), grad, fix.layout)  # type: ignore[arg-type]


def read_param(p: DTensor, fix: GradFix) -> Tensor:
    """Returns the local tensor of `p`, recording gradients; not in code that is compiled."""
    refuse_transforms()
    return _read(p, fix)  # type: ignore[no-any-return]


class _Cut(torch.autograd.Function):
    """This rank's part of a whole tensor that stands where a parameter was; its gradient is whole again."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, fix: GradFix) -> Tensor:
        ctx.fix = fix
        return fix.layout.shard(whole.detach(), fix.comm.rank)  # type: ignore[union-attr]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if grad.layout is not torch.strided:
            refuse_sparse()
        if grad.requires_grad and torch.is_grad_enabled():
            return _Uncut.apply(grad, ctx.fix), None  # type: ignore[no-untyped-call]
        return _joined(grad, ctx.fix), None


class _Uncut(torch.autograd.Function):
    """The dual of `_Cut`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, fix: GradFix) -> Tensor:
        ctx.fix = fix
        return _joined(grad, fix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Cut.apply(grad, ctx.fix), None  # type: ignore[no-untyped-call]


def _joined(grad: Tensor, fix: GradFix) -> Tensor:
    return fix.layout.unshard(fix.comm.all_gather(fix(grad)))  # type: ignore[union-attr]


class _Fix(torch.autograd.Function):
    """Does what `_Read` does to the gradient alone: for local tensors, and for compiled code, where `to_local` makes the DTensor
    gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, fix: GradFix) -> Tensor:
        ctx.fix = fix
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        if not is_dynamo_compiling() and grad.requires_grad and torch.is_grad_enabled():
            return _Fixed.apply(grad, ctx.fix), None  # type: ignore[no-untyped-call]
        return ctx.fix(grad), None


class _Fixed(torch.autograd.Function):
    """The dual of `_Fix`, see `_Give`."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, fix: GradFix) -> Tensor:
        ctx.fix = fix
        fixed = fix(grad)
        return fixed.view_as(fixed) if fixed is grad else fixed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Fix.apply(grad, ctx.fix), None  # type: ignore[no-untyped-call]


def refuse_second(p: Tensor) -> None:
    """Refuse a backward with create_graph=True under FSDP, which reduces gradients without recording it.

    Raises:
        AutoTPError: FSDP manages `p`.
    """
    if is_managed(p):
        raise AutoTPError(
            "second derivatives (create_graph=True) are not computed under FSDP, which reduces gradients without recording how: take "
            "them of a model that is tensor-parallel alone"
        )


def refuse_sharded_read(module: str, name: str) -> NoReturn:
    """Refuse a forward that trains a parameter while only FSDP's shard of it is there: its gradient would be one rank's.

    Raises:
        AutoTPError: always.
    """
    raise AutoTPError(
        f"{module}.{name} is read while FSDP holds only a shard of it. Either its unit was not called: call the model that was given to "
        "fully_shard, or give the inner one to it as well. Or another module reads it, which must be in one unit with it: pass both to one "
        "call, fully_shard([a, b], mesh=…), or leave both to the unit that encloses them"
    )


def read_by_token(read: Read, fix: GradFix) -> Tensor | None:
    """The value of a whole parameter for code that runs on this rank's tokens: `fix` sums its gradient over the ranks."""
    p = read.tensor
    if p is None or not (p.requires_grad and torch.is_grad_enabled()):
        return read.value()
    if type(p) is LayoutDTensor and in_layout(p, read.layout):
        return _read(p, fix)  # type: ignore[no-any-return]
    x = read.value()
    return _Fix.apply(x, fix) if fix.needed else x  # type: ignore[no-untyped-call]


class Read:
    """One use: how `name` of module `owner` is read. `value()` gives the tensor for one forward.

    `held`: the code takes the parameter itself from somewhere, and gets the value instead. `of_parts`: the model's parameters are
    plain tensors that hold a rank's part, no DTensors (a rehearsal without ranks).
    """

    __slots__ = ("comm", "conversions", "convert", "fix", "held", "is_buffer", "layout", "name", "of_parts", "owner", "written")

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        comm: Comm,
        layout: Layout | None = None,
        grad: GradSum = GradSum.NONE,
        conversions: tuple[Conversion, ...] = (),
        written: Written = Written.NEVER,
        held: bool = False,
    ) -> None:
        self.owner, self.held = owner, held
        self.name, self.comm = name, comm
        self.layout = layout
        self.fix = GradFix(grad, layout, comm)
        self.conversions, self.written = conversions, written
        self.is_buffer = name in owner._buffers
        self.of_parts = self.is_buffer
        self.convert = bind_all(conversions, comm) if conversions else None

    @property
    def tensor(self) -> Tensor | None:
        """Returns the tensor that the owner has under this name.

        Raises:
            AutoTPError: nothing any more.
        """
        try:
            return (self.owner._buffers if self.is_buffer else self.owner._parameters)[self.name]
        except KeyError:
            kind = type(self.owner).__qualname__
            raise AutoTPError(
                f"a parallel {kind} has lost its {self.name!r}: prune, reparametrize, or take that back, before parallelize"
            ) from None

    def value(self) -> Tensor | None:
        """Returns the local tensor with gradient recording where it is needed; None for an absent parameter."""
        p = self.tensor
        if p is None:
            return None
        record = p.requires_grad and torch.is_grad_enabled()
        if record and not is_dynamo_compiling():
            refuse_transforms()
        if type(p) is LayoutDTensor and (is_dynamo_compiling() or in_layout(p, self.layout)):
            if not record:
                x = p._local_tensor
            elif is_dynamo_compiling():
                x = p.to_local()
                x = _Fix.apply(x, self.fix) if self.fix.needed else x  # type: ignore[no-untyped-call]
            else:
                x = _read(p, self.fix)
        elif self.of_parts:
            x = _Fix.apply(p, self.fix) if record and self.fix.needed else p  # type: ignore[no-untyped-call]
        else:
            x = self._put_there(p, record)
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

    def _put_there(self, p: Tensor, record: bool) -> Tensor:
        """Returns the part of a tensor that someone put where the parameter was: a whole one, or a DTensor placed as the parameter.

        Raises:
            AutoTPError: for any other.
        """
        layout = self.layout
        if layout is None:
            return p
        if isinstance(p, QuantizedDTensor) and alike(p._layout, layout):
            return p._local_tensor
        if is_quantized(p):
            refuse_quantized(type(self.owner).__name__, self.name)
        if isinstance(p, DataParallelDTensor) and record:
            refuse_sharded_read(type(self.owner).__name__, self.name)
        if isinstance(p, LayoutDTensor):
            p = p.full_tensor() if record else p._whole()
        if isinstance(p, DTensor):
            placed = [q.dim if q.is_shard() else None for q in p._spec.placements if not q.is_partial()]  # type: ignore[attr-defined]
            if placed == [layout.dim] and tuple(p._local_tensor.shape) == layout.local_shape:
                if not record:
                    return p._local_tensor
                if is_dynamo_compiling():
                    return _Fix.apply(p.to_local(), self.fix)  # type: ignore[no-any-return, no-untyped-call]
                return _Read.apply(p, self.fix)  # type: ignore[no-any-return, no-untyped-call]
        elif tuple(p.shape) == layout.shape:
            if layout.dim is None:
                return _Fix.apply(p, self.fix) if record and self.fix.needed else p  # type: ignore[no-untyped-call]
            return _Cut.apply(p, self.fix) if record else layout.shard(p, self.fix.comm.rank)  # type: ignore[no-untyped-call]
        kind = f"a DTensor of shape {tuple(p.shape)} placed {p._spec.placements}" if isinstance(p, DTensor) else f"shape {tuple(p.shape)}"
        raise AutoTPError(
            f"{type(self.owner).__name__}.{self.name} was replaced after parallelize by a tensor that is neither whole, of shape "
            f"{layout.shape}, nor placed as the parameter was: {kind}. Put a whole tensor of that shape there, or copy_ into the "
            "parameter; change shapes before parallelize"
        )
