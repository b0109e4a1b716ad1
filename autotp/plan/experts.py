"""Deals experts whole over the ranks, in the place of the width inside each of them.

A mixture of experts computes y_t = Σ_s w_ts · f_{e(t,s)}(x_t) over the slots s of token t. The plan that is proven cuts the width
inside every f, so each rank has a summand of each f. Here a rank has every f_e of its own experts and no others, so it has the
summands of y_t whose experts it holds. Either way the module takes whole tokens and gives a partial sum, so what stands around it stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from autotp.plan.conversions import Op
from autotp.plan.expressions import Concat, Expr, Factor, Product, size
from autotp.plan.layout import Layout
from autotp.plan.spec import AxisInfo, LocalAttribute, ModulePlan, Pairs, ParamPlan, PlanSpec, Shown

P = TypeVar("P", bound=PlanSpec)
#: The name of their axis, and of its pattern.
EXPERTS = "experts"


@dataclass(frozen=True, slots=True)
class Routing:
    """How a module of experts is called, and what in it depends on how many experts there are.

    tokens, index, weights: names of arguments of its forward, as in `Pairs`. attributes: its attributes that hold the number of experts.
    """

    tokens: str
    index: str
    weights: str
    attributes: tuple[str, ...] = ()


def expert_modules(plan: PlanSpec) -> tuple[str, ...]:
    """The modules that own a parameter of three dims, [experts, out, in] for most, that is sharded inside each expert."""
    owners = dict.fromkeys(n.rpartition(".")[0] for n, p in plan.params.items() if len(p.layout.shape) == 3 and p.layout.dim)
    return tuple(owners)


def may_be_experts(shapes: Sequence[tuple[int, ...]]) -> bool:
    """True for a module that owns parameters of these shapes and may be one of experts: all with a dim for them, one [experts, out, in]."""
    return any(len(s) == 3 for s in shapes) and all(len(s) > 1 and s[0] == shapes[0][0] > 1 for s in shapes)


def whole_experts(plan: PlanSpec) -> tuple[str, ...]:
    """The modules whose experts are dealt whole."""
    return tuple(m.path for m in plan.modules if m.pairs is not None)


def own_params(plan: PlanSpec, path: str) -> dict[str, ParamPlan]:
    """The plans of the parameters that a module itself holds, by name."""
    return {n: p for n, p in plan.params.items() if n.rpartition(".")[0] == path}


def count_of(plan: PlanSpec, path: str) -> int:
    """The number of experts of a module: dim 0 of its parameters."""
    return next(iter(own_params(plan, path).values())).layout.shape[0]


def why_not(plan: PlanSpec, path: str) -> str:
    """Says why the plan alone shows that the experts of a module cannot be dealt whole; "" where it does not."""
    own = own_params(plan, path)
    if len({p.layout.shape[:1] for p in own.values()}) > 1:
        return "its parameters have different leading dims"
    if any(len(p.layout.shape) < 2 for p in own.values()) or count_of(plan, path) < 2:
        return "not every parameter has a dim for its experts and another one"
    if any(p.layout.dim == 0 for p in own.values()):
        return "the leading dim of its parameters is cut already"
    if plan.aliases.keys() & own.keys() or set(plan.aliases.values()) & own.keys():
        return "its parameters are tied to others"
    return _around(plan, path)


def _around(plan: PlanSpec, path: str) -> str:
    inside = f"{path}." if path else ""
    if any(n.startswith(inside) and n.rpartition(".")[0] != path for n in plan.params):
        return "modules inside of it hold parameters"
    module = _module(plan, path)
    for m in plan.modules:
        if m.path.startswith(inside) and m.path != path:
            return f"{m.path.removeprefix(inside)} inside of it changes too"
        if m.path != path and any(u.owner == path for u in m.uses):
            return f"{m.path or 'the model'} reads its parameters"
    if any(u.owner != path for u in module.uses):
        return "it reads parameters of other modules"
    if module.joint or module.uncalled or module.stashed or module.pairs is not None:
        return "it is not called as a module of experts is"
    if any(c.op is not Op.COPY for s in module.inputs for c in s.conversions):
        return "it takes a rank's part of an argument"
    sums = [s for s in module.outputs if s.path == () and any(c.row.sums for c in s.conversions)]
    shown = [b for b in plan.boundaries.get(path, ()) if b.result]
    if len(sums) < len(module.outputs) or any(b.path != () or b.shown not in (Shown.SUM, Shown.HELD) for b in shown):
        return "its result is no partial sum"
    return "" if sums or shown else "its result is no partial sum"


def with_whole_experts(plan: P, found: Mapping[str, Routing]) -> P:
    """Returns `plan` with the experts of the modules in `found` dealt whole; each must pass `why_not`."""
    modules = {m.path: m for m in plan.modules}
    params = dict(plan.params)
    axes = list(plan.axes)
    for path, routing in found.items():
        own, number = own_params(plan, path), count_of(plan, path)
        params |= {n: replace(p, layout=dealt_layout(p.layout), axis=EXPERTS, reason="", ruled_out_by=()) for n, p in own.items()}
        before = modules.get(path)
        pairs = replace(pairs_of(routing, number, plan.tp), width=before, layouts=tuple(own.values()))
        before = before or ModulePlan(path)
        modules[path] = ModulePlan(path, before.inputs, before.outputs, pairs=pairs)
        axes = [*_without(axes, own), AxisInfo(f"{path}.{EXPERTS}".lstrip("."), EXPERTS, number, path, tuple(own))]
    # gradients of whole parameters that were used beside cut ones are the rank's own now
    traffic = tuple(t for t in plan.traffic if t.module not in found or not t.elements)
    return replace(plan, params=params, modules=tuple(modules.values()), axes=tuple(axes), traffic=traffic)


def dealt_layout(layout: Layout) -> Layout:
    """The layout of a parameter whose dim 0 is dealt over the ranks and whose other dims are whole."""
    return Layout(layout.shape, (Factor(EXPERTS, layout.shape[0], sharded=True), *map(_whole, layout.dims[1:])), layout.tp)


def is_dealt(layout: Layout) -> bool:
    """True for the layout of a parameter whose experts are dealt whole."""
    first = layout.dims[0] if layout.dims else None
    return isinstance(first, Factor) and first.sharded and first.name == EXPERTS


def pairs_of(routing: Routing, number: int, tp: int) -> Pairs:
    """How a module runs whose `number` of experts are dealt whole over `tp` ranks."""
    dealt = Factor(EXPERTS, number, sharded=True)
    local = tuple(LocalAttribute(name, number, size(dealt, tp)) for name in routing.attributes)
    return Pairs(routing.tokens, routing.index, routing.weights, dealt, local)


def with_cut_width(plan: P) -> P:
    """Returns `plan` with the layouts and changes that were proven with the width of each expert cut."""
    whole = {m.path: m.pairs for m in plan.modules if m.pairs is not None}
    if not whole:
        return plan
    params = dict(plan.params) | {p.name: p for pairs in whole.values() for p in pairs.layouts}
    modules: list[ModulePlan] = []
    for m in plan.modules:
        before = m if m.pairs is None else m.pairs.width
        modules += [before] if before is not None else []
    axes = tuple(_without(plan.axes, [p.name for pairs in whole.values() for p in pairs.layouts]))
    return replace(plan, params=params, modules=tuple(modules), axes=axes)


def _module(plan: PlanSpec, path: str) -> ModulePlan:
    return next((m for m in plan.modules if m.path == path), ModulePlan(path))


def _without(axes: list[AxisInfo] | tuple[AxisInfo, ...], names: Mapping[str, ParamPlan] | list[str]) -> Iterator[AxisInfo]:
    for axis in axes:
        rest = tuple(n for n in axis.params if n not in names)
        if rest:
            yield axis if len(rest) == len(axis.params) else replace(axis, params=rest)


def _whole(expr: Expr) -> Expr:
    if isinstance(expr, Factor):
        return Factor(expr.name, expr.size)
    parts = tuple(map(_whole, expr.parts))
    return Product(parts) if isinstance(expr, Product) else Concat(parts)
