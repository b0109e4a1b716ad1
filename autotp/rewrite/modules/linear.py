"""Runs `nn.Linear` on shards: one autograd function from DTensor parameters to the output.

    column-parallel  y_r = x W_rᵀ + b_r      W: dim 0 sharded; ∂x is a partial sum (the entering copy reduces it)
    row-parallel     y = Σ_r x_r W_rᵀ + b    W: dim 1 sharded; the bias is added once, after the sum

Inference runs `F.linear` on the local tensors and a plain collective.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from autotp.errors import AutoTPError
from autotp.plan.conversions import Op
from autotp.plan.spec import ModulePlan
from autotp.rewrite.collectives.comm import Comm, keeps_results
from autotp.rewrite.collectives.conversions import copy, gather, once, reduce
from autotp.rewrite.collectives.split import Split
from autotp.rewrite.modules.classes import STATE
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, in_layout, laid_out
from autotp.rewrite.parameters.reads import Read
from autotp.rewrite.transforms import direct, refuse_transforms, unwrapped

_grad_enabled = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled


class LinearRun:
    """Runs one Linear: it copies its input in, sums or gathers its output, adds its bias once."""

    __slots__ = ("alone", "bias", "comm", "copies", "gathers", "once", "own", "reads", "reduces", "weight")

    def __init__(self, weight: Read, bias: Read | None, comm: Comm, *, copies: bool, reduces: bool, gathers: Split | None) -> None:
        self.comm = comm
        self.weight, self.bias = weight, bias
        self.once = bias is not None and bias.convert is not None
        if bias is not None and self.once:
            bias.convert = None
        self.own = self.reads = (weight,) if bias is None else (weight, bias)
        self.copies, self.reduces, self.gathers = copies, reduces, gathers
        self.alone: Any = None  # refuses calls outside of a call of the model, where a part would come or go

    def composed(self, x: Tensor) -> Tensor:
        """Runs the same computation from separate differentiable steps: for compilation, autocast and plain parameters."""
        weight = self.weight.value()
        bias = None if self.bias is None else self.bias.value()
        if self.copies:
            x = copy(x, self.comm)
        if bias is not None and self.once:
            if self.reduces:
                y = reduce(F.linear(x, weight), self.comm)  # type: ignore[arg-type]
                return y + bias.to(y.dtype)  # autocast gives another dtype than the bias has
            bias = once(bias, self.comm)
        y = F.linear(x, weight, bias)  # type: ignore[arg-type]
        return self.leave(y)

    def leave(self, y: Tensor) -> Tensor:
        """Returns `y` after the output's conversion."""
        if self.reduces:
            return reduce(y, self.comm)
        return y if self.gathers is None else gather(y, self.gathers)

    def local(self, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
        """Returns the output without recording: `x` [.., in], `w` [out, in], `b` [out] local tensors."""
        if self.reduces:
            if not self.once:
                return self.comm.all_reduce_(F.linear(x, w, b))
            y = self.comm.all_reduce_(F.linear(x, w))
            if b is None:
                return y
            return y + b.to(y.dtype) if keeps_results() else y.add_(b)
        if self.once and self.comm.rank:
            b = None
        y = F.linear(x, w, b)
        return y if self.gathers is None else gather(y, self.gathers)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: LayoutDTensor, bias: LayoutDTensor | None, run: LinearRun) -> Tensor:
        w = weight._local_tensor
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, w if needs[0] else None)
        ctx.run = run
        ctx.specs = weight._spec, None if bias is None else bias._spec
        y = run.local(x, w, None if bias is None else bias._local_tensor)
        return y.data if y._is_view() else y  # a view made in here could not be changed in place; nothing else holds its base

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        if _grad_enabled():
            raise AutoTPError("a parallel Linear has no second derivative; run without create_graph=True")
        refuse_transforms()
        x, w = ctx.saved_tensors
        run: LinearRun = ctx.run
        if run.gathers is not None:
            grad = run.gathers.own(grad)
        rows = grad if grad.dim() == 2 else grad.reshape(-1, grad.shape[-1])
        grad_x = grad_w = grad_b = None
        needs = ctx.needs_input_grad
        if needs[0]:
            grad_x = rows.mm(w)
            if grad.dim() != 2:
                grad_x = grad_x.view(*grad.shape[:-1], w.shape[1])
        if needs[1]:
            grad_w = rows.t().mm(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))
            if run.weight.fix.needed:
                grad_w = run.weight.fix(grad_w, owned=True)
            grad_w = laid_out(ctx.specs[0], grad_w, run.weight.fix.layout)  # type: ignore[arg-type]
        if needs[2]:
            grad_b = rows.sum(0)
            fix = run.bias.fix  # type: ignore[union-attr]  # it needs a gradient, so it is there
            if fix.needed:
                grad_b = fix(grad_b, owned=True)
            grad_b = laid_out(ctx.specs[1], grad_b, fix.layout)  # type: ignore[arg-type]
        return grad_x, grad_w, grad_b, None


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Makes the forward of a parallel Linear."""
    linear = direct(_Linear)

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        attributes = self.__dict__
        run: LinearRun = attributes[STATE]
        if is_dynamo_compiling():
            return run.composed(input)
        if run.alone is not None and not run.alone.running.open:
            run.alone.check()
        parameters = attributes["_parameters"]
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError as error:
            raise AutoTPError(
                f"a parallel {type(self).__qualname__} has lost its {error}: prune, reparametrize or quantize before parallelize"
            ) from None
        if not in_layout(weight, run.weight.layout) or (bias is not None and not in_layout(bias, run.bias.layout)):  # type: ignore[union-attr]
            return run.composed(input)
        if _grad_enabled() and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
            if _autocast():
                return run.composed(input)
            refuse_transforms()
            if run.copies and input.requires_grad:
                input = copy(input, run.comm)
            return linear(unwrapped(input), weight, bias, run)  # type: ignore[no-any-return]
        return run.local(input, weight._local_tensor, None if bias is None else bias._local_tensor)

    return forward


def linear_run(plan: ModulePlan | None, own: tuple[Read, ...], comm: Comm) -> LinearRun | None:
    """Returns the fast form of a Linear under `plan`, None where the plan asks for something it cannot fuse."""
    reads = {r.name: r for r in own}
    weight, bias = reads.get("weight"), reads.get("bias")
    if weight is None or weight.convert is not None or set(reads) - {"weight", "bias"}:
        return None
    if bias is not None and [c.op for c in bias.conversions] not in ([], [Op.ONCE]):
        return None
    if plan is None:
        return LinearRun(weight, bias, comm, copies=False, reduces=False, gathers=None)
    if plan.sites or plan.attributes or len(plan.inputs) > 1 or len(plan.outputs) > 1:
        return None
    copies, reduces = False, False
    gathers: Split | None = None
    for slot in plan.inputs:
        if slot.path != ("input",) or [c.op for c in slot.conversions] != [Op.COPY]:
            return None
        copies = True
    for slot in plan.outputs:
        if slot.path or len(slot.conversions) != 1:
            return None
        conversion = slot.conversions[0]
        if conversion.op is Op.REDUCE:
            reduces = True
        elif conversion.op is Op.GATHER and conversion.dim is not None and conversion.expr is not None:
            gathers = Split(conversion.dim, conversion.expr, comm)
        else:
            return None
    return LinearRun(weight, bias, comm, copies=copies, reduces=reduces, gathers=gathers)
