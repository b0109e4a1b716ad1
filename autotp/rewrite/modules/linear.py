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
from autotp.rewrite.collectives.conversions import ENTERED, copy, gather, once, own, reduce, taken_once
from autotp.rewrite.collectives.split import Split
from autotp.rewrite.in_parts.tensor import part
from autotp.rewrite.logits.logits import Show
from autotp.rewrite.modules.classes import STATE
from autotp.rewrite.modules.linears import Together
from autotp.rewrite.modules.matrix import matrix
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, in_layout, laid_out
from autotp.rewrite.parameters.quantized_form import Form, is_quantized
from autotp.rewrite.parameters.reads import GradFix, Read, given, read_by_token, read_param, refuse_second
from autotp.rewrite.sequence.rows import Rows
from autotp.rewrite.sequence.scatter import Scatter
from autotp.rewrite.sequence.tokens import Again, ParallelTokens, entered_rows, tokens_of
from autotp.rewrite.transforms import direct, refuse_transforms, unwrapped

_grad_enabled = torch.is_grad_enabled
_autocast = torch._C._is_any_autocast_enabled


class LinearRun:
    """Runs one Linear: it copies its input in, sums or gathers its output, adds its bias once."""

    __slots__ = (
        "alone", "bias", "by_token", "comm", "copies", "gathers", "once", "own", "reads", "reduces", "scatters", "seen", "shows",
        "together", "weight",
    )  # fmt: skip

    def __init__(
        self, weight: Read, bias: Read | None, comm: Comm, *, copies: bool, reduces: bool, leaves: Split | Show | Scatter | None
    ) -> None:
        self.comm = comm
        self.weight, self.bias = weight, bias
        self.once = bias is not None and bias.convert is not None
        if bias is not None and self.once:
            bias.convert = None
        self.own = self.reads = (weight,) if bias is None else (weight, bias)
        self.copies, self.reduces = copies, reduces
        self.gathers = leaves if isinstance(leaves, Split) else None
        self.shows = leaves if isinstance(leaves, Show) else None
        self.scatters = leaves if isinstance(leaves, Scatter) else None
        self.by_token: tuple[GradFix, ...] | None = None  # runs on the rows of tokens, with weights whose gradients are then summed
        self.together: Together | None = None
        self.seen: Any = None  # the quantized weight that was looked at last
        self.alone: Any = None  # refuses calls outside of a call of the model, where a part would come or go

    def composed(self, x: Tensor) -> Tensor:
        """Runs the same computation from separate differentiable steps: for compilation, autocast and plain parameters."""
        weight = self.weight.value()
        bias = None if self.bias is None else self.bias.value()
        if self.copies:
            x = copy(x, self.comm)
        if bias is not None and self.once:
            if self.reduces:
                y = self.leave(self.product(x, weight))
                return y + bias.to(y.dtype)  # autocast gives another dtype than the bias has
            bias = once(bias, self.comm)
        return self.leave(self.product(x, weight, bias))

    def product(self, x: Tensor, weight: Any, bias: Tensor | None = None) -> Tensor:
        """Returns this rank's output before any conversion.

        Raises:
            AutoTPError: the weight rounds its input, and nobody has seen to it that all ranks round alike.
        """
        if is_quantized(weight) and weight is not self.seen and not is_dynamo_compiling():
            layout = self.weight.layout
            if layout is not None and layout.dim == 1 and Form.of(weight, "weight").quantizes_activations:
                raise AutoTPError(
                    f"a weight of shape {layout.shape} that quantizes its input was put into a row-parallel Linear, where each rank would "
                    "round its part by a scale of its own: call autotp.quantize_(model, config), or quantize before parallelize"
                )
            self.seen = weight
        return F.linear(x, weight, bias)

    def leave(self, y: Tensor) -> Tensor:
        """Returns `y` after the output's conversion."""
        if self.scatters is not None:
            return self.scatters(y)
        if self.reduces:
            return reduce(y, self.comm)
        y = y if self.gathers is None else gather(y, self.gathers)
        return y if self.shows is None else self.shows(y)

    def local(self, x: Tensor, w: Tensor, b: Tensor | None, kind: Rows | None = None) -> Tensor:
        """Returns the output without recording: `x` [.., in], `w` [out, in], `b` [out] local tensors; for a `kind` this rank's rows."""
        if self.reduces:
            if kind is not None:
                rows = kind.sum(F.linear(x, w, None if self.once else b))
                return rows if b is None or not self.once else rows + b.to(rows.dtype)
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
    def forward(ctx: Any, x: Tensor, weight: LayoutDTensor, bias: LayoutDTensor | None, run: LinearRun, kind: Rows | None) -> Tensor:
        w = weight._local_tensor
        needs = ctx.needs_input_grad
        again: Again | None = x.__dict__.get(ENTERED) if needs[1] else None
        mine = None if again is None else again.local
        if again is not None and mine is not None:  # a rank keeps its rows, and gathers those of others in the backward
            again.users += 1
        ctx.again = None if mine is None else again
        ctx.save_for_backward((x if mine is None else mine) if needs[1] else None, w if needs[0] else None)
        ctx.run, ctx.kind = run, kind
        ctx.weight, ctx.bias = weight, bias
        y = run.local(x, w, None if bias is None else bias._local_tensor, kind)
        return y.data if y._is_view() else y  # a view made in here could not be changed in place; nothing else holds its base

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_transforms()
        if _grad_enabled():
            return _recorded(ctx, grad)
        x, w = ctx.saved_tensors
        run: LinearRun = ctx.run
        if ctx.kind is not None:
            grad = ctx.kind.join(grad)
        if run.gathers is not None:
            grad = run.gathers.own(grad)
        rows = matrix(grad)
        grad_x = grad_w = grad_b = None
        needs = ctx.needs_input_grad
        if needs[0]:
            grad_x = rows.mm(w)
            if grad.dim() != 2:
                grad_x = grad_x.view(*grad.shape[:-1], w.shape[1])
        if needs[1]:
            if ctx.again is not None:
                x = ctx.again.gathered(x)
            grad_w = rows.t().mm(matrix(x))
            if run.weight.fix.needed:
                grad_w = run.weight.fix(grad_w, owned=True)
            grad_w = laid_out(ctx.weight._spec, grad_w, run.weight.fix.layout)  # type: ignore[arg-type]
        if needs[2]:
            grad_b = rows.sum(0)
            fix = run.bias.fix  # type: ignore[union-attr]  # it needs a gradient, so it is there
            if fix.needed:
                grad_b = fix(grad_b, owned=True)
            grad_b = laid_out(ctx.bias._spec, grad_b, fix.layout)  # type: ignore[arg-type]
        return grad_x, grad_w, grad_b, None, None


def _recorded(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Does what the backward of `_Linear` does from differentiable steps: for second derivatives."""
    run: LinearRun = ctx.run
    weight, bias, x = ctx.weight, ctx.bias, ctx.saved_tensors[0]
    if ctx.again is not None:
        x = entered_rows(x, ctx.again.kind)
    refuse_second(weight)
    needs = ctx.needs_input_grad
    grad_x = grad_w = grad_b = None
    after = grad  # the gradient of the sum over the ranks, to which the bias is added
    if ctx.kind is not None:
        after, grad = gather(grad, ctx.kind), entered_rows(grad, ctx.kind)
    elif run.reduces:
        grad = copy(grad, run.comm)
    if run.gathers is not None:
        grad = own(grad, run.gathers)
    if needs[0]:
        grad_x = grad.matmul(read_param(weight, run.weight.fix) if needs[1] else weight._local_tensor)
    rows = matrix(grad)
    if needs[1]:
        grad_w = given(rows.t().mm(matrix(x)), run.weight.fix, weight._spec)
    if needs[2]:
        if run.once:
            rows = matrix(after) if run.reduces else taken_once(rows, run.comm)
        grad_b = given(rows.sum(0), run.bias.fix, bias._spec)  # type: ignore[union-attr]  # it needs a gradient, so it is there
    return grad_x, grad_w, grad_b, None, None


def make_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """Makes the forward of a parallel Linear."""
    linear = direct(_Linear)

    def forward(self: nn.Module, input: Tensor) -> Tensor:
        attributes = self.__dict__
        run: LinearRun = attributes[STATE]
        if run.alone is not None and not run.alone.running.open:
            run.alone.check()
        if is_dynamo_compiling():
            return run.composed(input)
        if type(input) is ParallelTokens:
            if run.by_token is not None:
                weights: Any = [read_by_token(read, fix) for read, fix in zip(run.own, run.by_token, strict=True)]
                return tokens_of(F.linear(part(input), *weights), input._kind)
            if run.together is None or not _grad_enabled() or _autocast():
                input = input.enter() if run.copies else input.gathered()
        if run.together is not None and _grad_enabled() and not _autocast():
            output = run.together.output(self, input)
            if output is not None:
                return output
            if type(input) is ParallelTokens:
                input = input.enter()
        parameters = attributes["_parameters"]
        try:
            weight, bias = parameters["weight"], parameters["bias"]
        except KeyError as error:
            raise AutoTPError(
                f"a parallel {type(self).__qualname__} has lost its {error}: prune, reparametrize or quantize before parallelize"
            ) from None
        if not in_layout(weight, run.weight.layout) or (bias is not None and not in_layout(bias, run.bias.layout)):  # type: ignore[union-attr]
            return run.composed(input)
        kind = None if run.scatters is None else run.scatters.rows(input, weight._local_tensor.shape[0])
        if _grad_enabled() and (input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)):
            if _autocast():
                return run.composed(input)
            refuse_transforms()
            if run.copies and input.requires_grad:
                input = copy(input, run.comm)
            y: Tensor = linear(unwrapped(input), weight, bias, run, kind)
        else:
            y = run.local(input, weight._local_tensor, None if bias is None else bias._local_tensor, kind)
        if kind is not None:
            return tokens_of(y, kind)
        return y if run.shows is None else run.shows(y)

    return forward


def linear_run(plan: ModulePlan | None, own: tuple[Read, ...], comm: Comm, scatter: Scatter | None) -> LinearRun | None:
    """Returns the fast form of a Linear under `plan`, None where the plan asks for something it cannot fuse."""
    reads = {r.name: r for r in own}
    weight, bias = reads.get("weight"), reads.get("bias")
    if weight is None or weight.convert is not None or set(reads) - {"weight", "bias"}:
        return None
    if bias is not None and [c.op for c in bias.conversions] not in ([], [Op.ONCE]):
        return None
    if plan is None:
        return LinearRun(weight, bias, comm, copies=False, reduces=False, leaves=None)
    if plan.sites or plan.attributes or len(plan.inputs) > 1 or len(plan.outputs) > 1:
        return None
    copies, reduces = False, False
    leaves: Split | Show | Scatter | None = None
    for slot in plan.inputs:
        if slot.path != ("input",) or [c.op for c in slot.conversions] not in ([Op.COPY], [Op.ENTER]):
            return None
        copies = True
    for slot in plan.outputs:
        if slot.path or len(slot.conversions) != 1:
            return None
        conversion = slot.conversions[0]
        if conversion.op in (Op.REDUCE, Op.SCATTER):
            reduces = True
            leaves = scatter if conversion.op is Op.SCATTER else None
        elif conversion.op is Op.GATHER and conversion.dim is not None and conversion.expr is not None:
            leaves = Split(conversion.dim, conversion.expr, comm)
        elif conversion.op is Op.LAZY_GATHER and conversion.expr is not None:
            leaves = Show(Split(-1, conversion.expr, comm))
        else:
            return None
    return LinearRun(weight, bias, comm, copies=copies, reduces=reduces, leaves=leaves)
