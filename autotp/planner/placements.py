"""Finds the placement of every value, given which atoms are sharded.

For a set Σ of sharded atoms each value gets the atoms of Σ that it is sharded on (none: whole on every rank, R), and whether it is
a partial sum (P). Placements flow forward from the sharded parameters. A value that no parameter shards stays whole, and is sliced
where it meets a sharded one. An impossible choice raises a `Conflict`; a conversion that is needed is noted on its edge.

Invariant: a value is sharded on at most one atom of each index path, and never both sharded and partial.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any

from autotp.axes.analysis import Axes, Meaning
from autotp.axes.atoms import Atom, flat
from autotp.axes.operators.table import Is, is_a
from autotp.plan.spec import DistributedForm
from autotp.planner.aliases import Storage
from autotp.planner.calls import Calls
from autotp.planner.faults import Faults, faults_of
from autotp.planner.flows import differentiable, made_of_arguments
from autotp.planner.partition import Atoms, Partitions, covers, in_order, uncovered
from autotp.planner.refusals import Conflict
from autotp.trace.graph import Node, Origin, Pseudo, Value

NONE: Atoms = frozenset()
SlotKey = tuple[Pseudo, str, tuple[str | int, ...]]


@dataclass(slots=True)
class Labels:
    """The labels (placements) of one pass; edges are (node index, value id)."""

    cuts: Partitions = field(default_factory=dict)
    shard: dict[int, Atoms] = field(default_factory=dict)
    partial: set[int] = field(default_factory=set)
    born: set[int] = field(default_factory=set)  # partial values that a contraction makes
    slices: dict[tuple[int, int], Atoms] = field(default_factory=dict)
    reduces: set[tuple[int, int]] = field(default_factory=set)
    once: set[int] = field(default_factory=set)  # whole parameters that are to be added once to partial sums
    distributed: dict[int, DistributedForm] = field(default_factory=dict)
    gathered: dict[int, Atoms] = field(default_factory=dict)  # EXIT node index → atoms gathered there
    generated: set[int] = field(default_factory=set)  # nodes whose result is made sharded from whole arguments
    conflicts: list[Conflict] = field(default_factory=list)

    def of(self, value: Value) -> Atoms:
        """Returns the atoms that a value is sharded on."""
        return self.shard.get(value.id, NONE)


class GraphIndex:
    """Holds the axes in the form that labelling needs: leaf atoms of each dim, frozen.

    apart: modules that are a region of their own where they are in one: what is around them gets whole tensors and whole gradients.
    """

    def __init__(self, axes: Axes, apart: frozenset[str] = frozenset()) -> None:
        self.axes, self.apart = axes, apart
        self.graph = axes.graph
        self.leaves: dict[int, tuple[Atoms, ...]] = {}
        self.carried: dict[int, Atoms] = {}
        self.form: dict[int, int] = {}  # value → a number, equal for values whose dims are the same
        self.faults: dict[Hashable, Faults] = {}  # what `_check_values` found: many values have the same dims, and it is asked often
        self.labelled: dict[Hashable, Labels] = {}  # what `label` gave
        self.tried: dict[Hashable, Any] = {}  # what `autotp.planner.choice` found of candidates
        self._cache: dict[tuple[int, ...], Atoms] = {}
        forms: dict[tuple[tuple[int, ...], ...], int] = {}
        for key, dims in axes.dims.items():
            self.form[key] = forms.setdefault(tuple(tuple(a.id for a in d) for d in dims), len(forms))
            per_dim = tuple(self.atoms(d) for d in dims)
            self.leaves[key] = per_dim
            self.carried[key] = frozenset().union(*per_dim) if per_dim else NONE
        self.inputs = [tuple(dict.fromkeys(n.inputs())) for n in self.graph.nodes]
        self.blocked = [[(s, self.atoms(s.dim)) for s in m.blocked] for m in axes.meanings]
        self.contracts = [[(c, self.atoms(c.dim)) for c in m.contracts] for m in axes.meanings]

        self.flows = differentiable(self.graph)
        self.given = self.flows - differentiable(self.graph, arguments=False)  # arguments of the model, and what is made of them alone
        self.activations = made_of_arguments(self.graph)
        self.users: dict[int, list[int]] = {}
        self.generators: dict[Atom, list[int]] = {}
        self.summing: dict[Atom, list[int]] = {}
        for node, inputs in zip(self.graph.nodes, self.inputs, strict=True):
            for v in inputs:
                self.users.setdefault(v.id, []).append(node.index)
            if axes.meanings[node.index].generates:
                for atom in frozenset().union(*(self.carried[o.id] for o in node.outputs)):
                    self.generators.setdefault(atom, []).append(node.index)
            for atom in frozenset().union(*(atoms for _, atoms in self.contracts[node.index]), NONE):
                self.summing.setdefault(atom, []).append(node.index)
        self.made = {o.id: n for n in self.graph.nodes for o in n.outputs}
        self.calls, self.storage = Calls(self.graph), Storage(self.graph)
        self._params = {v.id for v in self.graph.params.values()}
        self.of_parameters: Atoms = frozenset().union(*(self.carried.get(key, NONE) for key in self._params))
        self._meeting: dict[Atom, list[Node]] | None = None

    def meeting(self, atom: Atom) -> list[Node]:
        """Returns the nodes that have `atom` in a dim of an argument or a result, in order."""
        if self._meeting is None:
            self._meeting = {}
            for node, inputs in zip(self.graph.nodes, self.inputs, strict=True):
                for each in frozenset().union(*(self.carried.get(v.id, NONE) for v in (*inputs, *node.outputs))):
                    self._meeting.setdefault(each, []).append(node)
        return self._meeting.get(atom, [])

    def is_parameter(self, key: int) -> bool:
        """True for parameters."""
        return key in self._params

    def free(self, key: int) -> bool:
        """True for constants of one value."""
        return key in self.graph.fills

    def parameter_of(self, key: int) -> int | None:
        """Returns the parameter that a value is a view or a selection of, None for other values."""
        while key not in self._params:
            node = self.made.get(key)
            if node is None or not is_a(node, Is.SELECTION):
                return None
            key = next(node.inputs()).id
        return key

    def atoms(self, dim: Iterable[Atom]) -> Atoms:
        """Returns the leaf atoms of a dim, those inside concatenations included."""
        key = tuple(a.id for a in dim)
        if key not in self._cache:
            self._cache[key] = frozenset(leaf_atoms(dim))
        return self._cache[key]


def leaf_atoms(dim: Iterable[Atom]) -> Iterable[Atom]:
    """Yields the leaf atoms of a dim, in order."""
    for atom in flat(list(dim)):
        if atom.segments is None:
            yield atom
        else:
            for segment in atom.segments:
                yield from leaf_atoms(segment)


def label(space: GraphIndex, cuts: Partitions, gathers: Mapping[SlotKey, Atoms], whole: frozenset[int] = frozenset()) -> Labels:
    """Label every value with its placement, with the atoms of `cuts` sharded.

    `gathers`: results gathered at a module's EXIT; `whole`: nodes whose result is not made sharded.

    Passes are repeated until it is known which parameters are added to partial sums. The result is remembered, and not to be changed.
    """
    decided = whole.intersection(i for atom in cuts for i in space.generators.get(atom, ()))  # the others make nothing of these axes
    key = tuple(cuts.items()), frozenset(gathers.items()), decided
    known = space.labelled.get(key)
    if known is not None:
        return known
    once: set[int] = set()
    while True:
        out = _pass(space, cuts, gathers, whole, once)
        if out.once <= once:
            out.once = once
            space.labelled[key] = out
            return out
        once |= out.once


def _pass(space: GraphIndex, cuts: Partitions, gathers: Mapping[SlotKey, Atoms], whole: frozenset[int], once: set[int]) -> Labels:
    """Visit, in order, the nodes that a sharded or partial value reaches."""
    out, on = Labels(cuts), frozenset(cuts)
    out.partial |= once
    queue: list[int] = [i for atom in on for i in space.generators.get(atom, ()) if i not in whole]
    for value in space.graph.params.values():
        hit = space.carried[value.id] & on
        if hit:
            out.shard[value.id] = hit
        if hit or value.id in once:
            queue += space.users.get(value.id, ())
    queue = sorted(set(queue))
    seen = set(queue)
    while queue:
        index = heappop(queue)
        node, inputs = space.graph.nodes[index], space.inputs[index]
        if node.op is Pseudo.REPEAT:
            _repeat(space, node, out)
        else:
            active = NONE
            for v in inputs:
                active |= out.shard.get(v.id, NONE)
            partial = [v for v in inputs if v.id in out.partial]
            _node(space, node, space.axes.meanings[index], inputs, active, partial, on, gathers, whole, out)
        for o in node.outputs:
            if o.id in out.shard or o.id in out.partial:
                for user in space.users.get(o.id, ()):
                    if user not in seen:
                        seen.add(user)
                        heappush(queue, user)
    _check_values(space, out)
    return out


def _repeat(space: GraphIndex, node: Node, out: Labels) -> None:
    here, there = node.args
    for a, b in zip(here, there, strict=True):
        if out.of(a) != out.of(b):
            out.conflicts.append(Conflict(out.of(a) | out.of(b), node, "a repeated block gets its argument in another placement"))
        if (a.id in out.partial) != (b.id in out.partial):  # whole for one block is whole for all that are alike
            out.reduces.add((node.index, a.id if a.id in out.partial else b.id))


def _node(
    space: GraphIndex, node: Node, meaning: Meaning, inputs: Sequence[Value], active: Atoms, partial: list[Value], on: Atoms,
    gathers: Mapping[SlotKey, Atoms], whole: frozenset[int], out: Labels,
) -> None:  # fmt: skip
    index = node.index
    # whole arguments that carry an active atom are sliced
    have: dict[int, Atoms] = {}
    for v in inputs:
        own = out.shard.get(v.id, NONE)
        missing = (space.carried.get(v.id, NONE) & active) - own
        if missing and v.id not in out.partial:
            if v.id in space.graph.fills and v.origin is Origin.NODE and not v.shape:
                missing = NONE
            out.slices[index, v.id] = missing
            if missing and v.id in space.flows and not space.free(v.id) and not _given(space, index, v, missing, out):
                out.conflicts.append(Conflict(missing, node, "no parameter makes this activation sharded: it would only be sliced"))
        have[v.id] = own | missing
    for site, atoms in space.blocked[index]:
        hit = have.get(site.value, out.shard.get(site.value, NONE)) & atoms
        if hit:
            out.conflicts.append(Conflict(hit, node, site.reason))
    # partial arguments pass where the operator commutes with the sum
    ids = frozenset(v.id for v in partial)
    passes = bool(partial) and any(
        ids <= group and all(g in ids or space.graph.fills.get(g) == 0.0 for g in group) for group in meaning.linear
    )
    # contractions over a sharded dim make partial sums
    summed = NONE
    crossed: dict[int, Atoms] = {}
    for contract, atoms in space.contracts[index]:
        crossed[contract.value] = crossed.get(contract.value, NONE) | atoms
    for contract, atoms in space.contracts[index]:
        hit = have.get(contract.value, NONE) & atoms
        if not hit:
            continue
        statistic = contract.form is not None and contract.form is not DistributedForm.LOOKUP  # it tells copies and padding apart
        if not statistic and not covers(contract.dim, have[contract.value], out.cuts):
            segments = tuple(uncovered(contract.dim, have[contract.value], out.cuts))
            out.conflicts.append(Conflict(hit, node, "some of what is summed is held by several ranks", segments))
        if statistic and (parted := _parted(hit, have[contract.value], crossed[contract.value], out.cuts)):
            out.conflicts.append(Conflict(parted, node, "the cut goes through the groups that a statistic is taken of"))
        if contract.form is not None:
            out.distributed[index] = contract.form
            if not space.calls.stands_for(node, contract.form):
                call = space.graph.python.get(node.call)
                function = call.function if call is not None else "a function"
                why = space.graph.sealed(node) or f"it is part of {function}, which has no distributed form"
                out.conflicts.append(Conflict(hit, node, why))
        if not contract.whole:
            summed |= hit
    generated = NONE
    if meaning.generates and index not in whole:
        fresh = frozenset().union(*(space.carried[o.id] for o in node.outputs)) & on
        generated = fresh - frozenset().union(*(space.carried.get(v.id, NONE) for v in inputs)) if inputs else fresh
        if generated:
            out.generated.add(index)
    if passes and (summed or generated or any(have[v.id] for v in inputs if v.id not in ids)):
        passes = False  # the sum would meet a sharded operand: take it before
    if partial and not passes and not summed:
        passes = _add_once(space, meaning, ids, out)
    if partial and not passes:
        partial = [v for v in partial if not (summed and v.id in meaning.once)]
        out.reduces.update((index, v.id) for v in partial)
    if summed:
        for key in meaning.once:
            if key not in out.partial and not _mark_once(space, key, out):
                out.conflicts.append(Conflict(summed, node, "what is added to the partial sum is no parameter"))
    available = active | generated
    for o in node.outputs:
        hit = space.carried.get(o.id, NONE) & available & _flowing(have, generated)
        if node.op is Pseudo.EXIT and node.slot is not None and node.slot[0] in space.axes.ends:
            ending = have[node.args[0].id] - hit
            if ending:
                out.gathered[index] = ending
        elif node.op is Pseudo.EXIT and hit and node.slot is not None:
            wanted = gathers.get((Pseudo.EXIT, *node.slot), NONE) & hit
            wanted = hit & NONE.union(*(out.cuts[a].atoms for a in wanted))  # an axis is gathered as a whole
            if wanted:
                out.gathered[index] = wanted
                hit -= wanted
        if hit:
            out.shard[o.id] = hit
        if (summed or passes) and not o.dtype.is_floating_point and not o.dtype.is_complex:
            out.conflicts.append(Conflict(summed, node, "a sum of integers"))
        if summed or passes:
            out.partial.add(o.id)
            if summed:
                out.born.add(o.id)
            if hit:
                out.conflicts.append(Conflict(hit | summed, node, "a partial sum would also be sharded"))


def _given(space: GraphIndex, index: int, value: Value, missing: Atoms, out: Labels) -> bool:
    """True for an argument of the model (a mask of each head) that meets a sharded activation and is not what the node sums over.

    Only a caller who asks for its gradient pays for the slice.
    """
    if value.id not in space.given or any(contract.value == value.id for contract, _ in space.contracts[index]):
        return False
    return any(missing & out.shard.get(v.id, NONE) for v in space.inputs[index] if v.id in space.activations)


def _parted(hit: Atoms, have: Atoms, crossed: Atoms, cuts: Partitions) -> Atoms:
    """Returns the atoms of the cuts where a value has both factors and its statistic crosses only one.

    Pieces of the groups are dealt. So an index of the remaining factor is another group, or another part of one, on each rank.
    """
    found = (cuts[atom].atoms & have for atom in hit)
    return NONE.union(*(both for both in found if len(both) > 1 and not both <= crossed))


def _add_once(space: GraphIndex, meaning: Meaning, ids: frozenset[int], out: Labels) -> bool:
    """True where all whole operands of a sum with partial ones are parameters: those are then added on one rank."""
    if any(_crossed(space, key, out) for key in ids):
        return False  # it can be reduced at the boundary that it crossed
    for group in meaning.linear:
        whole = [g for g in group if g not in ids and space.graph.fills.get(g) != 0.0]
        if ids <= group and whole and all(space.parameter_of(g) is not None and not out.shard.get(g) for g in whole):
            return all(_mark_once(space, g, out) for g in whole)
    return False


def _crossed(space: GraphIndex, key: int, out: Labels) -> bool:
    """True for a partial sum that left a module since it was made."""
    while key not in out.born:
        node = space.made.get(key)
        if node is None or node.op is Pseudo.EXIT:
            return node is not None
        key = next((v.id for v in node.inputs() if v.id in out.partial), -1)
    return False


def _mark_once(space: GraphIndex, key: int, out: Labels) -> bool:
    parameter = space.parameter_of(key)
    if parameter is None or out.shard.get(parameter):
        return False
    out.once.add(parameter)
    return True


def _flowing(have: Mapping[int, Atoms], generated: Atoms) -> Atoms:
    return frozenset().union(*have.values(), generated) if have else generated


def _check_values(space: GraphIndex, out: Labels) -> None:
    cuts = out.cuts
    found: dict[tuple[int, Atoms], Faults] = {}
    for key, on in out.shard.items():
        faults = _faults(space, key, on, out.cuts, found)
        out.conflicts += [Conflict(atoms, None, text) for atoms, text in faults.cuts]
        if faults.twice is not None:
            out.conflicts.append(Conflict(frozenset({faults.twice}), None, "both dims of one tensor are the same axis"))
    for (index, key), missing in out.slices.items():
        own = out.shard.get(key, NONE)
        node = space.graph.nodes[index]
        out.conflicts += [Conflict(atoms, node, text) for atoms, text in _faults(space, key, own | missing, out.cuts, found).cuts]
        if any(cuts[a].atoms & own for a in missing):
            out.conflicts.append(Conflict(missing, node, "one factor of the axis would be sliced after the other"))
        elif len([d for d in space.leaves[key] if d & missing]) > 1:
            out.conflicts.append(Conflict(missing, node, "a tensor would be sliced along two dims"))
    for value in space.graph.params.values():
        on = out.shard.get(value.id, NONE)
        if on and not all(in_order(d, on, cuts) for d in space.axes.dims[value.id]):
            out.conflicts.append(Conflict(on, None, f"{value.name} does not have the factors of the axis next to each other"))


def _faults(space: GraphIndex, key: int, on: Atoms, cuts: Partitions, found: dict[tuple[int, Atoms], Faults]) -> Faults:
    """The faults of a value, looked up in those `found` in this pass, then in those of all passes."""
    here = space.form[key], on
    faults = found.get(here)
    if faults is None:
        known = (*here, frozenset(cuts[a] for a in on))
        faults = space.faults.get(known)
        if faults is None:
            faults = space.faults[known] = faults_of(space.axes.dims[key], space.leaves[key], on, cuts)
        found[here] = faults
    return faults
