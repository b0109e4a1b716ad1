"""Computes what a plan costs beyond an even share: padding, repetition and the work of the busiest rank.

All counts are elements and follow from the layouts; a tied parameter counts once. With `n` the elements of a parameter, `local`
those of one rank's shard (padding included, the same on every rank) and `tp` ranks, a sharded parameter gives

    tp · local = n + padding + repeated

*padding* stands for no element of the parameter. *repeated* are copies beyond the first, where several ranks or several slots of
one rank hold an element (`padding_elements`, `repeated_elements`). Summed over the model, with `whole` the share of the elements
that lie in replicated parameters:

    tp · local_share = 1 + padding_waste + repeated_share + (tp − 1) · whole

A token costs one multiply-add for each element of a Linear weight. So the work of a rank over the ideal is `tp · local / n` over
the parameters in products (`busiest_work`). A table that is only looked up costs none; experts count as if all of them ran.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

import torch

from autotp.arguments import whole_number
from autotp.errors import InputError
from autotp.plan.expressions import factors, size
from autotp.plan.layout import Layout
from autotp.plan.spec import Collective, GradSum, PaddedAxis, ParamPlan, PlanSpec


def padding_elements(layout: Layout) -> int:
    """Counts the elements of padding over all ranks' shards of one parameter."""
    held = sum(stop - start for rank in range(layout.tp) for start, stop in layout.padding(rank))
    return held * _others(layout)


def repeated_elements(layout: Layout) -> int:
    """Counts the elements of one sharded parameter held beyond the first copy of each, over all ranks; 0 for a replicated one."""
    if layout.expr is None:
        return 0
    held = sum(stop - start for rank in range(layout.tp) for start, stop in layout.intervals(rank))
    return (held - size(layout.expr)) * _others(layout)


def padding_waste(plan: PlanSpec) -> float:
    """Returns padding over all ranks' shards ÷ the model's elements: 0.067 means 6.7 %."""
    return _over_model(plan, sum(count * padding_elements(layout) for layout, count in _layouts(plan).items()))


def repeated_share(plan: PlanSpec) -> float:
    """Returns copies beyond the first, over all ranks' shards of sharded parameters, ÷ the model's elements."""
    return _over_model(plan, sum(count * repeated_elements(layout) for layout, count in _layouts(plan).items()))


def busiest_work(plan: PlanSpec) -> float:
    """Returns multiply-adds a token of the busiest rank ÷ a `tp`-th of the model's; 1 where no parameter is in a product.

    Shards are equally large, padding is multiplied like the rest and a replicated weight is multiplied whole by every rank: every
    rank is the busiest.
    """
    own = [p.layout for n, p in plan.params.items() if n in plan.products and n not in plan.aliases]
    whole = sum(prod(layout.shape) for layout in own)
    return plan.tp * sum(prod(layout.local_shape) for layout in own) / whole if whole else 1.0


def padded_axes(plan: PlanSpec) -> tuple[PaddedAxis, ...]:
    """Returns the axes that padding fills up, alike ones once, in the order of the parameters.

    Two factors cut together (kv heads and the query heads of each) are one axis.
    """
    found: dict[PaddedAxis, None] = {}
    for name, param in plan.params.items():
        for cut, full, padded in _cuts(param.layout):
            if padded > full:
                found[PaddedAxis(_pattern(plan, name, cut), full, padded)] = None
    return tuple(found)


def collectives(plan: PlanSpec, tokens: int, dtype: torch.dtype) -> tuple[Collective, ...]:
    """Lists the collectives: see `Plan.collectives`.

    Raises:
        InputError: tokens is no whole number of at least 1, or dtype no torch.dtype.
    """
    whole_number("tokens", tokens)
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype is {dtype!r}, wanted a torch.dtype, as torch.bfloat16")
    item = dtype.itemsize
    return tuple(Collective(t.module, t.kind, t.when, (t.width * tokens + t.elements) * item) for t in plan.traffic)


def _layouts(plan: PlanSpec) -> Counter[Layout]:
    return Counter(p.layout for n, p in plan.params.items() if n not in plan.aliases)


def _over_model(plan: PlanSpec, elements: int) -> float:
    whole = sum(count * prod(layout.shape) for layout, count in _layouts(plan).items())
    return elements / whole if whole else 0.0


def _others(layout: Layout) -> int:
    """Elements for each index of the sharded dim."""
    return prod(n for i, n in enumerate(layout.shape) if i != layout.dim)


def _cuts(layout: Layout) -> Iterator[tuple[str, int, int]]:
    """(name of the major factor, size, slots over all ranks) of each axis of a layout that is cut whole.

    A major factor without the minor one that it is cut with (k and v) has shared slots: its padding comes from the other's.
    """
    cut = list(dict.fromkeys(f for expr in layout.dims for f in factors(expr) if f.sharded))
    minors = {f.of: f for f in cut if f.of}
    for factor in cut:
        own = size(factor, layout.tp)
        if factor.name in minors:
            minor = minors[factor.name]
            yield factor.name, factor.size * minor.size, own * size(minor, layout.tp) * layout.tp
        elif factor.pieces == 1 and not factor.of:
            yield factor.name, factor.size, own * layout.tp


def _pattern(plan: PlanSpec, param: str, factor: str) -> str:
    for axis in plan.axes:
        if axis.name.rpartition(".")[2] == factor and param in axis.params:
            return axis.pattern
    return plan.params[param].axis


def summed(grad: GradSum, param: ParamPlan | None) -> int:
    """Counts the elements of a gradient that are summed over the ranks: all of a whole parameter's, the shared ones of a sharded one's."""
    if grad is GradSum.NONE or param is None:
        return 0
    layout = param.layout
    if grad is GradSum.ALL or layout.dim is None:
        return prod(layout.shape)
    return layout.shared(0).size * prod(layout.shape) // layout.shape[layout.dim]
