"""Runs column-parallel Linears that read one tensor (q, k, v; gate, up; one alone) by one autograd function, where gradients are recorded.

    forward    y_i = x W_iᵀ + b_i                       x whole; tokens in parts are gathered once
    backward   ∂x = Σ_i ∂y_i W_i, summed over ranks     while the sum runs, ∂W_i = ∂y_iᵀ x and ∂b_i are computed

The first Linear of a group computes the outputs of all, and the others hand theirs on if they are called with the same tensor and have the
same parameters as then. A Linear that is called otherwise computes for itself.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.errors import AutoTPError
from autotp.rewrite.collectives import conversions
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import reduce
from autotp.rewrite.in_parts.calls import plainly
from autotp.rewrite.in_parts.tensor import part
from autotp.rewrite.modules.classes import STATE
from autotp.rewrite.modules.matrix import matrix
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, in_layout, laid_out
from autotp.rewrite.parameters.reads import Read, given, read_param, refuse_second
from autotp.rewrite.sequence.rows import Rows
from autotp.rewrite.sequence.tokens import ParallelTokens, entered_rows, sum_own
from autotp.rewrite.transforms import direct, refuse_transforms, unwrapped

Params = tuple[LayoutDTensor | None, ...]


class _Linears(torch.autograd.Function):
    """params: weight and bias, or None, of each Linear in turn; reads: theirs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, comm: Comm, kind: Rows | None, reads: Sequence[Read | None], *params: LayoutDTensor | None
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.comm, ctx.kind, ctx.reads, ctx.params, ctx.rest = comm, kind, reads, params, None
        weights = [None if p is None else p._local_tensor for p in params]
        needs = ctx.needs_input_grad
        keeps = any(needs[4::2])
        ctx.save_for_backward(x if keeps else None, *(w if needs[0] else None for w in weights[::2]))
        whole = x if kind is None else kind.join(x)
        made = [F.linear(whole, w, b) for w, b in zip(weights[::2], weights[1::2], strict=True)]  # type: ignore[arg-type]
        return tuple([y.data if y._is_view() else y for y in made])  # a view made in here could not be changed in place

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_transforms()
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _recorded(ctx, grads)
        x, *weights = _saved(ctx, grads)
        comm: Comm = ctx.comm
        kind: Rows | None = ctx.kind
        again = None if kind is None or x is None else comm.begin_gather(kind.filled(x))
        rows = [None if g is None else matrix(g) for g in grads]
        of_x: Tensor | None = None
        pending = None
        if needs[0]:
            for g, w in zip(rows, weights, strict=True):
                if g is not None:
                    of_x = g.mm(w) if of_x is None else of_x.addmm_(g, w)
            if of_x is not None:
                pending = comm.begin_sum(of_x) if kind is None else comm.begin_scatter(kind.filled(of_x, comm.size))
        if x is not None:
            x = x if again is None or kind is None else kind.joined(again())
            x = matrix(x)
        found: list[Tensor | None] = []
        for i, (g, weight, bias) in enumerate(zip(rows, ctx.params[::2], ctx.params[1::2], strict=True)):
            read, of_bias = ctx.reads[2 * i], ctx.reads[2 * i + 1]
            found.append(_finished(g.t().mm(x), read, weight) if g is not None and needs[4 + 2 * i] else None)
            found.append(_finished(g.sum(0), of_bias, bias) if g is not None and needs[5 + 2 * i] else None)
        if pending is not None:
            of_x = pending()
            shape = next(g for g in grads if g is not None).shape[:-1]
            of_x = of_x.view(*shape, of_x.shape[-1]) if kind is None else kind.part_of(kind.cut(of_x))
        return of_x, None, None, None, *found


def _saved(ctx: Any, grads: Sequence[Tensor | None]) -> Sequence[Any]:
    """What the forward saved.

    Apart, each Linear could have a backward of its own. After one that did not reach all of them, autograd would let go of what the rest
    need, so it is kept for them.

    Raises:
        AutoTPError: it was changed in place since.
    """
    if ctx.rest is None:
        saved: Sequence[Any] = ctx.saved_tensors
        if any(g is None for g in grads):
            ctx.rest = saved, [None if t is None else t._version for t in saved]
        return saved
    saved, versions = ctx.rest
    used = [True, *(g is not None for g in grads)]
    if any(u and t is not None and t._version != v for u, t, v in zip(used, saved, versions, strict=True)):
        raise AutoTPError(
            "the input or a weight of Linears that read one tensor was changed in place between the backward of one and that of another: "
            "run both before the change"
        )
    return saved


def _finished(grad: Tensor, read: Read, p: LayoutDTensor) -> Tensor:
    fix = read.fix
    return laid_out(p._spec, fix(grad, owned=True) if fix.needed else grad, fix.layout)  # type: ignore[arg-type]


def _recorded(ctx: Any, grads: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Does what the backward does from differentiable steps: for second derivatives."""
    x, needs, kind, comm = _saved(ctx, grads)[0], ctx.needs_input_grad, ctx.kind, ctx.comm
    whole = None if x is None else entered_rows(x, kind) if kind is not None else conversions.copy(x, comm)
    of_x: Tensor | None = None
    found: list[Tensor | None] = []
    for i, (grad, weight, bias) in enumerate(zip(grads, ctx.params[::2], ctx.params[1::2], strict=True)):
        refuse_second(weight)
        of_weight = of_bias = None
        if grad is not None:
            rows = matrix(grad)
            if needs[0]:
                own = grad.matmul(read_param(weight, ctx.reads[2 * i].fix) if needs[4 + 2 * i] else weight._local_tensor)
                of_x = own if of_x is None else of_x + own
            if needs[4 + 2 * i] and whole is not None:
                of_weight = given(rows.t().mm(matrix(whole)), ctx.reads[2 * i].fix, weight._spec)
            if needs[5 + 2 * i]:
                of_bias = given(rows.sum(0), ctx.reads[2 * i + 1].fix, bias._spec)
        found += [of_weight, of_bias]
    if of_x is not None:
        of_x = reduce(of_x, comm) if kind is None else sum_own(of_x, kind)
    return of_x, None, None, None, *found


_linears = direct(_Linears)


class _Made:
    """The outputs of one run that are not handed on yet, and what they were made of."""

    __slots__ = ("hooks", "outputs", "params", "state", "states", "x")

    def __init__(self, x: Tensor, params: Params, outputs: list[Tensor | None]) -> None:
        self.x, self.params, self.outputs, self.hooks = x, params, outputs, _saving()
        with plainly():
            self.state, self.states = (x._version, x.requires_grad), [_states(params[at : at + 2]) for at in range(0, len(params), 2)]


class Together:
    """The Linears of one group, in the order in which they were called while tracing."""

    __slots__ = ("comm", "made", "modules")

    def __init__(self, modules: Sequence[nn.Module], comm: Comm) -> None:
        self.modules, self.comm = tuple(modules), comm
        self.made: _Made | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Together:
        made = memo[id(self)] = Together((), self.comm)
        made.modules = tuple(copy.deepcopy(m, memo) for m in self.modules)
        return made

    def output(self, module: nn.Module, x: Tensor) -> Tensor | None:
        """The output of one of the Linears for `x`; None where it has to compute for itself."""
        if module is self.modules[0]:
            return self._begun(x)
        made = self.made
        if made is None or made.x is not x or made.state != _state(x) or made.hooks is not _saving():
            return None
        at = next(i for i, m in enumerate(self.modules) if m is module)
        y, own = made.outputs[at], _params(module)
        if y is None or own is None or any(a is not b for a, b in zip(own, made.params[2 * at : 2 * at + 2], strict=True)):
            return None
        with plainly():
            if _states(own) != made.states[at]:
                return None
        made.outputs[at] = None
        if all(out is None for out in made.outputs):
            self.made = None
        return y

    def _begun(self, x: Tensor) -> Tensor | None:
        self.made = None
        if any(m._forward_pre_hooks for m in self.modules[1:]):  # one may change a weight before its Linear runs
            return None
        params: list[LayoutDTensor | None] = []
        reads: list[Read | None] = []
        for m in self.modules:
            own = _params(m)
            if own is None:
                return None
            params += own
            run = m.__dict__[STATE]
            reads += [run.weight, run.bias]
        kind, source = (x._kind, part(x)) if type(x) is ParallelTokens else (None, x)
        refuse_transforms()
        first, *others = _linears(unwrapped(source), self.comm, kind, reads, *params)
        self.made = _Made(x, tuple(params), [None, *others]) if others else None
        return first  # type: ignore[no-any-return]


def _saving() -> Any:
    """What packs tensors that are saved now: a checkpoint runs again what was saved inside of it, and must find the same there."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return None if hooks is None else hooks[0]


def _state(x: Tensor) -> tuple[int, bool]:
    with plainly():  # a tensor in parts would go the long way to its own attributes
        return x._version, x.requires_grad


def _states(params: Params) -> list[tuple[int, bool, int]]:
    return [(p._version, p.requires_grad, p._local_tensor._version) for p in params if p is not None]


def _params(module: nn.Module) -> tuple[LayoutDTensor, LayoutDTensor | None] | None:
    """Weight and bias of a Linear, None where one is not the parameter that autotp made."""
    run, own = module.__dict__[STATE], module.__dict__["_parameters"]
    weight, bias = own.get("weight"), own.get("bias")
    if not in_layout(weight, run.weight.layout) or (bias is None) is not (run.bias is None):
        return None
    if bias is not None and not in_layout(bias, run.bias.layout):
        return None
    return weight, bias
