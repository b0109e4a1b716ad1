"""Reads small parameters together: one autograd function a forward instead of one a module.

A norm's weight costs a Python function forward and one backward (70 µs a step of CPU time); a model has dozens. While the root's
forward records gradients, all of them enter the graph through one function, whose backward also sums the partial gradients in one
all-reduce. Its gradients arrive at the end of the backward, so only small parameters take part. A module that runs alone, or again
for a checkpoint, reads for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from autotp.plan.spec import GradSum
from autotp.rewrite.modules.module import ModuleRun
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, in_layout, own_gradient
from autotp.rewrite.parameters.reads import GradFix
from autotp.rewrite.transforms import refuse_transforms
from autotp.rewrite.undo import Undo

SMALL = 1 << 16  # elements; larger gradients should not wait for the end of the backward


class _ReadMany(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fixes: Sequence[GradFix], *params: LayoutDTensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.fixes = fixes
        ctx.specs = [p._spec for p in params]
        return tuple(p._local_tensor.detach() for p in params)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_transforms()
        done = _sum_together(list(grads), ctx.fixes)
        parts = zip(done, grads, ctx.specs, ctx.fixes, strict=True)
        return None, *(None if g is None or was is None else own_gradient(s, g, was, fix.layout) for g, was, s, fix in parts)


def _sum_together(grads: list[Tensor | None], fixes: Sequence[GradFix]) -> list[Tensor | None]:
    """`grads` finished by their `fixes`; those to be summed whole share one all-reduce for each dtype."""
    together: dict[torch.dtype, list[int]] = {}
    for i, (grad, fix) in enumerate(zip(grads, fixes, strict=True)):
        if grad is not None and fix.grad is GradSum.ALL and grad.layout is torch.strided:
            together.setdefault(grad.dtype, []).append(i)
        elif grad is not None:
            grads[i] = fix(grad)
    for indices in together.values():
        parts = [g for i in indices if (g := grads[i]) is not None]
        summed = fixes[indices[0]].comm.all_reduce_(torch.cat([g.reshape(-1) for g in parts]))
        for i, g, flat in zip(indices, parts, summed.split([g.numel() for g in parts]), strict=True):  # type: ignore[no-untyped-call]
            grads[i] = flat.view(g.shape)
    return grads


class BatchReads:
    """Hooks the root's forward to read for all `runs` at once."""

    def __init__(self, runs: Sequence[tuple[nn.Module, ModuleRun]]) -> None:
        self.runs = tuple(runs)
        self.active = False

    def before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        """Runs as the forward pre-hook."""
        if is_dynamo_compiling() or self.active or not torch.is_grad_enabled():
            return
        refuse_transforms()
        wanted: list[tuple[dict[str, Tensor], str]] = []
        params: list[LayoutDTensor] = []
        fixes: list[GradFix] = []
        for module, run in self.runs:
            shared: dict[str, Tensor] = {}
            run.shared = shared
            for name, fix in run.light or ():
                p: Tensor | None = module._parameters.get(name)
                if p is not None and p.requires_grad and p.numel() <= SMALL and in_layout(p, fix.layout):
                    wanted.append((shared, name))
                    params.append(p)
                    fixes.append(fix)
        self.active = True
        if params:
            for (shared, name), value in zip(wanted, _ReadMany.apply(fixes, *params), strict=True):  # type: ignore[no-untyped-call]
                shared[name] = value

    def after(self, model: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        """Runs as the forward hook, also after an error."""
        if not is_dynamo_compiling() and self.active:
            self.active = False
            for _, run in self.runs:
                run.shared = None


def install_batch(model: nn.Module, runs: Sequence[tuple[nn.Module, ModuleRun]], undo: Undo) -> None:
    """Hook `model` so that its forwards read the small parameters of `runs` together."""
    if len(runs) > 1:
        batch = BatchReads(runs)
        undo.push(model.register_forward_pre_hook(batch.before, prepend=True).remove)
        undo.push(model.register_forward_hook(batch.after, always_call=True).remove)
