"""The collectives of a plan, with the elements that each moves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from autotp.plan.cost import summed
from autotp.plan.spec import DistributedForm, ModulePlan, Op, ParamPlan, Traffic
from autotp.planner.choice import Choice
from autotp.planner.keys import AtSlot, key_of
from autotp.planner.placements import GraphIndex
from autotp.planner.reductions import Moves
from autotp.planner.repeats import block_of, traced
from autotp.trace.graph import Node, Origin, Pseudo, Value


def traffic(
    space: GraphIndex, choice: Choice, moves: Moves, modules: tuple[ModulePlan, ...], params: Mapping[str, ParamPlan]
) -> tuple[Traffic, ...]:
    """The collectives of the first path's forward and of its backward. What enters regions from one tensor is reduced once."""
    sources = _Sources(space, modules)
    width: dict[tuple[str, str], int] = {}
    first = space.graph.results[0].stop if space.graph.results else len(space.graph.nodes)
    for node in space.graph.nodes[:first]:
        if node.op in (Pseudo.ENTER, Pseudo.EXIT) and node.slot is not None:
            width.setdefault(_crossing(node), _per_token(node.outputs[0]))
    out: list[Traffic] = []
    inside = _site_traffic(space, choice, moves, sources)
    shared: set[tuple[str, int]] = set()
    again = {(path, p) for (path, where), members in space.graph.members.items() for p in members if p != where}
    for m in modules:
        path, instance = traced(m.path, space.graph.repeats), block_of(m.path, space.graph.repeats) or ""
        found: list[tuple[Traffic, int | None]] = []
        for kind, slots in (("enter", m.inputs), ("exit", m.outputs)):
            for slot in slots:
                if kind == "enter" and (path, slot.path) in again:
                    continue  # the same tensor as another argument
                crossed = (kind, ".".join(map(str, (path, *(0 if step == "*" else step for step in slot.path)))))
                if crossed not in width:
                    continue  # what other calls ask for alone (attention weights)
                size = width[crossed]
                for c in slot.conversions:
                    if c.op is Op.REDUCE:
                        found.append((Traffic(m.path, "all_reduce", "forward", size), None))
                    elif c.op is Op.GATHER:
                        found.append((Traffic(m.path, "all_gather", "forward", size), None))
                    elif c.op is Op.COPY:
                        found.append((Traffic(m.path, "all_reduce", "backward", size), sources.entering.get(crossed)))
        for traffic, source in [*found, *((replace(t, module=m.path), source) for t, source in inside.get(path, ()))]:
            if source is not None:
                if (instance, source) in shared:
                    continue
                shared.add((instance, source))
            out.append(traffic)
    for m in modules:
        for use in m.uses:
            name = f"{use.owner}.{use.name}" if use.owner else use.name
            elements = summed(use.grad, params.get(traced(name, space.graph.repeats)))
            if elements:
                out.append(Traffic(m.path, "all_reduce", "backward", 0, elements))
    return tuple(out)


def _crossing(node: Node) -> tuple[str, str]:
    assert node.slot is not None and isinstance(node.op, Pseudo)
    return node.op.value, ".".join(map(str, (node.slot[0], *node.slot[1])))


class _Sources:
    """Which tensor a value is at run time: module boundaries without a conversion hand the same object on.

    Copies of one tensor are one copy (`autotp.rewrite.collectives.copy_cache`), but for arguments of the model, which are leaves.
    """

    def __init__(self, space: GraphIndex, modules: tuple[ModulePlan, ...]) -> None:
        self._made = {o.id: n for n in space.graph.nodes for o in n.outputs}
        self._converted = {
            (kind, ".".join(map(str, (m.path, *s.path))))
            for m in modules
            for kind, slots in (("enter", m.inputs), ("exit", m.outputs))
            for s in slots
        }
        self.entering: dict[tuple[str, str], int | None] = {}
        for node in space.graph.nodes:
            if node.op is Pseudo.ENTER and node.slot is not None and isinstance(node.args[0], Value):
                self.entering.setdefault(_crossing(node), self.of(node.args[0]))

    def of(self, value: Value) -> int | None:
        """The id of the value that was made first of those that are one tensor; None for what is not shared."""
        while (node := self._made.get(value.id)) is not None and node.op in (Pseudo.ENTER, Pseudo.EXIT) and node.slot is not None:
            if _crossing(node) in self._converted or not isinstance(node.args[0], Value):
                break
            value = node.args[0]
        return None if value.origin is Origin.INPUT else value.id


def _site_traffic(space: GraphIndex, choice: Choice, moves: Moves, sources: _Sources) -> dict[str, list[tuple[Traffic, int | None]]]:
    """Collectives at call sites, by traced module: reductions and copies of single values (and of what), statistics of norms."""
    first = space.graph.results[0].stop if space.graph.results else len(space.graph.nodes)
    out: dict[str, list[tuple[Traffic, int | None]]] = {}

    def add(node: Node, when: str, width: int, source: int | None = None) -> None:
        if node.index < first:
            out.setdefault(node.module, []).append((Traffic(node.module, "all_reduce", when, width), source))

    for keys, when in ((moves.reduces, "forward"), (moves.copies, "backward")):
        for node in space.graph.nodes[:first]:
            for i, o in enumerate(node.outputs):
                key = key_of(space, node, i)
                if key in keys and not isinstance(key, AtSlot):
                    add(node, when, _per_token(o))
    for index, number in sorted(moves.group_edges):
        value = next(v for v in space.inputs[index] if v.id == number)
        add(space.graph.nodes[index], "backward", _per_token(value), sources.of(value))
    for index, form in sorted(choice.labels.distributed.items()):
        node = space.graph.nodes[index]
        if any(c.whole for c, _ in space.contracts[index]):
            for when in ("forward", "backward") * (2 if form is DistributedForm.LAYER_NORM else 1):  # a mean, and a variance
                add(node, when, 1)
    return out


def _per_token(value: Value) -> int:
    return prod(value.shape[2:]) if len(value.shape) > 2 else (value.shape[-1] if value.shape else 1)
