"""Decides which plain attributes become local, so that the code computes local sizes by itself.

Every int that the code passed to an operator carries an expression over attributes and tensor sizes. On a shard, sizes of sharded
tensors change by themselves. Each int must then equal the local size that the axes demand, or its old value where nothing is
demanded. The attributes are the unknowns of a small constraint problem, solved by search.

An int that no attribute solves is overridden at its call site, also a number that is written in the code. Where it has no demand, the
axis that it belongs to cannot be sharded.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autotp.axes.analysis import Demand
from autotp.axes.atoms import Atom, flat
from autotp.plan.spec import LocalAttribute
from autotp.planner.partition import Atoms, Partitions, local_size
from autotp.planner.placements import NONE, GraphIndex, Labels
from autotp.planner.refusals import Refusal
from autotp.trace.graph import Node
from autotp.trace.ints import AttrRef, IntExpr, SizeRef, evaluate, leaves, show

LIMIT = 4000
#: Functions that take the shape of their second tensor.
_LIKE = frozenset(("view_as", "reshape_as", "expand_as"))
#: What is added to each length, and what all are, to see whether a number is the same for others.
MORE = range(1, 9)
LENGTHS = (*range(1, 65), *(2**n for n in range(7, 20)))
#: (module, attribute path) → the local value that is tried first.
Hints = Mapping[tuple[str, str], int]


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


@dataclass(frozen=True, slots=True)
class Localised:
    """Attributes by module, and (node index → (position, global, local)) overrides at call sites.

    multiples: as overrides, for numbers that are a multiple of the global one and become that multiple of the local one.
    literals: the nodes with overrides that have a number of the code changed.
    """

    attributes: Mapping[str, tuple[LocalAttribute, ...]]
    overrides: Mapping[int, tuple[tuple[int, int, int], ...]]
    multiples: Mapping[int, tuple[tuple[int, int, int], ...]] = field(default_factory=dict)
    literals: frozenset[int] = frozenset()


def positions(node: Node, number: int, at: int, listed: int) -> list[int]:
    """Returns the positions among a call's ints that may be int `number` of the ATen call (the `at`-th of a list of `listed`)."""
    values = [e.value for e in node.ints]
    if listed:
        sizes = next(
            (a for a in node.args if isinstance(a, (list, tuple)) and len(a) == listed and all(isinstance(x, int) for x in a)), None
        )
        if sizes is not None:
            runs = [i for i in range(len(values) - listed + 1) if values[i : i + listed] == list(sizes)]
            if runs:
                return [runs[-1] + at]
    return [i for i, v in enumerate(values) if v == number]


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
    """True for an axis that no parameter has and that is not cut: another call may have another size."""
    return atom not in space.of_parameters and atom not in labels.cuts


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


def localise(space: GraphIndex, labels: Labels, hints: Hints | None = None) -> Localised:
    """Solve for the attributes, with the values of `hints` where these satisfy the constraints.

    Raises Refusal where no attribute and no override helps.
    """
    every = constraints(space, labels)
    shapes = {v.id: v for n in space.graph.nodes for v in (*n.inputs(), *n.outputs)}

    def size(leaf: SizeRef) -> int:
        value = shapes.get(leaf.value_id)
        if value is None:
            return leaf.value
        on = labels.shard.get(value.id, NONE)
        dims = space.axes.dims[value.id]
        if leaf.dim < 0:
            total = 1
            for d in dims:
                total *= local_size(d, on, labels.cuts)
            return total
        return local_size(dims[leaf.dim], on, labels.cuts)

    search = _Search(every, size, labels.cuts, hints or {}, _equal(space, size))
    solution = search.run()
    attributes: dict[str, list[LocalAttribute]] = {}
    for ref, value in solution.items():
        if value != ref.value:
            attributes.setdefault(ref.module, []).append(LocalAttribute(ref.path, ref.value, value))
    overrides: dict[int, list[tuple[int, int, int]]] = {}
    multiples: dict[int, list[tuple[int, int, int]]] = {}
    literals: set[int] = set()
    for c in every:
        got = search.value(c.expr, solution)
        if got == c.local:
            if c.local == c.expr.value and not search.same_for_other_lengths([c.expr], solution, _itself):
                raise Refusal(c.node, f"{show(c.expr)} must stay {c.local} there, and would not for other lengths")
            continue
        if not c.demanded:
            raise Refusal(c.node, f"{show(c.expr)} is used as a number there: {c.expr.value} would become {got}")
        if c.local == c.expr.value:
            raise Refusal(c.node, f"{show(c.expr)} must stay {c.local} there, and would become {got}")
        if c.node.place is None or space.graph.sealed(c.node):
            origin = "" if any(True for _ in leaves(c.expr)) else " is written as a number in the code, or its origin was lost, and"
            raise Refusal(c.node, f"{show(c.expr)}{origin} would have to be {c.local}, and no call site can be told")
        others = _for_other_lengths(space, labels, c.expr)
        if others != {c.expr.value}:
            # the call site is told a factor of a number that depends on lengths
            changed = any(search.value(leaf, solution) != leaf.value for leaf in leaves(c.expr))
            if changed or c.unit is None or any(n is None or n % c.unit[0] for n in others):
                text = f"{show(c.expr)} would have to be {c.local} there, no attribute makes it so, and it depends on a length"
                raise Refusal(c.node, text)
            multiples.setdefault(c.node.index, []).append((c.position, *c.unit))
            continue
        if not any(True for _ in leaves(c.expr)):
            literals.add(c.node.index)
        overrides.setdefault(c.node.index, []).append((c.position, got if got is not None else c.expr.value, c.local))
    for name, a, b in space.graph.compared:
        if not search.same_for_other_lengths([a, b], solution, getattr(operator, name)):
            text = f"the code compares {show(a)} with {show(b)}, of which one would become local: for other lengths it would go another way"
            raise Refusal(_changed_by(space, every, search, solution, (a, b)), text)
    return Localised(_frozen(attributes), _frozen(overrides), _frozen(multiples), frozenset(literals))


def _frozen(lists: Mapping[Any, list[Any]]) -> dict[Any, tuple[Any, ...]]:
    return {key: tuple(values) for key, values in lists.items()}


def _equal(space: GraphIndex, size: Callable[[SizeRef], int]) -> dict[AttrRef, int]:
    """Returns the attributes that the code compares with a size that is cut, and the local size: `x.size(1) != self.num_features`."""
    found: dict[AttrRef, int] = {}
    for name, *sides in space.graph.compared:
        for a, b in (sides, sides[::-1]):
            if name in ("eq", "ne") and isinstance(a, SizeRef) and isinstance(b, AttrRef) and a.value == b.value and size(a) != a.value:
                found[b] = size(a)
    return found


def _for_other_lengths(space: GraphIndex, labels: Labels, expr: IntExpr) -> set[int | None]:
    """Returns what an expression is for other lengths on one device."""

    def length(leaf: AttrRef | SizeRef) -> bool:
        if isinstance(leaf, AttrRef):
            return False
        per_dim = space.leaves.get(leaf.value_id, ())
        atoms = per_dim[leaf.dim] if 0 <= leaf.dim < len(per_dim) else space.carried.get(leaf.value_id, NONE)
        return any(is_length(space, labels, a) for a in atoms)

    lengths = {leaf for leaf in leaves(expr) if length(leaf)}
    more = MORE if lengths else ()
    return {expr.value, *(evaluate(expr, lambda leaf, n=n: leaf.value + n * (leaf in lengths)) for n in more)}  # type: ignore[misc]


def _itself(value: int) -> int:
    return value


def _changed_by(
    space: GraphIndex, every: list[Constraint], search: _Search, solution: Mapping[AttrRef, int], exprs: Sequence[IntExpr]
) -> Node:
    """A node that makes a number of some expressions local: it makes the tensor of a size that is cut, or demands the local number."""
    changed = {leaf for expr in exprs for leaf in leaves(expr) if search.value(leaf, solution) != leaf.value}
    made = next((space.made[leaf.value_id] for leaf in changed if isinstance(leaf, SizeRef) and leaf.value_id in space.made), None)
    return made or next(c.node for c in every if c.local != c.expr.value and changed & set(leaves(c.expr)))


def _scales(cuts: Partitions) -> frozenset[tuple[int, int]]:
    """Returns (size, local size) of everything that is cut: a number made of the size becomes one made of the local size."""
    found: set[tuple[int, int]] = set()
    for cut in cuts.values():
        found |= {(cut.size, cut.local_size), *((atom.size, cut.local(atom)) for atom in cut.atoms)}
        if not cut.padded:
            found.add((cut.tp, 1))
    return frozenset(found)


class _Search:
    """Searches depth-first over attributes, one module's at a time; it gives up a module where it fails.

    `equal`: values that attributes are to have where what is constrained lets them, and where nothing is.
    """

    def __init__(self, every: list[Constraint], size: object, cuts: Partitions, hints: Hints, equal: Mapping[AttrRef, int]) -> None:
        self.size, self.hints, self.equal = size, hints, equal
        self.scales = _scales(cuts)
        self.groups: list[list[Constraint]] = []
        self._steps = 0
        parent: dict[str, str] = {}

        def find(m: str) -> str:
            while parent.setdefault(m, m) != m:
                m = parent[m]
            return m

        for c in every:
            modules = [leaf.module for leaf in leaves(c.expr) if isinstance(leaf, AttrRef)]
            for m in modules[1:]:
                parent[find(m)] = find(modules[0])
        by_module: dict[str, list[Constraint]] = {}
        for c in every:
            for leaf in leaves(c.expr):
                if isinstance(leaf, AttrRef):
                    by_module.setdefault(find(leaf.module), []).append(c)
                    break
        self.groups = list(by_module.values())

    def value(self, expr: IntExpr, solution: Mapping[AttrRef, int]) -> int | None:
        """Returns the local value of an expression under a solution."""
        return evaluate(expr, lambda leaf: solution.get(leaf, leaf.value) if isinstance(leaf, AttrRef) else self.size(leaf))  # type: ignore[operator]

    def same_for_other_lengths(self, exprs: Sequence[IntExpr], solution: Mapping[AttrRef, int], what: Callable[..., object]) -> bool:
        """True where `what` of the expressions is on a shard what it is on one device, for other lengths (sizes that are not cut) too."""

        def local(leaf: AttrRef | SizeRef) -> int:
            return solution.get(leaf, leaf.value) if isinstance(leaf, AttrRef) else self.size(leaf)  # type: ignore[operator]

        every = {leaf for expr in exprs for leaf in leaves(expr)}
        lengths = [leaf for leaf in every if isinstance(leaf, SizeRef) and local(leaf) == leaf.value]
        if not lengths or all(local(leaf) == leaf.value for leaf in every):
            return True
        tried = [*({leaf: leaf.value + more for leaf in lengths} for more in MORE), *(dict.fromkeys(lengths, n) for n in LENGTHS)]
        for given in tried:
            here = [evaluate(e, lambda leaf, given=given: given.get(leaf, leaf.value)) for e in exprs]  # type: ignore[misc]
            there = [evaluate(e, lambda leaf, given=given: given.get(leaf, local(leaf))) for e in exprs]  # type: ignore[misc]
            if None in here or None in there:
                if here != there:
                    return False
            elif what(*here) != what(*there):
                return False
        return True

    def run(self) -> dict[AttrRef, int]:
        """Returns the attributes to change; modules without a solution change nothing."""
        solution: dict[AttrRef, int] = {}
        for group in self.groups:
            asked = {leaf: self.equal[leaf] for c in group for leaf in leaves(c.expr) if isinstance(leaf, AttrRef) and leaf in self.equal}
            for fixed in (asked, {}) if asked else ({},):
                self._steps = 0
                found = self._solve(group, fixed)
                if found is not None:
                    solution.update(found)
                    break
        constrained = {leaf for group in self.groups for c in group for leaf in leaves(c.expr)}
        return solution | {leaf: local for leaf, local in self.equal.items() if leaf not in constrained}

    def _solve(self, group: list[Constraint], fixed: dict[AttrRef, int]) -> dict[AttrRef, int] | None:
        self._steps += 1
        if self._steps > LIMIT:
            return None
        broken = next((c for c in group if self.value(c.expr, fixed) != c.local), None)
        if broken is None:
            return fixed
        free = [leaf for leaf in dict.fromkeys(leaves(broken.expr)) if isinstance(leaf, AttrRef) and leaf not in fixed]
        for leaf in free:
            candidates = {broken.local} if broken.expr == leaf else set()
            candidates |= {leaf.value // whole * local for whole, local in self.scales if leaf.value % whole == 0}
            candidates |= {c.local for c in group if c.expr == leaf}
            hint = self.hints.get((leaf.module, leaf.path), leaf.value)
            for candidate in sorted((candidates | {hint}) - {leaf.value}, key=lambda c: (c != hint, c)):
                found = self._solve(group, {**fixed, leaf: candidate})
                if found is not None:
                    return found
        return None
