"""Leaves a model and the process as they were, whatever its copies did.

A closure or a function in a copy may still hold modules and parameters of the model itself. It then changes those: running
statistics, gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Buffers and gradients of `model` are the same objects with the same values after as before."""
    buffers = [(b, b.detach().clone()) for b in model.buffers() if not b.is_meta]
    gradients = [(p, p.grad, None if p.grad is None else p.grad.detach().clone()) for p in model.parameters()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                _put_back(buffer, before)
            for parameter, grad, value in gradients:
                if grad is not None and value is not None:
                    _put_back(grad, value)
                if parameter.grad is not grad:
                    parameter.grad = grad


@contextmanager
def one_thread() -> Iterator[None]:
    """Operators run in the thread that calls them.

    The models that are run are small, and the thread of each rank would start a pool of its own, whose threads spin while they wait.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _put_back(tensor: Tensor, before: Tensor) -> None:
    """Write `before` where something else is: a write makes a new version, which autograd may refuse later."""
    if tensor.layout is torch.strided and not torch.equal(_bits(tensor), _bits(before)):
        tensor.detach().copy_(before)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else tensor
