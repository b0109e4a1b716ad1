"""What a parallel model does not run under: transforms of torch.func, batched gradients, forward-mode derivatives.

Collectives do not know of them: torch has no rule for one over a batch of vmap, and a sum over ranks changes a value but not its tangent.
So a model, a read of a parameter that records gradients, and a collective refuse, on every rank at the same place. Inside of a forward,
code that uses vmap for itself (transformers' masks do) meets none of the three.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

from autotp.errors import AutoTPError

_active = torch._C._are_functorch_transforms_active
_included: Callable[[torch._C.DispatchKey], bool] = torch._C._dispatch_tls_is_dispatch_key_included
_BATCHED = torch._C._dispatch_key_parse("VmapMode")  # the older vmap, which batched gradients use


def refuse_transforms() -> None:
    """Do nothing outside of a transform.

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
