"""Conversions between placements, each a function of one tensor (forward / backward):

    copy    identity / all-reduce            reduce  all-reduce / identity
    gather  all-gather / own part            slice   own part / zero-padded part
    once    value on rank 0, zeros elsewhere / identity

Each backward is written with the dual conversion, so gradients of gradients are right too. Without a gradient to record
no `autograd.Function` is made.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from autotp.errors import PlanError
from autotp.plan.layout import Expr, intervals, size
from autotp.plan.model import Conversion, Op
from autotp.rewrite.comm import Comm

Convert = Callable[[Tensor], Tensor]


def _records(x: Tensor) -> bool:
    return x.requires_grad and torch.is_grad_enabled()


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
        return comm.all_reduce(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return copy(grad, ctx.comm) if _records(grad) else grad, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, expr: Expr, comm: Comm) -> Tensor:
        ctx.args = dim, expr, comm
        return _join(x, dim, expr, comm)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return slice_part(grad, *ctx.args), None, None, None


class _Slice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, expr: Expr, comm: Comm) -> Tensor:
        ctx.args = dim, expr, comm
        return take(x, dim, expr, comm.rank, comm.size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        dim, expr, comm = ctx.args
        return _pad(grad, dim, expr, comm), None, None, None


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, comm: Comm) -> Tensor:
        return x.detach() if comm.rank == 0 else torch.zeros_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def copy(x: Tensor, comm: Comm) -> Tensor:
    """R → R with an all-reduced gradient; consumers of the same tensor share one copy."""
    if not _records(x):
        return x
    if is_dynamo_compiling():
        return _Copy.apply(x, comm)  # type: ignore[no-any-return]
    return comm.memo.get(x, lambda t: _Copy.apply(t, comm))


def reduce(x: Tensor, comm: Comm) -> Tensor:
    """P → R."""
    return _Reduce.apply(x, comm) if _records(x) else comm.all_reduce(x)  # type: ignore[no-any-return]


def gather(x: Tensor, dim: int, expr: Expr, comm: Comm) -> Tensor:
    """S → R: the full dim in the model's order."""
    return _Gather.apply(x, dim, expr, comm) if _records(x) else _join(x, dim, expr, comm)  # type: ignore[no-any-return]


def slice_part(x: Tensor, dim: int, expr: Expr, comm: Comm) -> Tensor:
    """R → S: this rank's part of the full dim."""
    return _Slice.apply(x, dim, expr, comm) if _records(x) else take(x, dim, expr, comm.rank, comm.size)  # type: ignore[no-any-return]


def once(x: Tensor, comm: Comm) -> Tensor:
    """R → P: the value on rank 0, zeros elsewhere."""
    if _records(x):
        return _Once.apply(x, comm)  # type: ignore[no-any-return]
    return x if comm.rank == 0 else torch.zeros_like(x)


def take(x: Tensor, dim: int, expr: Expr, rank: int, tp: int) -> Tensor:
    """`rank`'s part of `x` along `dim`: one narrowed view if it is one run, else a fresh tensor. A dim of size 1 carries nothing."""
    if x.shape[dim] == 1 and size(expr) != 1:
        return x.narrow(dim, 0, 1)
    if x.shape[dim] != size(expr):
        raise PlanError(f"cannot slice dim {dim} of a tensor of shape {tuple(x.shape)}: the plan wants size {size(expr)} there")
    runs = intervals(expr, rank, tp)
    parts = [x.narrow(dim, a, b - a) for a, b in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _pad(grad: Tensor, dim: int, expr: Expr, comm: Comm) -> Tensor:
    if size(expr) != 1 and grad.shape[dim] == 1:
        return grad
    pieces: list[Tensor] = []
    end = start = 0
    for a, b in intervals(expr, comm.rank, comm.size):
        pieces += [_zeros(grad, dim, a - end), grad.narrow(dim, start, b - a)]
        start, end = start + b - a, b
    pieces.append(_zeros(grad, dim, size(expr) - end))
    return torch.cat([p for p in pieces if p.shape[dim]], dim)


def _zeros(like: Tensor, dim: int, length: int) -> Tensor:
    shape = list(like.shape)
    shape[dim] = length
    return like.new_zeros(shape)


def _join(x: Tensor, dim: int, expr: Expr, comm: Comm) -> Tensor:
    shards = comm.all_gather(x)
    runs = sorted(
        (a, b, rank, start)
        for rank in range(comm.size)
        for a, b, start in _local_runs(expr, rank, comm.size)
    )
    pieces, end = [], 0
    for a, b, rank, start in runs:
        if b > end:  # runs that every rank holds are taken once
            pieces.append(shards[rank].narrow(dim, start + max(0, end - a), b - max(a, end)))
            end = b
    return torch.cat(pieces, dim)


def _local_runs(expr: Expr, rank: int, tp: int) -> list[tuple[int, int, int]]:
    runs, start = [], 0
    for a, b in intervals(expr, rank, tp):
        runs.append((a, b, start))
        start += b - a
    return runs


def convert(x: Tensor, conversion: Conversion, comm: Comm) -> Tensor:
    """`x` after one conversion of the plan."""
    op = conversion.op
    if op is Op.COPY:
        return copy(x, comm)
    if op is Op.REDUCE:
        return reduce(x, comm)
    if op is Op.ONCE:
        return once(x, comm)
    if conversion.dim is None or conversion.expr is None:
        raise PlanError(f"conversion {op.value} needs a dim and a layout expression, got {conversion}")
    return (gather if op is Op.GATHER else slice_part)(x, conversion.dim, conversion.expr, comm)


def convert_all(x: Tensor, conversions: Sequence[Conversion], comm: Comm) -> Tensor:
    """`x` after each of `conversions` in order."""
    for conversion in conversions:
        x = convert(x, conversion, comm)
    return x
