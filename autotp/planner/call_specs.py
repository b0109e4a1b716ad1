"""Collects the changes that the calls from one place in the code need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from autotp.plan.conversions import Conversion
from autotp.plan.expressions import Expr
from autotp.plan.spec import EVERY, DistributedForm, Site
from autotp.planner.placements import GraphIndex
from autotp.planner.refusals import Refusal
from autotp.trace.graph import Node, Place, Pseudo, outside, values_in


@dataclass
class CallSpec:
    """Changes at one operator call: its ints, its tensors by position, its distributed form and the dim that this crosses.

    sizes, multiples, given, made: as in `Site`.
    """

    ints: list[tuple[int, int, int]] = field(default_factory=list)
    inputs: dict[int, list[Conversion]] = field(default_factory=dict)
    outputs: dict[int, list[Conversion]] = field(default_factory=dict)
    form: DistributedForm | None = None
    over: Expr | None = None
    over_dim: int = -1
    sizes: set[tuple[int, int, int]] = field(default_factory=set)
    multiples: set[tuple[int, int, int]] = field(default_factory=set)
    given: tuple[int, ...] = ()
    made: tuple[int, ...] = ()

    def freeze(self) -> tuple[object, ...]:
        """Returns the fields of a `Site` after its place."""
        return (
            tuple(sorted(set(self.ints))),
            tuple((k, tuple(v)) for k, v in sorted(self.inputs.items())),
            tuple((k, tuple(v)) for k, v in sorted(self.outputs.items())),
            self.form,
            self.over,
            self.over_dim,
            tuple(sorted(self.sizes)),
            tuple(sorted(self.multiples)),
            self.given,
            self.made,
        )


def sites_of(space: GraphIndex, calls: Mapping[int, CallSpec]) -> dict[str, list[Site]]:
    """Returns one site for each place in a module; every call from there must need the same changes, as far as it has the tensors."""
    specs: dict[tuple[str, int], tuple[Node, CallSpec]] = {}
    for index, spec in calls.items():
        node = space.graph.nodes[index]
        _, old = specs.setdefault((node.module, node.call), (node, CallSpec()))
        _merge(space, calls, node, old, spec)
    places: dict[tuple[str, Place], list[tuple[Node, CallSpec]]] = {}
    for (module, _), (node, spec) in specs.items():
        assert node.place is not None
        places.setdefault((module, node.place), []).append((node, spec))
    met = set(specs)
    for node in space.graph.nodes:
        if outside(node):
            continue  # sites are watched in calls of the model only
        if node.place is not None and (found := places.get((node.module, node.place))) and (node.module, node.call) not in met:
            met.add((node.module, node.call))
            found.append((node, CallSpec()))
    out: dict[str, list[Site]] = {}
    for (module, p), found in places.items():
        spec = _of_lists(space, [node for node, _ in found], _common(found))
        out.setdefault(module, []).append(Site(p.file, p.function, p.line, p.offset, *spec.freeze()))  # type: ignore[arg-type]
    return out


def _of_lists(space: GraphIndex, calls: list[Node], spec: CallSpec) -> CallSpec:
    """Returns the changes of calls that take or give a list of tensors for one of any length where all in it are converted alike.

    Where they are not, their positions say nothing in a longer or a shorter list.
    """
    if spec.inputs and any(_takes_a_list(n, len(node.tensors)) for node in calls for n in space.calls.nodes(node)):
        counts = {len(node.tensors) for node in calls}
        alike = _alike(spec.inputs, range(max(counts)))
        spec = replace(spec, given=tuple(sorted(counts))) if alike is None else replace(spec, inputs=alike)
    if spec.outputs and any(_gives_a_list(n) for node in calls for n in space.calls.nodes(node)):
        counts = {len(space.graph.python[node.call].results) for node in calls}
        alike = _alike(spec.outputs, range(max(counts)))
        spec = replace(spec, made=tuple(sorted(counts))) if alike is None else replace(spec, outputs=alike)
    return spec


def _alike(conversions: Mapping[int, list[Conversion]], positions: range) -> dict[int, list[Conversion]] | None:
    """Returns the conversions of several positions as those of all, None where they are not all the same."""
    first = conversions.get(0)
    same = first is not None and len(positions) > 1 and all(conversions.get(i) == first for i in positions)
    return {EVERY: first} if same and first is not None else None


def _takes_a_list(node: Node, count: int) -> bool:
    """True where a list of tensors is all that an operator takes of the `count` tensors of its call (`cat`)."""
    lists = (list(values_in(a)) for a in node.args if isinstance(a, (tuple, list)))
    return any(len(found) == count for found in lists)


def _gives_a_list(node: Node) -> bool:
    return not isinstance(node.op, Pseudo) and any(isinstance(r.type, torch.ListType) for r in node.op._schema.returns)


def _common(calls: list[tuple[Node, CallSpec]]) -> CallSpec:
    """Returns the changes that all calls from one place need. Those of a tensor that a call does not have (a mask) leave it as it is."""
    spec = replace(calls[0][1], inputs={i: conversions for _, each in calls for i, conversions in each.inputs.items()})
    for node, each in calls:
        own = replace(spec, inputs={i: conversions for i, conversions in spec.inputs.items() if i < len(node.tensors)})
        if own.freeze() != each.freeze():
            some = each == CallSpec()
            raise Refusal(
                node,
                "only some of the calls from one place in the code need a conversion"
                if some
                else "calls from one place in the code need different conversions",
            )
    return spec


def _merge(space: GraphIndex, calls: Mapping[int, CallSpec], node: Node, into: CallSpec, spec: CallSpec) -> None:
    """Add the changes that one node needs to those of its Python call; all nodes of the call have the same arguments."""
    nodes = space.calls.nodes(node)
    into.ints += spec.ints
    into.sizes |= spec.sizes
    into.multiples |= spec.multiples
    changed = {*into.ints, *into.multiples}
    if len({position for position, _, _ in changed}) < len(changed):
        raise Refusal(node, "one number of the call would have to become two")
    for i, conversions in spec.inputs.items():
        key = nodes[0].tensors[i]
        others = [calls.get(n.index, CallSpec()).inputs.get(i) for n in nodes if any(v.id == key for v in n.inputs())]
        if any(other != conversions for other in others):
            raise Refusal(node, "operators inside of one call need its argument in different forms")
        into.inputs[i] = conversions
    into.outputs.update(spec.outputs)
    if spec.form is not None:
        into.form, into.over, into.over_dim = spec.form, spec.over, spec.over_dim
