"""Compares a recipe with the axes of the model that it is for.

The planner works with the recipe's layouts as given, and its result is compared with them. Differences are a layout that the axes
do not allow, heads that are sharded in one place only, or an attribute that nobody made local. A recipe that passes gives the
planner's own certified plan with the recipe's layouts in it. The axes place the collectives, not the recipe's roles. Where the
model cannot be traced nothing is proven, and a recipe that covers all of it makes the plan by its roles alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autotp.plan.conversions import Op
from autotp.plan.experts import with_cut_width
from autotp.plan.layout import Layout, alike
from autotp.plan.notation import UNKNOWN
from autotp.plan.plan import Plan
from autotp.plan.spec import ModulePlan, ParamPlan
from autotp.recipe.binding import Bound, BoundParam
from autotp.recipe.check import under, weights
from autotp.recipe.problems import Problems, error_of
from autotp.recipe.spec import Role


def wanted_layouts(bound: Bound) -> dict[str, Layout]:
    """Returns the layouts of the bound recipe; in the words of the plan that it was made from, where that plan is for as many ranks."""
    pinned = None if bound.recipe.pinned is None else with_cut_width(bound.recipe.pinned)
    if pinned is None or pinned.tp != bound.tp or set(pinned.params) != set(bound.params):
        return bound.layouts
    problems = Problems()
    for name, p in bound.params.items():
        if not alike(p.layout, pinned.params[name].layout):
            text = f'"{p.entry.layout}" is not what the recipe\'s `plan:` was made with ({pinned.params[name].layout}): take `plan:` out'
            problems.add(p.entry.at, name, text)
    if problems:
        raise error_of(problems)
    return {n: p.layout for n, p in pinned.params.items()}


def followed(planned: ParamPlan, p: BoundParam | None, layout: Layout | None, pinned: Plan | None) -> ParamPlan:
    """Returns a planned parameter in the words of the recipe (`p`, `layout`) or of its `pinned` plan, as it is where neither has any."""
    if p is None or layout is None:
        return planned
    if pinned is not None and planned.name in pinned.params and pinned.params[planned.name].layout is layout:
        return pinned.params[planned.name]
    reason = p.entry.reason or ("the recipe keeps it whole" if planned.ruled_out_by else planned.reason)
    return ParamPlan(planned.name, layout, p.entry.axis or planned.axis, "" if layout.dim is not None else reason)


def differences(bound: Bound, planned: Plan, wanted: Mapping[str, Layout], free: Callable[[], Plan]) -> Problems:
    """Returns everything that is not proven. `free` plans without the recipe, to tell mistakes from their consequences."""
    problems = Problems()
    by_path = {m.path: m for m in planned.modules}
    unproven = {n: p for n, p in bound.params.items() if not alike(planned.params[n].layout, wanted[n])}
    if unproven:
        _unproven(bound, unproven, planned, wanted, free(), problems)
    for name, p in bound.params.items():
        if name not in unproven and (text := _role(p, by_path.get(p.module))):
            problems.add(p.entry.at, name, text)
    if not unproven:
        _attributes(bound, planned, problems)
    return problems


def _unproven(
    bound: Bound, unproven: Mapping[str, BoundParam], planned: Plan, wanted: Mapping[str, Layout], free: Plan, problems: Problems
) -> None:
    blamed = {other for n in unproven for other in planned.params[n].ruled_out_by}
    suspects = {n: p for n, p in bound.params.items() if n in unproven or n in blamed}
    culprits = {n: p for n, p in suspects.items() if not alike(free.params[n].layout, wanted[n])}
    for name, p in (culprits or unproven).items():
        own, made = free.params[name], planned.params[name]
        if name not in culprits:
            text = f'"{p.entry.layout}" ({p.role.value}) is not proven: {made.reason or "it does not go with the axes of the model"}'
        elif own.layout.dim is None:
            text = f'"{p.entry.layout}" ({p.role.value}) is not proven, the planner keeps it whole: {own.reason}'
        else:
            text = f'"{p.entry.layout}" ({p.role.value}) is not proven, the axes of the model give "{own.layout}"'
        problems.add(p.entry.at, name, text)


def _role(p: BoundParam, module: ModulePlan | None) -> str:
    """Says how the planner's collectives at a module contradict the role of its one weight."""
    if module is None or not weights([p]):
        return ""
    reduced = any(c.row.sums for s in module.outputs if not s.path for c in s.conversions)
    entering = any(c.op is Op.COPY for s in module.inputs for c in s.conversions)
    if p.role in (Role.COLUMN, Role.GATHERED) and reduced:
        return f"is {p.role.value}, and the model sums over what is cut in it: it is a row"
    if p.role is Role.ROW and entering and not reduced:
        return "is row, and the model makes what is cut in it, and does not sum over it: it is a column"
    return ""


def _attributes(bound: Bound, planned: Plan, problems: Problems) -> None:
    named = {(a.module, a.local.path): a for a in bound.attributes}
    uncovered = bound.uncovered
    for module in planned.modules:
        around = module.path if any(under(n, module.path) for n in bound.params) else module.path.rpartition(".")[0]
        if any(under(n, around) for n in uncovered):
            continue  # the planner planned a part of it, and found its attributes
        for local in module.attributes:
            have = named.get((module.path, local.path))
            name = ".".join(filter(None, (module.path, local.path)))
            if have is None:
                text = f"must become local ({local.value} → {local.local}), and the recipe does not name it under attributes:"
                problems.add(bound.recipe.place, name, text)
            elif have.local.local not in (local.local, UNKNOWN):
                text = f"must become {local.local} on a rank, and the recipe makes it {have.local.local}"
                problems.add(have.attribute.pos, name, text)
