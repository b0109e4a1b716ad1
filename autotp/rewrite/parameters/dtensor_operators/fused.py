"""Runs fused steps of optimizers, which work on each element."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
STEPS = frozenset(
    getattr(_aten, name) for name in ("_fused_adam_", "_fused_adamw_", "_fused_sgd_", "_fused_adagrad_") if hasattr(_aten, name)
)


def step_of(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs a fused step on plain tensors.

    Its kernels go through the memory of a parameter, its gradient and its moments together, whatever their strides. On one device
    autograd and the optimizer make the latter in the strides of the parameter; here they may be made in others.
    """
    again: list[tuple[Tensor, Tensor]] = []

    def like(t: Tensor, p: Tensor) -> Tensor:
        if t.shape != p.shape or t.stride() == p.stride():
            return t
        form = torch.empty_like(p, dtype=t.dtype)
        if t.stride() == form.stride():
            return t
        again.append((t, form.copy_(t)))
        return form

    params = args[0]
    result = func(
        params, *([like(t, p) for t, p in zip(a, params, strict=False)] if isinstance(a, list | tuple) else a for a in args[1:]), **kwargs
    )
    for t, form in again:
        t.copy_(form)
    return result
