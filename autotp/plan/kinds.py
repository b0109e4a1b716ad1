"""Says in a word how each parameter is cut. The words are for people: no decision uses them.

vocabulary: rows of a token table, or of the product that gives logits. experts: the width of each expert, or whole experts.
column-parallel: the weight gives each rank its part of a product's result. row-parallel: the weight takes each rank its part of a
product's input, and the results are summed. in parts: any other cut (a norm over the heads, what a weight is computed from). whole:
every rank has all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from autotp.plan.layout import Layout
from autotp.plan.spec import DistributedForm, ModulePlan, PlanSpec, Shown


class Kind(StrEnum):
    """How a parameter is cut."""

    COLUMN = "column-parallel"
    ROW = "row-parallel"
    VOCABULARY = "vocabulary"
    EXPERTS = "experts"
    PART = "in parts"
    WHOLE = "whole"


_OF_PATTERN = {"embedding": Kind.VOCABULARY, "lm head": Kind.VOCABULARY, "moe": Kind.EXPERTS, "experts": Kind.EXPERTS}


def kinds(plan: PlanSpec) -> Mapping[str, Kind]:
    """Returns parameter → its kind, in the order of the plan."""
    modules = {m.path: m for m in plan.modules}
    weights: dict[str, list[Layout]] = {}
    for name, p in plan.params.items():
        if len(p.layout.shape) > 1 and p.layout.dim is not None:
            weights.setdefault(name.rpartition(".")[0], []).append(p.layout)
    found: dict[str, Kind] = {}
    for name, p in plan.params.items():
        path = name.rpartition(".")[0]
        if p.layout.dim is None:
            found[name] = Kind.WHOLE
        else:
            module = modules.get(path, ModulePlan(path))
            found[name] = _OF_PATTERN.get(p.axis) or _of_product(plan, module, p.layout, weights.get(path, []))
    return found


def _of_product(plan: PlanSpec, module: ModulePlan, layout: Layout, weights: list[Layout]) -> Kind:
    if module.pairs is not None:
        return Kind.EXPERTS
    if any(site.kernel is DistributedForm.LOOKUP for site in module.sites):
        return Kind.VOCABULARY
    if len(weights) != 1 or (len(layout.shape) == 1 and layout.expr != weights[0].expr):
        return Kind.PART
    summand = any(b.result and b.shown in (Shown.SUM, Shown.HELD) for b in plan.boundaries.get(module.path, ()))  # summed further out
    if summand or any(c.row.sums for slot in module.outputs for c in slot.conversions):
        return Kind.ROW
    return Kind.COLUMN
