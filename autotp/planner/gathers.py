"""Decides where a sharded value that the model returns is gathered."""

from __future__ import annotations

from collections.abc import Mapping

from autotp.axes.atoms import Atom
from autotp.axes.operators.table import Is, is_a
from autotp.planner.labelling import label
from autotp.planner.partition import Atoms, Partition, Partitions
from autotp.planner.placements import NONE, GraphIndex, Labels, SlotKey
from autotp.planner.refusals import Conflict
from autotp.trace.graph import Node, Pseudo, Value

#: A head's result leaves its module at once; later boundaries are not worth a pass each.
GATHER_TRIES = 4


def gather_slots(space: GraphIndex, atom: Atom, labels: Labels, carriers: list[Value]) -> list[SlotKey]:
    """Returns the EXITs that a value sharded on `atom` leaves through on its way to a result of the model, in order."""
    reaching: set[int] = set()
    for result in space.graph.results:
        reaching |= {v.id for _, v in result.leaves if isinstance(v, Value) and atom in space.carried.get(v.id, NONE)}
    for node in reversed(space.meeting(atom)):
        if any(o.id in reaching for o in node.outputs):
            reaching |= {v.id for v in node.inputs() if atom in labels.of(v)}
    weights = {v.id for v in carriers}
    slots: dict[SlotKey, None] = {}
    for node in space.meeting(atom):
        if node.op is Pseudo.EXIT and node.slot is not None and node.outputs[0].id in reaching:
            (value,) = node.args
            if atom in labels.of(value) and value.id not in weights:
                slots[(Pseudo.EXIT, *node.slot)] = None
    return list(slots)


def head_gather(
    space: GraphIndex,
    cut: Partition,
    wanted: Partitions,
    gathers: Mapping[SlotKey, Atoms],
    whole: frozenset[int],
    labels: Labels,
    carriers: list[Value],
) -> tuple[Mapping[SlotKey, Atoms], Labels] | Conflict:
    """Gathers results on an axis that nothing but a lookup sums over (a vocabulary) where their head returns.

    A gather at the end of the model would be right for the traced calls. But a loss behind a condition that no trace reached
    assumes whole logits. So the head has to be a module that calls no other: nothing follows the product there.
    """
    if not all(is_a(space.graph.nodes[i], Is.LOOKUP) for i in space.summing.get(cut.major, ())) or not returned(space, labels, cut):
        return gathers, labels
    callers = {space.graph.calls.get(caller, ("", 0))[0] for _, caller in space.graph.calls.values()}
    for slot in gather_slots(space, cut.major, labels, carriers):
        if slot[1] and slot[1] not in callers:
            trial = {**gathers, slot: gathers.get(slot, NONE) | cut.atoms}
            again = label(space, wanted, trial, whole, labels, trial=True)
            if not again.conflicts and not returned(space, again, cut):
                return trial, again
    return Conflict(cut.atoms, None, "no module of its own makes this result, and code that was not traced could take a part of it for all")


def returned(space: GraphIndex, labels: Labels, cut: Partition) -> bool:
    """True where a result of the model is sharded on `cut`."""
    return any(isinstance(v, Value) and cut.atoms & labels.of(v) for result in space.graph.results for _, v in result.leaves)


def whole_results(
    space: GraphIndex, wanted: Partitions, gathers: Mapping[SlotKey, Atoms], whole: frozenset[int], labels: Labels, cut: Partition
) -> tuple[Mapping[SlotKey, Atoms], Labels] | Conflict:
    """Returns `gathers` extended so that no result of the model is sharded on `cut`, and the labels then.

    Results are gathered as near as possible to the place where they are made. The code between there and the model's end may have
    branches that no traced call took (a loss behind a flag), and methods of the model may be called without it.
    """
    if not returned(space, labels, cut):
        return gathers, labels
    conflict = Conflict(cut.atoms, None, "the sharded value is returned in a form that cannot be gathered")
    for nodes in _exits_to_results(space, labels, cut):
        trial = dict(gathers)
        for node in nodes:
            assert node.slot is not None
            key: SlotKey = (Pseudo.EXIT, *node.slot)
            trial[key] = trial.get(key, NONE) | cut.atoms
        again = label(space, wanted, trial, whole, labels, trial=True)
        if not again.conflicts and not returned(space, again, cut):
            return trial, again
        conflict = again.conflicts[0] if again.conflicts else conflict
    return conflict


def _exits_to_results(space: GraphIndex, labels: Labels, cut: Partition) -> list[list[Node]]:
    """Returns sets of EXITs that everything sharded on `cut` passes on its way to a result of the model, the innermost set first.

    There are at most `GATHER_TRIES` of them, the outermost one among these.

    A set with an EXIT whose value nothing uses in some call (attention weights, most of the time) is left out: that call would
    gather in vain.
    """
    leaves = {v.id: v for result in space.graph.results for _, v in result.leaves if isinstance(v, Value) and cut.atoms & labels.of(v)}
    results = {v.id for result in space.graph.results for _, v in result.leaves if isinstance(v, Value)}
    unused = {
        node.slot
        for node in space.graph.nodes
        if node.op is Pseudo.EXIT
        and labels.of(node.outputs[0])
        and node.outputs[0].id not in results
        and not space.users.get(node.outputs[0].id)
    }
    level = [space.made[key] for key in leaves if key in space.made]
    if len(level) < len(leaves):
        return []
    sets: list[list[Node]] = []
    while True:
        if all(node.op is Pseudo.EXIT for node in level) and not any(node.slot in unused for node in level):
            sets.append(level)
        inner = {n.index: n for node in level for n in (_exits_before(space, labels, cut, node) or [node])}
        if set(inner) == {node.index for node in level}:
            sets.reverse()
            return [*sets[: GATHER_TRIES - 1], *sets[GATHER_TRIES - 1 :][-1:]]  # hidden states of inner layers leave at the last one alone
        level = list(inner.values())


def _exits_before(space: GraphIndex, labels: Labels, cut: Partition, node: Node) -> list[Node]:
    """Returns the EXITs that values sharded on `cut` passed last on their way to `node`; none where some of them passed none."""
    found: dict[int, Node] = {}
    seen: set[int] = set()
    queue = [node]
    while queue:
        item = queue.pop()
        sharded = [v for v in item.inputs() if cut.atoms & labels.of(v) and space.parameter_of(v.id) is None]
        if not sharded:
            return []
        for value in sharded:
            made = space.made[value.id]
            if made.op is Pseudo.EXIT:
                found[made.index] = made
            elif made.index not in seen:
                seen.add(made.index)
                queue.append(made)
    return list(found.values())
