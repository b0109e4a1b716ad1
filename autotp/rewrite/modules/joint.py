"""Holds partial sums back and all-reduces them with a later one: HOLD and JOIN (`autotp.planner.joint_reductions`).

    held module   y_r → zeros, y_r is kept            last module   z_r → Σ_r (z_r + y_r)
    backward      the gradient of the sum goes, as it is, to z_r and to each y_r

A sum that is kept belongs to one call of the parent. The parent's forward opens a call before and closes it after, also after an error, so
that nothing stays for the next one; a member that runs outside of its parent (by itself, or again for a checkpoint of its own) finds no
open call and reduces alone. Each wrapper is one more subclass around the module's rewritten forward, or a forward of the instance where
the class must stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from autotp.errors import AutoTPError, PlanError
from autotp.plan.conversions import Op
from autotp.plan.items import Path
from autotp.plan.spec import ModulePlan, Slot
from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import Convert, copy, reduce
from autotp.rewrite.modules.boundaries import map_path
from autotp.rewrite.modules.classes import subclass, wrap_forward
from autotp.rewrite.sequence.rows import Rows
from autotp.rewrite.sequence.scatter import Scatter
from autotp.rewrite.sequence.tokens import ParallelTokens, entered_rows, tokens_of
from autotp.rewrite.undo import Undo

CALLS, PART = "_autotp_calls", "_autotp_part"


class _SumOf(torch.autograd.Function):
    """One all-reduce of several partial sums."""

    @staticmethod
    def forward(ctx: Any, comm: Comm, kind: Rows | None, own: Tensor, *held: Tensor) -> Tensor:
        ctx.comm, ctx.count = comm, 1 + len(held)
        ctx.kind = kind
        return comm.all_reduce_(_added(own, held)) if kind is None else kind.sum(_added(own, held))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.kind is not None:
            grad = entered_rows(grad, ctx.kind)
        elif grad.requires_grad and torch.is_grad_enabled():
            grad = copy(grad, ctx.comm)
        return None, None, *(grad for _ in range(ctx.count))


def _added(own: Tensor, held: Iterable[Tensor]) -> Tensor:
    for part in held:
        own = own + part
    return own


class _Call:
    """One call of a parent: whether it records gradients, and the partial sums that are held in it."""

    __slots__ = ("held", "records")

    def __init__(self) -> None:
        self.records = torch.is_grad_enabled()
        self.held: tuple[Tensor, ...] = ()


class HeldSum:
    """Keeps one joint sum of a parent. `calls`: the calls of the parent that are running, one inside the other.

    apart: each member reduces for itself. scatter: scatters the sums over tokens, where the plan does.
    """

    __slots__ = ("apart", "calls", "comm", "name", "scatter")

    def __init__(self, name: str, comm: Comm, scatter: Scatter | None) -> None:
        self.name, self.comm, self.scatter = name, comm, scatter
        self.calls: list[_Call] = []
        self.apart = False

    def open(self) -> None:
        """Begins a call of the parent."""
        if not self.apart:
            self.calls.append(_Call())

    def close(self) -> None:
        """Ends a call of the parent."""
        self.calls.pop()

    def check(self) -> None:
        """Raise where a partial sum would be lost at the end of a call.

        Raises:
            AutoTPError: a module held its partial sum, and the one that reduces it did not run.
        """
        if self.calls and self.calls[-1].held:
            raise AutoTPError(
                f"{self.name}: a partial sum was held back for the last of these modules, which did not run in this call. "
                "The plan was made from calls that run all of them; plan with example_inputs= that take this path."
            )

    def hold(self, own: Tensor) -> Tensor:
        """P → R: returns zeros and keeps `own`. Where no call of the parent would reduce it, returns the sum over ranks."""
        call = self.calls[-1] if self.calls else None
        if call is None or call.records is not torch.is_grad_enabled():
            return self._sum(own)
        call.held = (*call.held, own)
        kind = self._rows(own)
        return torch.zeros_like(own) if kind is None else ParallelTokens.of(kind.own(torch.zeros_like(own)), kind)

    def _rows(self, own: Tensor) -> Rows | None:
        return None if self.scatter is None else self.scatter.rows(own)

    def _sum(self, own: Tensor) -> Tensor:
        return reduce(own, self.comm) if self.scatter is None else self.scatter(own)

    def join(self, own: Tensor) -> Tensor:
        """P → R: returns the sum over ranks of `own` and of all that is held.

        Raises:
            AutoTPError: gradients are recorded for the held sums and not for the joint one.
        """
        call = self.calls[-1] if self.calls else None
        if call is None or not call.held:
            return self._sum(own)
        held = tuple(part if part.shape == own.shape else part.reshape(own.shape) for part in call.held)
        call.held = ()
        records = torch.is_grad_enabled()
        if call.records is not records and any(part.requires_grad for part in held):
            raise AutoTPError(
                f"{self.name}: gradients are recorded in the block and not in the last of these modules, so those of the others would be "
                "lost. Checkpoint the whole block, or with use_reentrant=False; freeze parameters with requires_grad_(False)."
            )
        if is_dynamo_compiling():
            return reduce(_added(own, held), self.comm)
        kind = self._rows(own)
        if records and (own.requires_grad or any(part.requires_grad for part in held)):
            total: Tensor = _SumOf.apply(self.comm, kind, own, *held)  # type: ignore[no-untyped-call]
        else:
            total = self.comm.all_reduce_(_added(own, held)) if kind is None else kind.sum(_added(own, held))
        return total if kind is None else tokens_of(total, kind)


class _Part:
    """A member converts its results with this: (path, convert) each."""

    __slots__ = ("held", "slots")

    def __init__(self, slots: Iterable[Slot], held: HeldSum) -> None:
        self.held = held
        self.slots: tuple[tuple[Path, Convert], ...] = tuple((s.path, held.hold if _holds(s) else held.join) for s in slots)

    def __call__(self, result: Any) -> Any:
        for path, convert in self.slots:
            result = map_path(result, path, convert)
        return result


class _Calls:
    """A parent opens and closes these sums around its forward."""

    __slots__ = ("sums",)

    def __init__(self, sums: tuple[HeldSum, ...]) -> None:
        self.sums = sums

    def check(self) -> None:
        for held in self.sums:
            held.check()

    def close(self) -> None:
        for held in self.sums:
            if held.calls:
                held.close()


def _holds(slot: Slot) -> bool:
    return slot.conversions[0].op is Op.HOLD


def _is_part(slot: Slot) -> bool:
    return any(c.op in (Op.HOLD, Op.JOIN) for c in slot.conversions)


def without_parts(plan: ModulePlan | None) -> ModulePlan | None:
    """Returns the plan of one module without the conversions that `install_joints` does."""
    if plan is None or not any(_is_part(s) for s in plan.outputs):
        return plan
    return replace(plan, outputs=tuple(s for s in plan.outputs if not _is_part(s)))


def _call(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs the forward of a parent."""
    calls: _Calls = module.__dict__[CALLS]
    for held in calls.sums:
        held.open()
    try:
        result = forward(module, *args, **kwargs)
        calls.check()
        return result
    finally:
        calls.close()


def _member(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs the forward of a member."""
    part: _Part = module.__dict__[PART]
    return part(forward(module, *args, **kwargs))


def _calls_forward(base: type[nn.Module]) -> Callable[..., Any]:
    inner = base.forward
    return lambda self, *args, **kwargs: _call(self, inner, args, kwargs)


def _part_forward(base: type[nn.Module]) -> Callable[..., Any]:
    inner = base.forward
    return lambda self, *args, **kwargs: _member(self, inner, args, kwargs)


def install_joints(model: nn.Module, plans: Iterable[ModulePlan], comm: Comm, undo: Undo, scatter: Scatter | None = None) -> None:
    """Wrap the members of each joint sum and their parents; everything else of their plans is in place.

    Raises:
        PlanError: a HOLD or JOIN without a parent, or a parent whose members have neither.
    """
    slots = {p.path: [s for s in p.outputs if _is_part(s)] for p in plans}
    left = {path for path, found in slots.items() if found}
    for plan in plans:
        sums: list[HeldSum] = []
        for group in plan.joint:
            paths = [f"{plan.path}.{path}" if plan.path else path for path in group]
            if not left.issuperset(paths):
                raise PlanError(f"{plan.path or '<root>'}: not all of {', '.join(paths)} hold or join a partial sum")
            left.difference_update(paths)
            held = HeldSum(
                ", ".join(paths), comm, scatter if any(c.op is Op.SCATTER for p in paths for c in slots[p][0].conversions) else None
            )
            sums.append(held)
            for path in paths:
                _wrap_part(model, model.get_submodule(path), _Part(slots[path], held), undo)
        if sums:
            _wrap_calls(model, model.get_submodule(plan.path), _Calls(tuple(sums)), undo)
    if left:
        raise PlanError(f"no module of the plan says with what these are summed: {sorted(left)}")


def separate(model: nn.Module, unit_of: Callable[[nn.Module], nn.Module]) -> None:
    """Has members reduce for themselves where one is in another unit of FSDP than their parent.

    FSDP gathers the parameters of a unit for the backward when a gradient reaches the unit's result, and a held result is zeros, which no
    gradient reaches.
    """
    parents = {id(held): m for m in model.modules() if CALLS in m.__dict__ for held in m.__dict__[CALLS].sums}
    for module in model.modules():
        part: _Part | None = module.__dict__.get(PART)
        if part is not None and unit_of(module) is not unit_of(parents[id(part.held)]):
            part.held.apart = True


def _keeps_class(model: nn.Module, module: nn.Module) -> bool:
    return module is model or "forward" in module.__dict__


def _wrap_part(model: nn.Module, module: nn.Module, part: _Part, undo: Undo) -> None:
    undo.set_item(module.__dict__, PART, part)
    if _keeps_class(model, module):
        wrap_forward(module, _member, undo)
    else:
        undo.set_class(module, subclass(type(module), (), _part_forward))


def _wrap_calls(model: nn.Module, module: nn.Module, calls: _Calls, undo: Undo) -> None:
    undo.set_item(module.__dict__, CALLS, calls)
    if _keeps_class(model, module):
        wrap_forward(module, _call, undo)
    else:
        undo.set_class(module, subclass(type(module), (), _calls_forward))
