"""Refuses to run a parallel model under transforms of torch.func, batched gradients, forward-mode derivatives and torch.jit.trace.

Collectives do not support them: torch has no rule for one over a batch of vmap, and a sum over ranks changes a value but not its
tangent. So a model, a read of a parameter that records gradients, and a collective refuse, on every rank at the same place. Inside
of a forward, code that uses vmap for itself (transformers' masks do) meets none of the three.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from autotp.errors import AutoTPError

_active = torch._C._are_functorch_transforms_active
_traced = torch._C._get_tracing_state
_included: Callable[[torch._C.DispatchKey], bool] = torch._C._dispatch_tls_is_dispatch_key_included
_BATCHED = torch._C._dispatch_key_parse("VmapMode")  # the older vmap, which batched gradients use
# What a transform that has ended left on a tensor is taken off by `Function.apply`, and here for `direct`.
unwrapped: Callable[[Tensor], Tensor] = torch._C._functorch.unwrap_if_dead


def refuse_transforms() -> None:
    """Do nothing outside of a transform and of a trace of torch.jit.

    Raises:
        AutoTPError: inside one.
    """
    if _active() or _included(_BATCHED) or forward_ad._current_level >= 0:
        raise AutoTPError(
            "a parallel model and its gradients are not computed under torch.func (vmap, grad, jacrev, jvp, …), is_grads_batched=True, "
            "vectorize=True or forward-mode derivatives, which its collectives do not know: give the model the whole batch, take "
            "derivatives with backward() or torch.autograd.grad, one vector at a time (torch.autograd.functional.jacobian does without "
            "vectorize), or take full_tensor() of a parameter"
        )
    if _traced() is not None:
        raise AutoTPError(
            "a parallel model is not traced by torch.jit (trace, the older torch.onnx.export), which does not know of its collectives: "
            "trace the model before parallelize, or compile the parallel one with torch.compile"
        )


def direct(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """Returns `function.apply` without its part in Python, which serves torch.func alone and costs as much as all the rest of an
    application.

    For callers that refuse transforms, give `unwrapped` tensors, and are not being compiled.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[no-any-return, misc]
