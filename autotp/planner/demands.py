"""Lists the ints that the code passes to operators, and what each must be on a shard by the sizes of the tensors there."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autotp.axes.analysis import Demand
from autotp.axes.atoms import Atom, flat
from autotp.planner.partition import Atoms, local_size
from autotp.planner.placements import NONE, GraphIndex, Labels
from autotp.planner.refusals import Refusal
from autotp.planner.varying import positions
from autotp.trace.graph import Node
from autotp.trace.ints import IntExpr, leaves

#: Functions that take the shape of their second tensor.
_LIKE = frozenset(("view_as", "reshape_as", "expand_as"))


@dataclass(frozen=True, slots=True)
class Constraint:
    """Int number `position` of a node must be `local` on a shard. `demanded`: an operator rule says so.

    unit: (factor of the int that lengths do not change, what it must be on a shard), where the int is such a factor × lengths.
    """

    node: Node
    position: int
    expr: IntExpr
    local: int
    demanded: bool
    unit: tuple[int, int] | None = None


def constraints(space: GraphIndex, labels: Labels) -> list[Constraint]:
    """Lists every constraint of the graph.

    Raises:
        Refusal: a demanded int has no known origin, or is not told from others of its call that are equal on one device.
    """
    out: list[Constraint] = []
    for node in space.graph.nodes:
        meaning = space.axes.meanings[node.index]
        if not node.ints and not meaning.demands:
            continue
        wanted: dict[int, int] = {}
        units: dict[int, tuple[int, int] | None] = {}
        for demand in meaning.demands:
            local = _demanded(node, demand, labels)
            found = positions(node, demand.number, demand.at, demand.listed)
            if not found and _given(space, labels, node, demand.at) == local:
                continue
            if not found and local != demand.number:
                raise Refusal(node, f"{demand.number} would have to become {local}, and where it comes from is not known")
            if len(found) > 1 and local != demand.number and not _all_asked_for(space, labels, node, demand.number, local, len(found)):
                raise Refusal(node, f"{demand.number} would have to become {local}, and its call has {len(found)} numbers {demand.number}")
            for p in found:
                if wanted.setdefault(p, local) != local:
                    raise Refusal(node, f"{demand.number} would have to become both {wanted[p]} and {local}")
                unit = _unit(space, demand, labels, node)
                units[p] = unit if units.setdefault(p, unit) == unit else None
        for p, expr in enumerate(node.ints):
            if p in wanted or any(True for _ in leaves(expr)):
                out.append(Constraint(node, p, expr, wanted.get(p, expr.value), p in wanted, units.get(p)))
    return out


def _given(space: GraphIndex, labels: Labels, node: Node, at: int) -> int | None:
    """Returns the local size of dim `at` of the tensor whose shape a call takes (`x.view_as(y)`), None for other calls."""
    call = space.graph.python.get(node.call)
    if call is None or call.function not in _LIKE or len(node.tensors) != 2 or at < 0:
        return None
    shape = space.axes.dims.get(node.tensors[1], ())
    return local_size(shape[at], labels.shard.get(node.tensors[1], NONE), labels.cuts) if at < len(shape) else None


def _unit(space: GraphIndex, demand: Demand, labels: Labels, node: Node) -> tuple[int, int] | None:
    """Returns the size and the local size of the factors of a dim that are no lengths, None for a concatenation."""
    atoms = flat(list(demand.dims[0])) if len(demand.dims) == 1 else []
    if not atoms or any(a.segments is not None for a in atoms):
        return None
    kept = [a for a in atoms if not is_length(space, labels, a)]
    return math.prod(a.size for a in kept), local_size(kept, _on(node, demand, labels), labels.cuts)


def is_length(space: GraphIndex, labels: Labels, atom: Atom) -> bool:
    """True for an axis that is not cut, and that no parameter has or that varies: another call may have another size."""
    return atom not in labels.cuts and (atom not in space.of_parameters or atom in space.varying)


def _on(node: Node, demand: Demand, labels: Labels) -> Atoms:
    return labels.shard.get(demand.value, NONE) | labels.slices.get((node.index, demand.value), NONE)


def _demanded(node: Node, demand: Demand, labels: Labels) -> int:
    on = _on(node, demand, labels)
    local = sum(local_size(d, on, labels.cuts) for d in demand.dims)
    return -local if demand.number < 0 else local


def _all_asked_for(space: GraphIndex, labels: Labels, node: Node, number: int, local: int, count: int) -> bool:
    """True where the operators of a node's Python call ask for `count` ints that are `number` on one device, and all for `local`."""
    asked = {(n.index, d): n for n in space.calls.nodes(node) for d in space.axes.meanings[n.index].demands if d.number == number}
    return len(asked) >= count and all(_demanded(n, d, labels) == local for (_, d), n in asked.items())
