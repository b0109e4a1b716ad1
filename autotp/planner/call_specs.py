"""Collects the changes that the calls from one place in the code need."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from autotp.plan.conversions import Conversion
from autotp.plan.expressions import Expr
from autotp.plan.spec import DistributedForm, Site
from autotp.planner.placements import GraphIndex
from autotp.planner.refusals import Refusal
from autotp.trace.graph import Node, Place, outside


@dataclass
class CallSpec:
    """Changes at one operator call: its ints, its tensors by position, its distributed form and the dim that this crosses.

    sizes, multiples: as in `Site`.
    """

    ints: list[tuple[int, int, int]] = field(default_factory=list)
    inputs: dict[int, list[Conversion]] = field(default_factory=dict)
    outputs: dict[int, list[Conversion]] = field(default_factory=dict)
    form: DistributedForm | None = None
    over: Expr | None = None
    over_dim: int = -1
    sizes: set[tuple[int, int, int]] = field(default_factory=set)
    multiples: set[tuple[int, int, int]] = field(default_factory=set)

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
        out.setdefault(module, []).append(Site(p.file, p.function, p.line, p.offset, *_common(found).freeze()))  # type: ignore[arg-type]
    return out


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
