"""Decides which plain attributes become local, so that the code computes local sizes by itself.

Every int that the code passed to an operator carries an expression over attributes and tensor sizes. On a shard, sizes of sharded
tensors change by themselves. Each int must then equal the local size that the axes demand, or its old value where nothing is
demanded. The attributes are the unknowns of a small constraint problem, solved by search.

An int that no attribute solves is overridden at its call site, also a number that is written in the code. Where it has no demand, the
axis that it belongs to cannot be sharded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any

from autotp.axes.atoms import flat, leaf_atoms
from autotp.plan.spec import LocalAttribute
from autotp.planner.demands import Constraint, constraints, is_length
from autotp.planner.partition import Partitions, local_size
from autotp.planner.placements import NONE, GraphIndex, Labels
from autotp.planner.refusals import Refusal
from autotp.trace.graph import Node
from autotp.trace.ints import FLOAT, MADE, AttrRef, IntExpr, SizeRef, evaluate, leaves, parts, show

LIMIT = 4000
#: What is added to lengths, and what they are, to see whether a number is the same for others.
MORE = range(1, 9)
LENGTHS = (*range(1, 65), *(2**n for n in range(7, 20)))
#: (module, attribute path) → the local value that is tried first.
Hints = Mapping[tuple[str, str], int]


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

    search = _Search(every, size, labels.cuts, hints or {}, _equal(space, labels, size), partial(_lengths, space, labels))
    solution = search.run()
    try:
        return _localised(space, labels, every, search, solution)
    except Refusal:
        compared = search.run(leave=True)
        if compared == solution:
            raise
        try:
            return _localised(space, labels, every, search, compared)
        except Refusal:
            pass
        raise


def _localised(space: GraphIndex, labels: Labels, every: list[Constraint], search: _Search, solution: Mapping[AttrRef, int]) -> Localised:
    """Returns the attributes of a solution, and overrides of all that it leaves wrong.

    Raises Refusal where no override helps.
    """
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
        factors = _factors(space, labels, search, solution, c)
        if c.local == c.expr.value and factors is None:
            raise Refusal(c.node, f"{show(c.expr)} must stay {c.local} there, and would become {got}")
        if c.node.place is None or space.graph.sealed(c.node):
            origin = "" if any(True for _ in leaves(c.expr)) else " is written as a number in the code, or its origin was lost, and"
            raise Refusal(c.node, f"{show(c.expr)}{origin} would have to be {c.local}, and no call site can be told")
        if any(_is_length(space, labels, leaf) for leaf in leaves(c.expr)):
            if factors is None:
                text = f"{show(c.expr)} would have to be {c.local} there, no attribute makes it so, and it depends on a length"
                raise Refusal(c.node, text)
            multiples.setdefault(c.node.index, []).append((c.position, *factors))
            continue
        if not any(True for _ in leaves(c.expr)):
            literals.add(c.node.index)
        overrides.setdefault(c.node.index, []).append((c.position, got if got is not None else c.expr.value, c.local))
    passed_on = _passed_on(space)
    for name, a, b in space.graph.compared:
        changes = search.value(a, solution) != a.value
        if name == FLOAT:
            if changes or not search.same_for_other_lengths([a], solution, _itself):
                text = f"the code makes a float of {show(a)}, which would become local, and what it does with that is not known"
                raise Refusal(_changed_by(space, every, search, solution, (a,)), text)
        elif name == MADE:
            # An int that is another one for the traced lengths is met by the replay of the code. A float may be rounded there.
            known = id(a) in passed_on or (changes and isinstance(a.value, int))
            if not known and not search.same_for_other_lengths([a], solution, _itself):
                text = f"the code makes {show(a)}, which for other lengths would be another number, and what it does with that is not known"
                raise Refusal(_changed_by(space, every, search, solution, (a,)), text)
        elif not search.same_for_other_lengths([a, b], solution, getattr(operator, name)):
            text = f"the code compares {show(a)} with {show(b)}, of which one would become local: for other lengths it would go another way"
            raise Refusal(_changed_by(space, every, search, solution, (a, b)), text)
    return Localised(_frozen(attributes), _frozen(overrides), _frozen(multiples), frozenset(literals))


def _passed_on(space: GraphIndex) -> set[int]:
    """Returns ids of the expressions that operators get or code compares, and of what they are made of."""
    if not any(name == MADE for name, _, _ in space.graph.compared):
        return set()
    given = [expr for n in space.graph.nodes for expr in n.ints]
    given += [side for name, *sides in space.graph.compared if name not in (FLOAT, MADE) for side in sides]
    return {id(part) for expr in given for part in parts(expr)}


def _frozen(lists: Mapping[Any, list[Any]]) -> dict[Any, tuple[Any, ...]]:
    return {key: tuple(values) for key, values in lists.items()}


def _is_length(space: GraphIndex, labels: Labels, leaf: AttrRef | SizeRef) -> bool:
    """True for a size that another call may have otherwise."""
    return isinstance(leaf, SizeRef) and bool(_lengths(space, labels, leaf))


def _lengths(space: GraphIndex, labels: Labels, leaf: SizeRef) -> Mapping[Hashable, int]:
    """Returns the axes of a size that another call may have otherwise, and the size of each: their product is a factor of it.

    A concatenation counts as one axis. A size that no axis follows is one length (the number of rows that a mask selects, a batch of one).
    """
    per_dim = space.axes.dims.get(leaf.value_id, ())
    one = 0 <= leaf.dim < len(per_dim)
    dims = per_dim[leaf.dim : leaf.dim + 1] if one else per_dim
    if one and not space.leaves[leaf.value_id][leaf.dim]:
        return {} if space.is_parameter(leaf.value_id) else {leaf: leaf.value}
    return {a: a.size for dim in dims for a in flat(dim) if any(is_length(space, labels, inner) for inner in leaf_atoms([a]))}


def _factors(space: GraphIndex, labels: Labels, search: _Search, solution: Mapping[AttrRef, int], c: Constraint) -> tuple[int, int] | None:
    """Returns (what of an int comes to its call on a shard, what that must become) without the lengths that are factors of it.

    None where the int is no such product for all lengths.
    """
    got = search.value(c.expr, solution)
    if c.unit is None or not got or 0 in c.unit or c.expr.value % c.unit[0]:
        return None
    whole, part = c.unit
    lengths = c.expr.value // whole
    if got % lengths or part * lengths != c.local:
        return None
    if any(_is_length(space, labels, leaf) and search.value(leaf, solution) != leaf.value for leaf in leaves(c.expr)):
        return None  # a length in one dim with an axis that is cut
    arrives = got // lengths
    for (here,), (there,) in search.for_other_lengths([c.expr], solution):
        if here is None or there is None or here % whole or there != here // whole * arrives:
            return None
    return arrives, part


def _equal(space: GraphIndex, labels: Labels, size: Callable[[SizeRef], int]) -> dict[AttrRef, int]:
    """Returns the attributes that the code compares with a size that is cut (`x.size(1) != self.num_features`, `x.size(0) == b *
    self.heads`), and the value that makes both sides equal on a shard.
    """
    found: dict[AttrRef, int] = {}
    scales = _scales(labels.cuts)
    for name, *sides in space.graph.compared:
        for a, b in (sides, sides[::-1]):
            refs = {leaf for leaf in leaves(b) if isinstance(leaf, AttrRef)}
            if name in ("eq", "ne") and isinstance(a, SizeRef) and len(refs) == 1 and a.value == b.value and size(a) != a.value:
                (ref,) = refs
                tried = {ref.value // whole * local for whole, local in scales if ref.value % whole == 0} | {size(a)}
                for v in sorted(tried):
                    if evaluate(b, lambda leaf, v=v: v if isinstance(leaf, AttrRef) else size(leaf)) == size(a):  # type: ignore[misc]
                        found[ref] = v
                        break
    return found


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


def _other_lengths(traced: Mapping[Hashable, int]) -> Iterator[Mapping[Hashable, int]]:
    """Yields lengths in the place of those that were traced."""
    varied = (traced, *({axis: n} for axis, n in traced.items())) if len(traced) > 1 else (traced,) if traced else ()
    for some in varied:
        yield from ({**traced, **{axis: n + more for axis, n in some.items()}} for more in MORE)
        yield from ({**traced, **dict.fromkeys(some, n)} for n in LENGTHS)


class _Search:
    """Searches depth-first over attributes, one module's at a time; it gives up a module where it fails.

    `equal`: values that attributes are to have where what is constrained lets them, and where nothing is. `lengths_of`: the axes of a
    size that other calls may have otherwise.
    """

    def __init__(
        self,
        every: list[Constraint],
        size: Callable[[SizeRef], int],
        cuts: Partitions,
        hints: Hints,
        equal: Mapping[AttrRef, int],
        lengths_of: Callable[[SizeRef], Mapping[Hashable, int]],
    ) -> None:
        self.size, self.hints, self.equal, self.lengths_of = size, hints, equal, lengths_of
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
        found: int | None = evaluate(expr, lambda leaf: solution.get(leaf, leaf.value) if isinstance(leaf, AttrRef) else self.size(leaf))
        return found

    def same_for_other_lengths(self, exprs: Sequence[IntExpr], solution: Mapping[AttrRef, int], what: Callable[..., object]) -> bool:
        """True where `what` of the expressions is on a shard what it is on one device, for other lengths (sizes that are not cut) too."""
        if all(self.value(leaf, solution) == leaf.value for expr in exprs for leaf in leaves(expr)):
            return True
        for here, there in self.for_other_lengths(exprs, solution):
            if None in here or None in there:
                if here != there:
                    return False
            elif what(*here) != what(*there):
                return False
        return True

    def for_other_lengths(
        self, exprs: Sequence[IntExpr], solution: Mapping[AttrRef, int]
    ) -> Iterator[tuple[list[int | None], list[int | None]]]:
        """Yields the expressions' values on one device and on a shard, for each of some other lengths: all together, and each alone."""
        axes = {leaf: self.lengths_of(leaf) for expr in exprs for leaf in leaves(expr) if isinstance(leaf, SizeRef)}
        traced = {axis: n for found in axes.values() for axis, n in found.items()}

        def size(leaf: SizeRef, whole: int, lengths: Mapping[Hashable, int]) -> int:
            """A size is its lengths times what they do not change."""
            found = axes[leaf]
            return whole * prod(lengths[axis] for axis in found) // max(prod(found.values()), 1)

        def value(leaf: AttrRef | SizeRef, lengths: Mapping[Hashable, int], on_shard: bool) -> int:
            if isinstance(leaf, AttrRef):
                return solution.get(leaf, leaf.value) if on_shard else leaf.value
            return size(leaf, self.size(leaf) if on_shard else leaf.value, lengths)

        for lengths in _other_lengths(traced):
            here = [evaluate(e, lambda leaf, lengths=lengths: value(leaf, lengths, False)) for e in exprs]  # type: ignore[misc]
            there = [evaluate(e, lambda leaf, lengths=lengths: value(leaf, lengths, True)) for e in exprs]  # type: ignore[misc]
            yield here, there

    def run(self, leave: bool = False) -> dict[AttrRef, int]:
        """Returns the attributes to change; modules without a solution change nothing.

        `leave`: where attributes that have to be equal to something make the rest wrong, they are changed, and the rest is left.
        """
        solution: dict[AttrRef, int] = {}
        for group in self.groups:
            asked = {leaf: self.equal[leaf] for c in group for leaf in leaves(c.expr) if isinstance(leaf, AttrRef) and leaf in self.equal}
            for fixed in (asked, {}) if asked else ({},):
                self._steps = 0
                found = self._solve(group, fixed)
                if found is None and leave and fixed:
                    found = fixed
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
