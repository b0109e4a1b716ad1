"""Recipes and the planner meet here alone: this module makes a plan with or without a recipe."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from autotp.cache.kept import kept
from autotp.cache.key import Asked
from autotp.errors import InputError, PlanError, TraceError
from autotp.examine import Check, checked_plan
from autotp.experts.place import with_experts
from autotp.plan.experts import may_be_experts, with_cut_width
from autotp.plan.notation import UNKNOWN
from autotp.plan.placements import AS_PLANNED, Experts, Placements, placed
from autotp.plan.plan import Plan
from autotp.planner.make_plan import whole_plan
from autotp.recipe.bind import bind
from autotp.recipe.binding import Bound
from autotp.recipe.compare import differences, followed, wanted_layouts
from autotp.recipe.problems import error_of
from autotp.recipe.recipe import Recipe
from autotp.recipe.untraced import plan_of_bound
from autotp.trace.example import Given


def recipe_plan(
    recipe: Recipe,
    model: nn.Module,
    tp: int,
    inputs: Given | None = None,
    check: Check = Check.NUMBERS,
    apart: frozenset[str] = frozenset(),
) -> Plan:
    """Returns the plan of `model` that follows `recipe`, proven where the model can be traced. The model stays as it was.

    `apart`: see `make_plan`.

    Raises:
        RecipeError: the recipe does not fit, or is not proven: every difference, with its place. TraceError: the model cannot be
            traced, and the recipe does not cover it. InputError: bad example inputs.
    """
    bound = bind(recipe, model, tp)
    if tp == 1:
        return whole_plan(model, "tp is 1")
    if recipe.unsafe:
        return replace(plan_of_bound(bound), notes=(f"UNSAFE: the recipe {recipe.name or recipe.file} is not proven: {recipe.reason}",))
    wanted = wanted_layouts(bound)
    try:
        made = checked_plan(model, tp, inputs, wanted, _hints(bound), check=check, apart=apart)
    except (TraceError, InputError) as error:
        if isinstance(error, InputError) and inputs is not None:
            raise
        return _untraced(bound, error)
    problems = differences(bound, made, wanted, lambda: checked_plan(model, tp, inputs, check=check, apart=apart))
    if problems:
        raise error_of(problems)
    pinned = None if recipe.pinned is None else with_cut_width(recipe.pinned)
    return replace(made, params={n: followed(p, bound.params.get(n), wanted.get(n), pinned) for n, p in made.params.items()})


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


#: The argument `recipe=` is a path, the name of a bundled recipe or of a model type, a mapping, or a Recipe.
RecipeLike = Recipe | str | os.PathLike[str] | Mapping[str, Any]


def planned(
    model: nn.Module,
    tp: int,
    recipe: RecipeLike | None,
    inputs: Given | None,
    check: Check,
    placements: Placements = AS_PLANNED,
) -> Plan:
    """Plans with or without a recipe, with the placements that either asks for; a plan that is kept is not made again.

    Raises:
        AutoTPError: as for `checked_plan` and `recipe_plan`.
    """
    read = None if recipe is None else Recipe.load(recipe)
    if read is not None:
        placements = read.placements | placements

    def make() -> Plan:
        apart = apart_of(model, placements)
        if read is None:
            made = checked_plan(model, tp, inputs, check=check, apart=apart)
        else:
            made = recipe_plan(read, model, tp, inputs, check, apart)
        return placed(with_experts(made, model, inputs, check, placements.experts), placements)

    return kept(Asked(model, tp, read, inputs, check, placements), make)


def apart_of(model: nn.Module, placements: Placements) -> frozenset[str]:
    """Returns the modules whose tokens are to be dispatched if their experts are dealt whole: what routes them stays outside."""
    if not placements.sequence_parallel or placements.experts is Experts.WIDTH:
        return frozenset()
    shapes = {path: [tuple(p.shape) for p in m.parameters(recurse=False)] for path, m in model.named_modules()}
    return frozenset(path for path, own in shapes.items() if may_be_experts(own))


def prepared(
    model: nn.Module,
    tp: int,
    recipe: RecipeLike | None,
    inputs: Given | None,
    strict: bool,
    check: Check,
    placements: Placements = AS_PLANNED,
) -> Plan:
    """As `planned`; `strict` refuses a plan in which operands of products stay replicated.

    Raises:
        PlanError: they do. AutoTPError: as for `planned`.
    """
    made = planned(model, tp, recipe, inputs, check, placements)
    if strict and made.replicated_products:
        listed = "\n  ".join(f"{n}: {made.replicated[n]}" for n in made.replicated_products)
        raise PlanError(f"strict=True, and these Linear or expert parameters stay replicated:\n  {listed}")
    return made
