"""Leaves the logits of a plan in parts: the result of a head is gathered by whatever asks for all of it.

A head is told by its layout: the parameters along its axis are cut by rows alone, as a vocabulary's are, so nothing but a lookup sums
over it.

The plan that is proven gathers them where the head returns. A lazy gather gives every operator the same values, so the proof holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

from autotp.plan.conversions import CollectiveKind, Conversion, Op, When
from autotp.plan.expressions import Expr, size
from autotp.plan.layout import runs
from autotp.plan.spec import ModulePlan, PlanSpec, Slot

P = TypeVar("P", bound=PlanSpec)
#: Numbers a token that each rank sends for a loss: the level of its logits, and its logit of the target.
_SENT = 2


def with_logits_in_parts(plan: P) -> P:
    """Returns `plan` with lazy gathers of its logits; a note says so where it has none that can be."""
    if plan.tp == 1 or logits_in_parts(plan):
        return plan
    changed = {m.path: new for m in plan.modules if (new := _lazy(plan, m)) is not m}
    if not changed:
        return replace(plan, notes=(*plan.notes, f"loss_parallel changes nothing: {_why_not(plan)}"))
    gathers = (CollectiveKind.ALL_GATHER, When.FORWARD)
    traffic = tuple(replace(t, width=_SENT * plan.tp) if t.module in changed and (t.kind, t.when) == gathers else t for t in plan.traffic)
    return replace(plan, modules=tuple(changed.get(m.path, m) for m in plan.modules), traffic=traffic)


def with_whole_logits(plan: P) -> P:
    """Returns `plan` with gathers in place of lazy ones."""
    return replace(plan, modules=tuple(_each(m, Op.LAZY_GATHER, Op.GATHER, lambda c: True) for m in plan.modules))


def logits_in_parts(plan: PlanSpec) -> tuple[str, ...]:
    """The modules whose results stay in parts."""
    return tuple(m.path for m in plan.modules for s in m.outputs if any(c.op is Op.LAZY_GATHER for c in s.conversions))


def _lazy(plan: PlanSpec, m: ModulePlan) -> ModulePlan:
    own = {n for n, p in plan.params.items() if n.rpartition(".")[0] == m.path and p.layout.dim is not None}
    along = own.union(*(a.params for a in plan.axes if own.intersection(a.params)))
    if not own or any(plan.params[n].layout.dim for n in along):  # a product sums over it: its parts go on into a region
        return m
    return _each(m, Op.GATHER, Op.LAZY_GATHER, lambda c: c.dim == -1 and c.expr is not None and in_order(c.expr, plan.tp))


def _each(m: ModulePlan, old: Op, new: Op, where: Callable[[Conversion], bool]) -> ModulePlan:
    def changed(s: Slot) -> Slot:
        alone = s.conversions[0] if len(s.conversions) == 1 else None  # what goes on into a region is gathered at once
        return Slot(s.path, (replace(alone, op=new),)) if alone is not None and alone.op is old and where(alone) else s

    outputs = tuple(map(changed, m.outputs))
    return m if outputs == m.outputs else replace(m, outputs=outputs)


def in_order(expr: Expr, tp: int) -> bool:
    """True where every rank holds an even slice of the dim, in rank order, the last ones less or nothing: a DTensor's `Shard`."""
    full, each = size(expr), size(expr, tp)

    def real(rank: int) -> Iterator[tuple[int, int]]:
        return (run for run in runs(expr, rank, tp) if run[0] >= 0)

    return all(list(real(r)) == [(r * each, min((r + 1) * each, full))] * (r * each < full) for r in range(tp))


def _why_not(plan: PlanSpec) -> str:
    gathered = [m.path or "the model" for m in plan.modules for s in m.outputs if any(c.op is Op.GATHER for c in s.conversions)]
    if not gathered:
        return "the plan gathers no vocabulary"
    return f"what {', '.join(gathered)} returns is no vocabulary, or is not cut in even slices"
