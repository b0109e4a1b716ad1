"""Keeps the order of strides across collectives, which send what is contiguous.

A convolution's result may be channels-last, and so is its gradient. Kernels choose their way by that order, and one of them answers
another order than its own wrongly: the backward of batch norm on the CPU takes a gradient that is contiguous, beside an argument that
is channels-last, for channels-last where the last dim has one index (torch 2.13).
"""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_dynamo_compiling


def laid_out(found: Tensor, like: Tensor) -> Tensor:
    """Returns `found` with its dims in the order of memory of `like`, which has as many; itself where both are contiguous."""
    if is_dynamo_compiling() or type(like) is not Tensor or like.is_contiguous() or found is like:
        return found
    strides = like.stride()
    order = sorted(range(like.dim()), key=lambda dim: (-strides[dim], like.shape[dim] == 1))
    if 0 in strides or found.stride() == strides:  # an expanded tensor has no order
        return found
    back = sorted(range(like.dim()), key=order.__getitem__)
    return found.permute(order).contiguous().permute(back)
