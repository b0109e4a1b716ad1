"""Gathers the full tensors of a rewritten model, in the model's own order, on every rank. Collective: call on all ranks."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.plan.layout import Layout
from autotp.plan.spec import ParamPlan
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.parameters.fsdp import reshard
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor
from autotp.rewrite.parameters.names import Names


@torch.no_grad()
def unshard(tensor: Tensor, layout: Layout, comm: Comm) -> Tensor:
    """Returns the full tensor of shape `layout.shape`: of one in that layout, of every rank's part of it, or of one that is whole
    already.
    """
    tensor = tensor.detach()
    if isinstance(tensor, LayoutDTensor):
        return tensor._whole()
    if isinstance(tensor, DTensor):
        if layout.tp == 1:  # FSDP made it
            return tensor.full_tensor()
        if layout.dim is not None and all(p.is_replicate() for p in tensor._spec.placements):
            return tensor._local_tensor
        tensor = tensor._local_tensor
    elif tuple(tensor.shape) == layout.shape:  # put where the parameter was
        return tensor
    return tensor if layout.dim is None else layout.unshard(comm.all_gather(tensor))


def full_state_dict(model: nn.Module, params: Mapping[str, ParamPlan], comm: Comm) -> dict[str, Tensor]:
    """Returns `model.state_dict()` (same keys and order, buffers too) with every parameter whole; tied names share one tensor.

    Wrappers of torch's (`checkpoint_wrapper`, `torch.compile`) add nothing to a key.
    """
    comm.ask()
    reshard(model)
    own_name = Names(params)
    whole: dict[int, Tensor] = {}
    tied = {own_name(name): id(p) for name, p in model.named_parameters(remove_duplicate=False)}
    state: dict[str, Tensor] = {}
    for key, value in model.state_dict(keep_vars=True).items():
        name = own_name(key)
        if name in params:
            one = tied[name]
            if one not in whole:
                whole[one] = unshard(value, params[name].layout, comm)
            state[name] = whole[one]
        else:
            # a module that an adapter wraps since has a name that the plan does not know
            state[name] = _whole(value.detach()) if isinstance(value, Tensor) else value
    return state


def full_grads(model: nn.Module, params: Mapping[str, ParamPlan], comm: Comm) -> dict[str, Tensor]:
    """Returns whole gradients by the names of `model.named_parameters()`; parameters without a gradient are left out."""
    comm.ask()
    reshard(model)
    own_name = Names(params)
    grads = {own_name(name): p.grad for name, p in model.named_parameters()}
    return {n: unshard(g, params[n].layout, comm) if n in params else _whole(g) for n, g in grads.items() if g is not None}


def _whole(tensor: Tensor) -> Tensor:
    return tensor._whole() if isinstance(tensor, LayoutDTensor) else tensor
