"""Sums, maxima and softmaxes over a vocabulary in parts.

Each is one small collective: of one number a token, or of one from each rank. The logarithm of the sum of exponentials is computed of
every rank's own one, so nothing overflows that does not on one device.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import copy, reduce


def statistic(x: Tensor, comm: Comm) -> Tensor:
    """The sum over the ranks of `x`, for use on parts: its gradient is summed too."""
    return copy(reduce(x, comm), comm)


HALF = (torch.float16, torch.bfloat16)


def wide(x: Tensor) -> Tensor:
    """In float32 for half precision, as torch computes inside of its operators."""
    return x.float() if x.dtype in HALF else x


def _logsumexp(local: Tensor, dim: int, comm: Comm) -> Tensor:
    return torch.logsumexp(torch.stack(comm.all_gather(torch.logsumexp(local, dim))), 0)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, comm: Comm) -> Tensor:
        found = _logsumexp(local, dim, comm)
        ctx.save_for_backward(local, found)
        ctx.dim, ctx.comm = dim, comm
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        local, found = ctx.saved_tensors
        weights = (local - copy(found, ctx.comm).unsqueeze(ctx.dim)).exp()
        return weights * copy(grad, ctx.comm).unsqueeze(ctx.dim), None, None


class _LogSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, comm: Comm) -> Tensor:
        found = local - _logsumexp(local, dim, comm).unsqueeze(dim)
        ctx.save_for_backward(found)
        ctx.dim, ctx.comm = dim, comm
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (found,) = ctx.saved_tensors
        return grad - found.exp() * statistic(grad.sum(ctx.dim, keepdim=True), ctx.comm), None, None


def logsumexp(local: Tensor, dim: int, comm: Comm) -> Tensor:
    """[.., held, ..] → [.., ..], whole."""
    return _LogSumExp.apply(local, dim, comm)  # type: ignore[no-any-return, no-untyped-call]


def log_softmax(local: Tensor, dim: int, comm: Comm) -> Tensor:
    """[.., held, ..] → the same, of this rank's entries."""
    return _LogSoftmax.apply(local, dim, comm)  # type: ignore[no-any-return, no-untyped-call]


def total(local: Tensor, dims: tuple[int, ...], keepdim: bool, comm: Comm) -> Tensor:
    """The sum over `dims`, the vocabulary among them, whole."""
    return reduce(local.sum(dims, keepdim=keepdim), comm)


def argmax(local: Tensor, dim: int, start: int, comm: Comm) -> Tensor:
    """The index of the largest entry in the whole vocabulary, the first one where several are; NaN counts as the largest."""
    if local.shape[dim]:
        best, at = local.max(dim)
    else:
        shape = [n for i, n in enumerate(local.shape) if i != dim % local.ndim]
        best, at = local.new_full(shape, -torch.inf), torch.zeros(shape, dtype=torch.int64, device=local.device)
    values, places = torch.stack(comm.all_gather(best)), torch.stack(comm.all_gather(at + start))
    return places.gather(0, values.argmax(0, keepdim=True)).squeeze(0)


def held(local: Tensor, dim: int, ids: Tensor, start: int) -> Tensor:
    """`gather(dim, ids)` of this rank's entries, `ids` counted in the whole vocabulary; 0 for those that other ranks hold."""
    if not local.shape[dim]:
        return local.new_zeros(ids.shape)
    here = (ids >= start) & (ids < start + local.shape[dim])
    return torch.where(here, local.gather(dim, torch.where(here, ids - start, 0)), 0)


def picked(local: Tensor, dim: int, ids: Tensor, start: int, comm: Comm) -> Tensor:
    """`gather(dim, ids)` of the whole tensor; whole."""
    return reduce(held(local, dim, ids, start), comm)
