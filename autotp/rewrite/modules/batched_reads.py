"""Reads small parameters together: one autograd function a forward instead of one a module.

A norm's weight costs a Python function forward and one backward (70 µs a step of CPU time); a model has dozens. While the root's
forward records gradients, all of them enter the graph through one function, whose backward also sums the partial gradients in one
all-reduce. Its gradients arrive at the end of the backward, so only small parameters take part. A module that runs alone, or again
for a checkpoint, reads for itself.

FSDP gathers the parameters of a unit just before the unit runs, and reduces their gradients when its backward ends. So the modules of
each unit are read together at the unit's forward.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.distributed.fsdp import FSDPModule

from autotp.errors import AutoTPError
from autotp.plan.spec import GradSum
from autotp.rewrite.modules.joint import CALLS, separate
from autotp.rewrite.modules.module import ModuleRun
from autotp.rewrite.observer import Observer
from autotp.rewrite.parameters.data_parallel import is_managed
from autotp.rewrite.parameters.fsdp import reshard
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, in_layout, own_gradient
from autotp.rewrite.parameters.reads import GradFix, Read, given
from autotp.rewrite.transforms import refuse_transforms
from autotp.rewrite.undo import Undo

SMALL = 1 << 16  # elements; larger gradients should not wait for the end of the backward
Runs = Sequence[tuple[nn.Module, ModuleRun]]


class _ReadMany(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fixes: Sequence[GradFix], *params: LayoutDTensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.fixes = fixes
        ctx.specs = [p._spec for p in params]
        # Of a list: a tuple that grows is not safe from a search of references in another thread, and ranks may be threads.
        return tuple([p._local_tensor.detach() for p in params])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_transforms()
        if torch.is_grad_enabled():  # for second derivatives
            each = zip(grads, ctx.fixes, ctx.specs, strict=True)
            return None, *(None if g is None else given(g, fix, spec) for g, fix, spec in each)
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
    """Reads for all `runs` at once when the forward of the module that encloses them begins."""

    def __init__(self, runs: Runs) -> None:
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
            each: Iterable[tuple[str, GradFix]] = run.light or ()
            if run.by_token is None:
                run.shared = shared
            else:
                run.rows, each = shared, ((read.name, fix) for read, fix in run.by_token)
            for name, fix in each:
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
                run.shared = run.rows = None


class RootReads(BatchReads):
    """The batch of the root, which gives the modules of each FSDP unit to the unit once FSDP has taken parameters over.

    `reads`: everything that forwards read, as (module that reads, read).
    """

    def __init__(self, runs: Runs, reads: Sequence[tuple[nn.Module, Read]]) -> None:
        super().__init__(runs)
        self.reads = tuple(reads)
        self.divided = False

    def before(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if not self.divided and not is_dynamo_compiling() and self._is_taken_over(model):
            self._divide(model)
        super().before(model, args)

    def _is_taken_over(self, model: nn.Module) -> bool:
        """True once FSDP manages parameters; a forward without gradients, which may be one token's, asks for the root alone."""
        if not torch.is_grad_enabled():
            return isinstance(model, FSDPModule)
        return any(is_managed(p) for p in self._params(model))

    def _params(self, model: nn.Module) -> Iterator[Tensor]:
        if not self.runs:
            yield from model.parameters()
        for module, run in self.runs:
            for name, _ in run.light or ():
                if (p := module._parameters.get(name)) is not None:
                    yield p

    def _divide(self, model: nn.Module) -> None:
        names: dict[int, str] = {}
        units: dict[int, list[nn.Module]] = {}
        for path, enclosing in _enclosing(model, ()):
            names[id(enclosing[-1])] = path
            units[id(enclosing[-1])] = [m for m in enclosing if isinstance(m, FSDPModule)]
        for module, read in self.reads:
            _refuse_outside(names, units, module, read)

        def unit_of(module: nn.Module) -> nn.Module:
            return next(iter(reversed(units.get(id(module), []))), model)

        separate(model, unit_of)
        runs: dict[int, list[tuple[nn.Module, ModuleRun]]] = {}
        for module, run in self.runs:
            runs.setdefault(id(unit_of(module)), []).append((module, run))
        for unit in (m for m in model.modules() if m is not model and len(runs.get(id(m), ())) > 1):
            _hook(unit, BatchReads(runs[id(unit)]))
        self.runs = tuple(runs.get(id(model), ()))
        self.divided = True
        model.register_forward_hook(Observer(_let_go))  # after FSDP's own


def _enclosing(module: nn.Module, above: tuple[nn.Module, ...], path: str = "") -> Iterator[tuple[str, tuple[nn.Module, ...]]]:
    """Yields the path of each module, and the modules that enclose it, itself last."""
    yield path, (*above, module)
    for name, child in module.named_children():
        yield from _enclosing(child, (*above, module), f"{path}.{name}" if path else name)


def _refuse_outside(names: dict[int, str], units: dict[int, list[nn.Module]], module: nn.Module, read: Read) -> None:
    """Refuse a read of a parameter of another unit that does not enclose the reader: FSDP may have reduced its gradient before.

    Raises:
        AutoTPError: names both modules.
    """
    own, owners = units.get(id(module)), units.get(id(read.owner))
    if read.is_buffer or not own or not owners or owners[-1] in own:
        return
    raise AutoTPError(
        f"{names[id(module)]} reads {read.name} of {names[id(read.owner)]}, which is in another unit of FSDP: its gradient would be "
        "reduced without this use. Pass both modules to one call, fully_shard([a, b], mesh=…), leave both to the unit that encloses "
        "them, or let autotp.fully_shard(model, mesh) pick the units"
    )


def _let_go(model: nn.Module, args: Any, result: Any) -> None:
    """Has FSDP let go of what it gathered for a forward without a backward.

    Until then `model.parameters()` are gathered ones for the root, without the gradients that the sharded ones have.
    """
    if not is_dynamo_compiling() and not torch.is_grad_enabled():
        reshard(model)


def _hook(module: nn.Module, batch: BatchReads) -> None:
    module.register_forward_pre_hook(Observer(batch.before))
    module.register_forward_hook(Observer(batch.after), always_call=True)


def install_batch(model: nn.Module, runs: Runs, reads: Sequence[tuple[nn.Module, Read]], undo: Undo) -> None:
    """Hook `model` so that its forwards read the small parameters of `runs` together."""
    if len(runs) > 1 or reads or any(CALLS in m.__dict__ for m in model.modules()):
        batch = RootReads(runs if len(runs) > 1 else (), reads)
        undo.push(model.register_forward_pre_hook(batch.before, prepend=True).remove)
        undo.push(model.register_forward_hook(batch.after, always_call=True).remove)
