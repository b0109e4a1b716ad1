"""Runs the conversions between placements, each a function of one tensor (forward / backward):

    copy    identity / all-reduce            reduce  all-reduce / identity
    (of a tensor in parts: all-gather / reduce-scatter)
    gather  all-gather / own part            slice   own part / zero-padded part
    once    value on rank 0, zeros elsewhere / identity

Each backward is written with the dual conversion, so gradients of gradients are right too: that of `gather` is `own`, whose
own backward gathers again; that of `slice` is made of local operators; that of `once`, taken again, counts on rank 0 alone. See `split`
for padding and shared indices. Without a gradient to record no `autograd.Function` is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from autotp.errors import PlanError
from autotp.plan.conversions import Conversion, Op
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.split import Dealing, split_of
from autotp.rewrite.collectives.strides import laid_out
from autotp.rewrite.transforms import direct, refuse_transforms, unwrapped

Convert = Callable[[Tensor], Tensor]
#: The attribute of a tensor that was gathered for a region (`enter`): it is a copy already.
ENTERED = "_autotp_entered"


def _records(x: Tensor) -> bool:
    if x.requires_grad and torch.is_grad_enabled():
        if not is_dynamo_compiling():
            refuse_transforms()
        return True
    return False


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return x.detach()  # no view of x: a view would keep x alive through the memo

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return reduce(grad, ctx.comm), None


class _Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return laid_out(comm.all_reduce(x), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return copy(grad, ctx.comm) if _records(grad) else grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Dealing) -> Tensor:
        ctx.split = split
        return laid_out(split.join(x), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return own(grad, ctx.split), None


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Dealing) -> Tensor:
        ctx.split = split
        return laid_out(split.own(x), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return gather(grad, ctx.split), None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: Dealing) -> Tensor:
        ctx.split = split
        part = split.take(x)
        ctx.whole = part is x  # it broadcasts: nothing was cut
        return part

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad if ctx.whole else laid_out(ctx.split.pad(grad), grad), None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return x.detach() if comm.rank == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return taken_once(grad, ctx.comm), None


class _TakenOnce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        ctx.comm = comm
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return once(grad, ctx.comm), None


_copy, _reduce = direct(_Copy), direct(_Reduce)


def _plain(x: Tensor) -> Tensor:
    """The whole tensor of one that is kept in parts."""
    if type(x) is Tensor or (full := getattr(x, "gathered", None)) is None:
        return x
    return full()  # type: ignore[no-any-return]


def copy(x: Tensor, comm: Comm) -> Tensor:
    """R → R with an all-reduced gradient; consumers of the same tensor share one copy. A tensor in parts is gathered for it."""
    if type(x) is not Tensor and (enter := getattr(x, "enter", None)) is not None:
        return enter()  # type: ignore[no-any-return]
    if not _records(x):
        return x
    if is_dynamo_compiling():
        return _Copy.apply(x, comm)  # type: ignore[no-any-return, no-untyped-call]
    if ENTERED in x.__dict__:
        return x
    return comm.memo.get(x, lambda t: _copy(unwrapped(t), comm))


def reduce(x: Tensor, comm: Comm) -> Tensor:
    """P → R."""
    x = _plain(x)
    if not _records(x):
        return laid_out(comm.all_reduce(x), x)
    if is_dynamo_compiling():
        return _Reduce.apply(x, comm)  # type: ignore[no-any-return, no-untyped-call]
    return _reduce(unwrapped(x), comm)  # type: ignore[no-any-return]


def gather(x: Tensor, split: Dealing) -> Tensor:
    """S → R: the full dim in the model's order."""
    x = _plain(x)
    return _Gather.apply(x, split) if _records(x) else laid_out(split.join(x), x)  # type: ignore[no-untyped-call]


def slice_part(x: Tensor, split: Dealing) -> Tensor:
    """R → S: this rank's part of the full dim."""
    x = _plain(x)
    return _Slice.apply(x, split) if _records(x) else split.take(x)  # type: ignore[no-untyped-call]


def once(x: Tensor, comm: Comm) -> Tensor:
    """R → P: the value on rank 0, zeros elsewhere."""
    x = _plain(x)
    if _records(x):
        return _Once.apply(x, comm)  # type: ignore[no-any-return, no-untyped-call]
    return x if comm.rank == 0 else torch.zeros_like(x)


def taken_once(x: Tensor, comm: Comm) -> Tensor:
    """R → R, the dual of `once`: the gradient counts on rank 0 alone."""
    return _TakenOnce.apply(x, comm) if _records(x) else x  # type: ignore[no-untyped-call]


def own(x: Tensor, split: Dealing) -> Tensor:
    """R → S, the dual of `gather`: this rank's part, with zeros at what it does not own."""
    x = _plain(x)
    return _Own.apply(x, split) if _records(x) else laid_out(split.own(x), x)  # type: ignore[no-untyped-call]


def bind(conversion: Conversion, comm: Comm) -> Convert:
    """Returns the function of one conversion of the plan.

    Raises:
        PlanError: for a GATHER or SLICE without dim or expression, and for what is more than a function of one tensor.
    """
    op = conversion.op
    if op in _WHOLE:
        return partial(_WHOLE[op], comm=comm)  # type: ignore[call-arg]
    if op not in _ALONG:
        raise PlanError(f"conversion {op.value} is no function of one tensor")
    if conversion.dim is None or conversion.expr is None:
        raise PlanError(f"conversion {op.value} needs a dim and a layout expression, got {conversion}")
    return partial(_ALONG[op], split=split_of(conversion.dim, conversion.expr, comm))  # type: ignore[call-arg]


def bind_all(conversions: Sequence[Conversion], comm: Comm) -> Convert:
    """Returns the function that does each of `conversions` in order."""
    steps = tuple(bind(c, comm) for c in conversions)
    if len(steps) == 1:
        return steps[0]

    def run(x: Tensor) -> Tensor:
        for step in steps:
            x = step(x)
        return x

    return run


#: The functions of conversions of whole tensors, and of those along a dim. Every one has to stand here: none falls to another's.
_WHOLE: dict[Op, Callable[[Tensor, Comm], Tensor]] = {Op.COPY: copy, Op.ENTER: copy, Op.REDUCE: reduce, Op.ONCE: once}
_ALONG: dict[Op, Callable[[Tensor, Dealing], Tensor]] = {Op.GATHER: gather, Op.SLICE: slice_part}
