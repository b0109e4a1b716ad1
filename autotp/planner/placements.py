"""Holds the placement of every value, and the axes in the form that is needed to find them: see `labelling`.

For a set Σ of sharded atoms each value gets the atoms of Σ that it is sharded on (none: whole on every rank, R), and whether it is
a partial sum (P).

Invariant: a value is sharded on at most one atom of each index path, and never both sharded and partial.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autotp.axes.analysis import Axes, Blocked
from autotp.axes.atoms import Atom, leaf_atoms
from autotp.axes.operators.table import Is, is_a
from autotp.plan.spec import DistributedForm
from autotp.planner.aliases import Storage
from autotp.planner.calls import Calls
from autotp.planner.faults import Faults
from autotp.planner.flows import differentiable, made_of_arguments
from autotp.planner.free_lengths import free_lengths
from autotp.planner.kept_lengths import kept_lengths
from autotp.planner.partition import Atoms, Partitions
from autotp.planner.refusals import Conflict
from autotp.planner.regrouped import regrouped
from autotp.planner.staying_ones import Sure
from autotp.planner.varying import asked_sizes, given_axes, varying
from autotp.planner.weight_axes import weight_axes
from autotp.trace.graph import Node, Pseudo, Value

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
    adding: dict[int, set[int]] = field(default_factory=dict)  # node → those of them that it adds
    distributed: dict[int, DistributedForm] = field(default_factory=dict)
    gathered: dict[int, Atoms] = field(default_factory=dict)  # EXIT node index → atoms gathered there
    generated: set[int] = field(default_factory=set)  # nodes whose result is made sharded from whole arguments
    conflicts: list[Conflict] = field(default_factory=list)
    passes: tuple[Pass, ...] = ()  # how they were found

    def of(self, value: Value) -> Atoms:
        """Returns the atoms that a value is sharded on."""
        return self.shard.get(value.id, NONE)


@dataclass(frozen=True, slots=True)
class Pass:
    """One pass over a graph, and what it was made with."""

    gathers: Mapping[SlotKey, Atoms]
    whole: frozenset[int]
    once: frozenset[int]
    labels: Labels


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
        self.failed: dict[Hashable, Labels] = {}  # what it gave of trials in conflict, unfinished
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
        self.exits: dict[SlotKey, list[int]] = {}  # what a module returns at a path → its EXITs
        for node in self.graph.nodes:
            if node.op is Pseudo.EXIT and node.slot is not None:
                self.exits.setdefault((Pseudo.EXIT, *node.slot), []).append(node.index)
        asked, weights = asked_sizes(axes), weight_axes(axes, self.activations)
        self.sure = Sure(axes, asked, self.made, self.leaves)
        long = free_lengths(axes, asked, weights, self.activations)
        kept = kept_lengths(axes)
        self.varying = varying(axes, asked, given_axes(axes), weights, long, kept)
        self._mixed(long, kept)
        self._meeting: dict[Atom, list[Node]] | None = None

    def _mixed(self, long: Atoms, kept: Mapping[Atom, Atom]) -> None:
        """Blocks the axes that views put together with lengths otherwise in other calls."""
        found = regrouped(self.axes, self.leaves, self.of_parameters, self.activations, long, self.sure, kept)
        for index, atoms in found.items():
            node = self.graph.nodes[index]
            reason = f"{node.opname} would put it together with a length: for other lengths than the traced ones it takes other elements"
            self.blocked[index].append((Blocked(node.args[0].id, tuple(atoms), reason), atoms))

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

    def atoms(self, dim: Sequence[Atom]) -> Atoms:
        """Returns the leaf atoms of a dim, those inside concatenations included."""
        key = tuple(a.id for a in dim)
        if key not in self._cache:
            self._cache[key] = frozenset(leaf_atoms(dim))
        return self._cache[key]
