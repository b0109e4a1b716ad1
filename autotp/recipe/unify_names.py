"""Renames a plan's factors so that one name has one size: then a recipe can give every size once, as a field of the config.

In a plan a name is told apart within one parameter only: the widths of a dense MLP and of experts are both ``i``. Dims without a
sharded factor become one factor: their own factors do not matter.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from autotp.plan.conversions import Conversion
from autotp.plan.expressions import Expr, Factor, factors, is_sharded, size
from autotp.plan.plan import Plan
from autotp.plan.spec import ModulePlan, ParamPlan, Slot

Names = Mapping[tuple[str, int], str]


def renamed(plan: Plan) -> Plan:
    """Returns the plan with the names of its factors changed; every element stays where it is."""
    params = {n: _param(p, _whole) for n, p in plan.params.items()}
    names = _names(e for p in params.values() for e in p.layout.dims)
    return replace(
        plan,
        params={n: _param(p, lambda e: _expr(e, names)) for n, p in params.items()},
        modules=tuple(_module(m, names) for m in plan.modules),
    )


def _whole(expr: Expr) -> Expr:
    return expr if is_sharded(expr) or isinstance(expr, Factor) else Factor("n", size(expr))


def _names(dims: Iterable[Expr]) -> Names:
    """(name, size) → new name, for factors beside what is cut: the size that a name has most often keeps it."""
    found: dict[str, Counter[int]] = {}
    paired: set[str] = set()
    for f in (f for d in dims if is_sharded(d) for f in factors(d)):
        if not f.name[0].isdigit():
            found.setdefault(f.name, Counter())[f.size] += 1
        paired |= {f.name, f.of} if f.of else set()
    taken = set(found)
    out: dict[tuple[str, int], str] = {}
    for name, sizes in found.items():
        if name in paired:
            continue  # cut together with another name, which would have to follow
        for length, _ in sizes.most_common()[1:]:
            new = next(n for k in range(2, 1000) if (n := f"{name}_{k}") not in taken)
            taken.add(new)
            out[name, length] = new
    return out


def _expr(expr: Expr, names: Names) -> Expr:
    if isinstance(expr, Factor):
        return replace(expr, name=names.get((expr.name, expr.size), expr.name))
    return replace(expr, parts=tuple(_expr(p, names) for p in expr.parts))


def _param(p: ParamPlan, change: Callable[[Expr], Expr]) -> ParamPlan:
    return replace(p, layout=replace(p.layout, dims=tuple(change(e) for e in p.layout.dims)))


def _module(m: ModulePlan, names: Names) -> ModulePlan:
    def slots(items: tuple[Slot, ...]) -> tuple[Slot, ...]:
        return tuple(replace(s, conversions=tuple(conversion(c) for c in s.conversions)) for s in items)

    def conversion(c: Conversion) -> Conversion:
        return c if c.expr is None else replace(c, expr=_expr(c.expr, names))

    return replace(m, inputs=slots(m.inputs), outputs=slots(m.outputs))
