"""A recipe against the axes of the model that it is for.

The planner works with the recipe's layouts as given (`autotp.plan.wanted`), and what comes out is compared with them: a layout that the
axes do not bear, heads cut in one place only, an attribute that nobody made local show as differences. What passes is the planner's own
certified plan with the recipe's layouts in it; collectives are placed by the axes, not by the recipe's roles. Where the model cannot be
traced nothing is proven, and a recipe that covers all of it makes the plan by its roles alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from torch import nn

from autotp.errors import InputError, RecipeError, TraceError
from autotp.examine import Check, checked_plan
from autotp.plan.layout import Layout, alike
from autotp.plan.model import ModulePlan, Op, ParamPlan
from autotp.plan.notation import UNKNOWN
from autotp.plan.plan import Plan
from autotp.plan.wanted import RULED_OUT
from autotp.planner import whole_plan
from autotp.recipe.bind import bind
from autotp.recipe.bound import Bound, BoundParam, Problems
from autotp.recipe.build import plan_of_bound
from autotp.recipe.check import under, weights
from autotp.recipe.model import Role
from autotp.recipe.recipe import Recipe
from autotp.trace.inputs import Given


def recipe_plan(recipe: Recipe, model: nn.Module, tp: int, inputs: Given | None = None, check: Check = Check.NUMBERS) -> Plan:
    """The plan of `model` that follows `recipe`, proven where the model can be traced. The model is left as it was.

    Raises:
        RecipeError: the recipe does not fit, or is not proven: every difference, with its place. TraceError: the model cannot be
            traced, and the recipe does not cover it. InputError: bad example inputs.
    """
    bound = bind(recipe, model, tp)
    if tp == 1:
        return whole_plan(model, "tp is 1")
    if recipe.unsafe:
        return replace(plan_of_bound(bound), notes=(f"UNSAFE: the recipe {recipe.name or recipe.file} is not proven: {recipe.reason}",))
    wanted = _wanted(bound)
    try:
        planned = checked_plan(model, tp, inputs, wanted, _hints(bound), check=check)
    except (TraceError, InputError) as error:
        if isinstance(error, InputError) and inputs is not None:
            raise
        return _untraced(bound, error)
    problems = _differences(bound, planned, wanted, lambda: checked_plan(model, tp, inputs, check=check))
    if problems:
        raise RecipeError(problems)
    return replace(planned, params={n: _param(p, bound.params.get(n), wanted.get(n), recipe.pinned) for n, p in planned.params.items()})


def _wanted(bound: Bound) -> dict[str, Layout]:
    """The layouts of the bound recipe; in the words of the plan that it was made from, where it is one for as many ranks."""
    pinned = bound.recipe.pinned
    if pinned is None or pinned.tp != bound.tp or set(pinned.params) != set(bound.params):
        return bound.layouts
    problems = Problems()
    for name, p in bound.params.items():
        if not alike(p.layout, pinned.params[name].layout):
            text = f'"{p.entry.layout}" is not what the recipe\'s `plan:` was made with ({pinned.params[name].layout}): take `plan:` out'
            problems.add(p.entry.at, name, text)
    if problems:
        raise RecipeError(problems)
    return {n: p.layout for n, p in pinned.params.items()}


def _hints(bound: Bound) -> dict[tuple[str, str], int]:
    return {(a.module, a.local.path): a.local.local for a in bound.attributes if a.local.local != UNKNOWN}


def _untraced(bound: Bound, error: Exception) -> Plan:
    recipe = bound.recipe
    if bound.uncovered:
        some = ", ".join(bound.uncovered[:5]) + (", …" if len(bound.uncovered) > 5 else "")
        text = (
            f"the recipe {recipe.name or recipe.file} does not cover {len(bound.uncovered)} parameters ({some}), and no trace can plan them"
        )
        raise TraceError(f"{error}\n{text}") from error
    note = f"not proven: the model could not be traced ({' '.join(str(error).split())})"
    return replace(plan_of_bound(bound), notes=(note,))


def _param(planned: ParamPlan, p: BoundParam | None, layout: Layout | None, pinned: Plan | None) -> ParamPlan:
    if p is None or layout is None:
        return planned
    if pinned is not None and planned.name in pinned.params and pinned.params[planned.name].layout is layout:
        return pinned.params[planned.name]
    reason = p.entry.reason or planned.reason
    if reason.startswith(RULED_OUT):
        reason = "the recipe keeps it whole"
    return ParamPlan(planned.name, layout, p.entry.axis or planned.axis, "" if layout.dim is not None else reason)


def _differences(bound: Bound, planned: Plan, wanted: Mapping[str, Layout], free: Callable[[], Plan]) -> Problems:
    """What is not proven. `free` plans without the recipe, to tell what is wrong from what only follows."""
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
    reasons = "\n".join(planned.params[n].reason for n in unproven)
    suspects = {n: p for n, p in bound.params.items() if n in unproven or f"{RULED_OUT}{n} " in reasons}
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
    """How the planner's collectives at a module contradict the role of its one weight."""
    if module is None or not weights([p]):
        return ""
    reduced = any(c.op in (Op.REDUCE, Op.HOLD, Op.JOIN) for s in module.outputs if not s.path for c in s.conversions)
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
