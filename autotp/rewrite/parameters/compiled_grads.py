"""Keeps hooks on the parameters of a module, whatever is done to the module.

Code being compiled reads a parameter as an ordinary DTensor, and its gradient is one, in an order that nothing says. A hook on the
parameter gives the gradient its layout. That hook and those of users are lost where parameters are made anew. `KeepHooks` sets them
again after `model.to(…)`, and ours after `copy.deepcopy(model)`. Whole tensors that `load_state_dict` is given are cut.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autotp.plan.layout import Layout, alike
from autotp.rewrite.parameters.data_parallel import DataParallelDTensor, placed
from autotp.rewrite.parameters.laying import lay_out
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, same_layout
from autotp.rewrite.parameters.make import as_dtensor
from autotp.rewrite.parameters.placements import placements
from autotp.rewrite.undo import Undo


class _Ordered:
    """The first hook of a parameter: it gives the gradient the parameter's layout, wherever the gradient was made. It cuts a whole one."""

    __slots__ = ("layout", "mesh")

    def __init__(self, layout: Layout, mesh: DeviceMesh) -> None:
        self.layout, self.mesh = layout, mesh

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        if grad is None:  # the parameter was read together with others, and nothing came of it
            return None
        if grad.layout is not torch.strided and self.layout.dim is None:  # a plain tensor, see `own_gradient`
            return None
        if isinstance(grad, LayoutDTensor) and (grad._layout is self.layout or alike(grad._layout, self.layout)):
            return None
        if type(grad) is DTensor and grad._spec.placements == placements(self.layout):
            return as_dtensor(grad._local_tensor.clone(), self.layout, self.mesh)  # compiled code made it, for others too perhaps
        return lay_out(grad.full_tensor() if isinstance(grad, DTensor) else grad, self._laid)

    def _laid(self, whole: Tensor) -> Tensor:
        return as_dtensor(self.layout.shard(whole.detach(), self.mesh.get_local_rank()).clone(), self.layout, self.mesh)


class _Averaged:
    """The first hook of a parameter that FSDP shards, for a gradient that comes of a use outside of its unit; FSDP's own pass it by."""

    __slots__ = ("like",)

    def __init__(self, like: DataParallelDTensor) -> None:
        self.like = like

    def __call__(self, grad: Tensor | None) -> Tensor | None:
        if grad is None or (isinstance(grad, LayoutDTensor) and same_layout(grad, self.like)):
            return None
        return lay_out(grad.full_tensor() if isinstance(grad, DTensor) else grad, self.like._laid)


def order_gradient(p: LayoutDTensor) -> None:
    """Gives a parameter that requires a gradient the hook that lays the gradient out, as the first one, unless it has the hook."""
    hooks: Any = p._backward_hooks or OrderedDict()
    if not any(type(h) is _Ordered or type(h) is _Averaged for h in hooks.values()):
        hook: Any = (
            _Averaged(placed(p._spec, p._local_tensor.new_empty(0), p._layout))
            if isinstance(p, DataParallelDTensor)
            else _Ordered(p._layout, p._spec.mesh)
        )
        handle = DTensor.register_hook(p, hook)  # type: ignore[no-untyped-call]
        hooks = p._backward_hooks
        hooks.move_to_end(handle.id, last=False)


class KeepHooks:
    """Replaces the `_apply` (under `to`, `half`, `cuda`, …) of a module with parameters; sets their hooks again."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        hooks = {n: (p._backward_hooks, p._post_accumulate_grad_hooks) for n, p in self.module._parameters.items() if p is not None}
        type(self.module)._apply(self.module, fn, recurse)  # type: ignore[no-untyped-call]
        for name, p in self.module._parameters.items():
            if p is not None and name in hooks:
                before, after = hooks[name]
                if before:  # the object may still have them while the tensor beneath it has not
                    p._backward_hooks = before
                if after:
                    p._post_accumulate_grad_hooks = after
        self.attach(self.module._parameters)
        return self.module

    def attach(self, params: Mapping[str, Tensor | None]) -> None:
        """Give the hook to those of `params` that need it and have it not."""
        for p in params.values():
            if type(p) is LayoutDTensor and p.requires_grad:
                order_gradient(p)

    def __deepcopy__(self, memo: dict[int, Any]) -> KeepHooks:
        # A module is in `memo` before its attributes are copied, and its parameters are the first of them.
        copied = KeepHooks(memo.get(id(self.module), self.module))
        copied.attach({name: memo.get(id(p)) for name, p in self.module._parameters.items()})
        return copied


def cut_loaded(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Pre-hook of `load_state_dict`: it cuts whole tensors to parts of the parameters that they are for."""
    for name, p in module._parameters.items():
        given = state.get(prefix + name)
        if (
            isinstance(p, LayoutDTensor)
            and isinstance(given, Tensor)
            and not isinstance(given, DTensor)
            and tuple(given.shape) == p._layout.shape
        ):
            with torch.no_grad():
                state[prefix + name] = p._cut(given)


def keep_with(module: nn.Module, undo: Undo) -> None:
    """Set all these hooks on one module whose parameters are laid out."""
    keep = KeepHooks(module)
    keep.attach(module._parameters)
    undo.set_attribute(module, "_apply", keep)
    undo.push(module.register_load_state_dict_pre_hook(cut_loaded).remove)  # type: ignore[no-untyped-call]
