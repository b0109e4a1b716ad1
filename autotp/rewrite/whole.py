"""`param.full_tensor()` for parameters whose DTensor is not the model's tensor.

The DTensor of a fused weight is in the layout's order, one with padding or shared indices is larger than the model's. Such a
parameter gets a `full_tensor` of its own. It is an attribute of the instance, because parameters stay ordinary DTensors
(optimizers, checkpoints and the fast paths here ask for the type), so what makes new parameters must give it again: `KeepWhole`
does after `model.to(…)` and `copy.deepcopy(model)`. A parameter with shared indices also gets a hook there, because the gradient
that compiled code makes is an ordinary DTensor, whose norm would count every copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.errors import AutoTPError
from autotp.plan.layout import Layout, take
from autotp.rewrite.comm import Comm
from autotp.rewrite.grads import grad_of, shared_grad


def is_even(layout: Layout) -> bool:
    """True when the ranks' parts, one after the other, are the model's tensor."""
    end = 0
    for a, b in (run for rank in range(layout.tp if layout.dim is not None else 0) for run in layout.runs(rank)):
        if a != end:
            return False
        end = b
    return layout.dim is None or end == layout.shape[layout.dim]


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, p: DTensor, layout: Layout, comm: Comm) -> Tensor:
        ctx.layout, ctx.comm, ctx.spec = layout, comm, p._spec
        return layout.unshard(comm.all_gather(p._local_tensor))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        layout = ctx.layout
        part = take(grad, layout.dim, layout.runs(ctx.comm.rank)).contiguous()  # whole on every rank: so is that of each copy
        return grad_of(ctx.spec, part, layout if layout.is_shared else None), None, None


class WholeTensor:
    """`full_tensor` of one parameter: its whole tensor in the model's order and shape, differentiable. Collective."""

    __slots__ = ("_comm", "_layout", "_of")

    def __init__(self, of: Tensor | None = None, layout: Layout | None = None, comm: Comm | None = None) -> None:
        self._of, self._layout, self._comm = of, layout, comm

    def __call__(self, *, grad_placements: object = None) -> Tensor:
        if self._of is None:
            raise AutoTPError(
                "a copy of a parameter without its model is not known to be part of a whole: copy the model, or full_tensor()"
            )
        if grad_placements is not None:
            raise AutoTPError("full_tensor(grad_placements=…) of a parameter that is not cut evenly takes gradients that are whole only")
        return _Whole.apply(self._of, self._layout, self._comm)  # type: ignore[no-any-return, no-untyped-call]

    def belongs_to(self, p: Tensor) -> bool:
        """True unless this came to `p` with a copy of another one's attributes."""
        return self._of is p

    def __deepcopy__(self, memo: dict[int, Any]) -> WholeTensor:
        return WholeTensor()

    def __reduce__(self) -> tuple[type[WholeTensor], tuple[()]]:
        return WholeTensor, ()


class _Counted:
    """Post-accumulate hook: `p.grad` is a gradient that counts shared indices once, wherever it was made."""

    __slots__ = ("layout",)

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def __call__(self, p: Tensor) -> None:
        if type(p.grad) is DTensor:
            p.grad = shared_grad(p.grad._spec, p.grad._local_tensor, self.layout)


class KeepWhole:
    """The `_apply` (under `to`, `half`, `cuda`, …) of a module with such parameters; makes them what they were again."""

    def __init__(self, module: nn.Module, layouts: Mapping[str, Layout], comm: Comm) -> None:
        self.module, self.layouts, self.comm = module, layouts, comm

    def __call__(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        type(self.module)._apply(self.module, fn, recurse)  # type: ignore[no-untyped-call]
        self.attach(self.module._parameters)
        return self.module

    def attach(self, params: Mapping[str, Tensor | None]) -> None:
        """Give `params` their own `full_tensor`, and those with shared indices their hook."""
        for name, layout in self.layouts.items():
            p = params.get(name)
            if type(p) is not DTensor or (isinstance(known := vars(p).get("full_tensor"), WholeTensor) and known.belongs_to(p)):
                continue
            p.full_tensor = WholeTensor(p, layout, self.comm)  # type: ignore[method-assign]
            if layout.is_shared and p.requires_grad:
                p.register_post_accumulate_grad_hook(_Counted(layout))  # type: ignore[no-untyped-call]

    def __deepcopy__(self, memo: dict[int, Any]) -> KeepWhole:
        # A module is in `memo` before its attributes are copied, and its parameters are the first of them.
        copied = KeepWhole(memo.get(id(self.module), self.module), self.layouts, self.comm)
        copied.attach({name: memo.get(id(p)) for name, p in self.module._parameters.items()})
        return copied
