"""Makes the plan of a bound recipe without a trace, with the collectives that its roles imply.

    column     its input is copied into the region (backward: all-reduce); its result is the rank's part
    row        its result is all-reduced; a bias is added on one rank only
    lookup     the rank's rows are looked up, the results all-reduced
    gathered   as column, and the result is gathered
    part       nothing
    inside     the gradient is all-reduced

The entries of `arguments` and `results` convert at those module boundaries. This is right for every model in which each rank's result
is a function of whole inputs and its own shards, and the sum over the ranks is the result. Then the gradient of each whole input is
the sum of the ranks' gradients, whatever the code between does. The proof shows that the code is such a model.
"""

from __future__ import annotations

import dis
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from autotp.errors import RecipeError
from autotp.plan.conversions import CollectiveKind, Conversion, Op, When
from autotp.plan.cost import summed
from autotp.plan.expressions import factors, freed, is_sharded
from autotp.plan.layout import Layout
from autotp.plan.notation import UNKNOWN
from autotp.plan.placements import placed
from autotp.plan.plan import Plan
from autotp.plan.spec import AxisInfo, Boundary, DistributedForm, GradSum, ModulePlan, ParamPlan, Shown, Site, Slot, Traffic, Use
from autotp.recipe.bind import bind
from autotp.recipe.binding import Bound, BoundBoundary, BoundParam
from autotp.recipe.check import first_argument, own_params, scopes, under, weights
from autotp.recipe.problems import Problem, Problems, error_of
from autotp.recipe.spec import RecipeSpec, Role
from autotp.recipe.unnamed import unnamed_attributes

_INNER = (Role.COLUMN, Role.ROW, Role.PART, Role.INSIDE)
_LABEL = {Role.LOOKUP: "embedding", Role.GATHERED: "head"}


def static_plan(recipe: RecipeSpec, model: nn.Module, tp: int) -> Plan:
    """Returns the plan that a recipe makes by itself.

    Raises:
        RecipeError: it does not fit the model, does not cover it, or needs the traced model.
    """
    bound = bind(recipe, model, tp)
    return placed(plan_of_bound(bound), recipe.placements)


def plan_of_bound(bound: Bound) -> Plan:
    """Makes the same plan of a recipe that is bound already."""
    recipe = bound.recipe
    if recipe.trace:
        raise RecipeError(
            f"{recipe.file}: trace: required: the recipe changes calls inside of forwards, and only a traced model tells where"
        )
    if bound.uncovered:
        first = ", ".join(bound.uncovered[:5])
        raise RecipeError(f"{recipe.file}: {len(bound.uncovered)} parameters have no entry, and no trace can plan them: {first}")
    if problems := [*unnamed_attributes(bound), *_unclear(bound)]:
        raise error_of(problems)
    modules = _modules(bound)
    params = {n: _param(p) for n, p in bound.params.items()}
    products = {p.name for p in weights(bound.params.values()) if not isinstance(bound.model.get_submodule(p.module), nn.Embedding)}
    return Plan(
        type(bound.model).__name__, bound.tp, params, tuple(modules.values()), tuple(_axes(bound)), tuple(_traffic(bound)),
        bound.aliases, frozenset(products), (), boundaries=_boundaries(bound),
        inside={path: frozenset() for path in _inside(bound)},
    )  # fmt: skip


def _inside(bound: Bound) -> Iterator[str]:
    """Yields the modules whose code may compute on parts: those that own some, those around them, and those inside of a requested
    region.
    """
    for path, params in own_params(bound).items():
        if any(p.names for p in params):
            yield from (path, path.rpartition(".")[0])
    inner = {b.module for b in (*bound.arguments, *bound.results)}
    yield from (path for path, _ in bound.model.named_modules() if any(under(path, b) for b in inner))


def _boundaries(bound: Bound) -> dict[str, tuple[Boundary, ...]]:
    """Returns the boundaries of modules that roles imply.

    For modules without a role, beside sharded ones or inside of a requested region, they are unknown.
    """
    unknown = (Boundary(False, (), Shown.UNKNOWN), Boundary(True, (), Shown.UNKNOWN))
    found: dict[str, tuple[Boundary, ...]] = {}
    own = own_params(bound)
    inner = {b.module for b in (*bound.arguments, *bound.results)}
    beside = {path.rpartition(".")[0] for path, params in own.items() if any(p.names and p.role in _INNER for p in params)}
    for path, module in bound.model.named_modules():
        if path and path not in own and path.rpartition(".")[0] in beside and not list(module.children()):
            found[path] = unknown
        if any(under(path, b) and path != b for b in inner):
            found[path] = unknown
    for path, params in own.items():
        for p in (w for w in weights(params) if w.names):
            argument = Boundary(False, (first_argument(bound.model.get_submodule(path)),), Shown.PART)
            sides = {Role.COLUMN: (Boundary(True, (), Shown.PART),), Role.ROW: (argument,)}
            found.setdefault(path, sides.get(p.role, unknown if p.role is Role.PART else ()))
    return {path: slots for path, slots in found.items() if slots}


def _unclear(bound: Bound) -> list[Problem]:
    """Lists what only a trace could confirm: norms over sharded dims, attributes whose local value the recipe does not say."""
    problems = Problems()
    for path, params in own_params(bound).items():
        if not weights(params) and any(p.names for p in params):
            p = next(p for p in params if p.names)
            if p.role is Role.PART and not list(bound.model.get_submodule(path).children()):
                kind = type(bound.model.get_submodule(path)).__name__
                text = f"is part of a {kind}, which may compute across what is cut (a norm does): only a traced model tells"
                problems.add(p.entry.at, p.name, text)
    for a in bound.attributes:
        if a.local.local == UNKNOWN:
            problems.add(
                a.attribute.pos, f"{a.module}.{a.local.path}", "is `local`, and without a trace nobody knows how: write its layout"
            )
    return list(problems)


def _param(p: BoundParam) -> ParamPlan:
    if p.names:
        return ParamPlan(p.name, p.layout, p.entry.axis or ", ".join(sorted(p.names)))
    inside = "; used inside a sharded region" if p.role is Role.INSIDE else ""
    return ParamPlan(p.name, p.layout, "", p.entry.reason or f"the recipe says so{inside}")


def _modules(bound: Bound) -> dict[str, ModulePlan]:
    plans: dict[str, ModulePlan] = {}

    def at(path: str) -> ModulePlan:
        return plans.get(path) or ModulePlan(path)

    for path, params in own_params(bound).items():
        plan = _own(bound, path, params)
        if plan != ModulePlan(path):
            plans[path] = plan
    for b in bound.arguments:
        plan = at(b.module)
        plans[b.module] = replace(plan, inputs=(*plan.inputs, Slot(b.path, _entering(b))))
    for b in bound.results:
        plan = at(b.module)
        plans[b.module] = replace(plan, outputs=_added(plan.outputs, Slot(b.path, _leaving(b))))
    for a in bound.attributes:
        if a.local.value != a.local.local:
            plan = at(a.module)
            plans[a.module] = replace(plan, attributes=(*plan.attributes, a.local))
    return plans


def _added(slots: tuple[Slot, ...], slot: Slot) -> tuple[Slot, ...]:
    if any(s.path == slot.path for s in slots):
        return tuple(replace(s, conversions=(*s.conversions, *slot.conversions)) if s.path == slot.path else s for s in slots)
    return (*slots, slot)


def _entering(b: BoundBoundary) -> tuple[Conversion, ...]:
    return (Conversion(Op.COPY), *_cut(b, Op.SLICE))


def _leaving(b: BoundBoundary) -> tuple[Conversion, ...]:
    if b.boundary.value == "leave":
        return (Conversion(Op.REDUCE),)
    return _cut(b, Op.GATHER) or (Conversion(Op.COPY),)


def _cut(b: BoundBoundary, op: Op) -> tuple[Conversion, ...]:
    if b.dims is None:
        return ()
    return tuple(Conversion(op, i - len(b.dims), freed(d)) for i, d in enumerate(b.dims) if is_sharded(d))


def _own(bound: Bound, path: str, params: list[BoundParam]) -> ModulePlan:
    """Returns the conversions that the roles of a module's own parameters imply."""
    module = bound.model.get_submodule(path)
    inputs: tuple[Slot, ...] = ()
    outputs: tuple[Slot, ...] = ()
    sites: tuple[Site, ...] = ()
    uses: list[Use] = []
    for p in params:
        name = p.name.rpartition(".")[2]
        once = (Conversion(Op.ONCE),) if p.role is Role.ROW and not p.names else ()
        if once or _grad(p) is not GradSum.NONE:
            uses.append(Use(path, name, _grad(p), once))
        if len(p.layout.shape) < 2 or not p.names:
            continue
        if p.role in (Role.COLUMN, Role.GATHERED):
            inputs = (Slot((first_argument(module),), (Conversion(Op.COPY),)),)
        if p.role is Role.GATHERED:
            outputs = (Slot((), (Conversion(Op.GATHER, -1, p.layout.expr),)),)
        elif p.role in (Role.ROW, Role.LOOKUP):
            outputs = (Slot((), (Conversion(Op.REDUCE),)),)
        if p.role is Role.LOOKUP:
            sites = (_lookup(),)
    return ModulePlan(path, inputs, outputs, tuple(uses), (), sites)


def _grad(p: BoundParam) -> GradSum:
    if p.role is Role.INSIDE:
        return GradSum.ALL
    return GradSum.SHARED if p.layout.is_shared else GradSum.NONE


def _lookup() -> Site:
    """Returns the site of the one call that `nn.Embedding.forward` makes."""
    code = nn.Embedding.forward.__code__
    offset = [i.offset for i in dis.get_instructions(code) if i.opname.startswith("CALL")][-1]
    return Site(code.co_filename, code.co_qualname, code.co_firstlineno, offset, kernel=DistributedForm.LOOKUP)


def _axes(bound: Bound) -> Iterator[AxisInfo]:
    """One axis for each cut name in each block."""
    found: dict[tuple[str, str], list[BoundParam]] = {}
    for p in bound.params.values():
        for name in p.names:
            block = next(scopes(p.module))
            found.setdefault((block, name), []).append(p)
    for (block, name), params in found.items():
        whole = next(f.size for d in params[0].layout.dims for f in factors(d) if f.name == name)
        label = params[0].entry.axis or _LABEL.get(params[0].role, name)
        yield AxisInfo(f"{block + '.' if block else ''}{name}", label, whole, block, tuple(p.name for p in params))


def _traffic(bound: Bound) -> Iterator[Traffic]:
    """Collectives of the modules that roles imply, whose widths their weights tell."""
    shared: set[tuple[str, int]] = set()
    for path, params in own_params(bound).items():
        for p in (w for w in weights(params) if w.names):
            wide, narrow = _widths(p.layout)
            if p.role in (Role.ROW, Role.LOOKUP):
                yield Traffic(path, CollectiveKind.ALL_REDUCE, When.FORWARD, narrow)
            if p.role is Role.GATHERED:
                yield Traffic(path, CollectiveKind.ALL_GATHER, When.FORWARD, wide)
            if p.role in (Role.COLUMN, Role.GATHERED):
                key = (path.rpartition(".")[0], narrow)  # columns beside each other share one reduced gradient
                if key not in shared or not key[0]:
                    yield Traffic(path, CollectiveKind.ALL_REDUCE, When.BACKWARD, narrow)
                shared.add(key)
        for p in params:
            if elements := summed(_grad(p), _param(p)):
                yield Traffic(path, CollectiveKind.ALL_REDUCE, When.BACKWARD, 0, elements)


def _widths(layout: Layout) -> tuple[int, int]:
    """(size of the dim that is cut, size of the other of the two)."""
    at = layout.dim or 0
    return layout.shape[at], layout.shape[1 - at] if at < 2 else layout.shape[0]
