"""Reduces the partial sums of several modules that meet in one sum together, at the exit of the last module.

A block with a parallel residual adds the results of two row-parallel regions, `y = x + a(h) + b(h)`, in its own forward, where no
conversion reaches the sum without an intervention at a call site. But

    Σ_r a_r + Σ_r b_r  =  0 + Σ_r (a_r + b_r)

so `a` holds its partial sum and returns zeros, and `b`, which runs later, all-reduces both. The sum is the same to the last place
(0 + v = v), and so is its gradient, which reaches every summand whole. Code that reads `a` or `b` by itself gets another number, so

- each result has one use, which adds it with coefficient 1 to something, and so on to the sum where all meet (`_follow`);
- this holds for every traced call of the modules, training included, in the same order in one call of a common parent (`_joint`).

Where results meet in a sum and one of these fails, a note says which (`_notes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import pairwise
from math import prod

from autotp.axes.operators.table import Is, is_a
from autotp.plan.conversions import Op
from autotp.plan.names import folded
from autotp.planner.keys import AtSlot, Key, slot_key
from autotp.planner.placements import GraphIndex, SlotKey
from autotp.planner.reductions import Moves
from autotp.planner.repeats import within
from autotp.trace.graph import Graph, Node, Pseudo, Value


@dataclass(frozen=True, slots=True)
class Joint:
    """Slots whose partial sums are reduced together, in the order in which they run, and the module in whose call they do."""

    parent: str
    slots: tuple[SlotKey, ...]


@dataclass(frozen=True, slots=True)
class _Trail:
    """The way that a result goes unchanged but for additions: the last value, and why no further."""

    exit: Node
    last: Value
    why: str


def conversions_of(joints: Iterable[Joint], key: Key) -> tuple[Op, ...]:
    """Returns the conversions that realise the reduction at a key."""
    for joint in joints:
        for slot in joint.slots:
            if key == AtSlot(slot):
                return (Op.JOIN, Op.REDUCE) if slot == joint.slots[-1] else (Op.HOLD,)
    return (Op.REDUCE,)


def members(joints: Iterable[Joint]) -> Mapping[str, tuple[tuple[str, ...], ...]]:
    """Returns parent → the paths of its joint modules, relative to it."""
    out: dict[str, tuple[tuple[str, ...], ...]] = {}
    for joint in joints:
        start = len(joint.parent) + 1 if joint.parent else 0
        out[joint.parent] = (*out.get(joint.parent, ()), tuple(path[start:] for _, path, _ in joint.slots))
    return out


def find_joints(space: GraphIndex, moves: Moves) -> tuple[tuple[Joint, ...], tuple[str, ...]]:
    """Returns the reductions that become one, and notes about those that meet in a sum and stay apart."""
    reduced = {key.slot for key in moves.reduces - moves.copies if isinstance(key, AtSlot) and key.slot[1] not in space.apart}
    exits = [n for n in space.graph.nodes if n.op is Pseudo.EXIT and slot_key(n) in reduced]
    returned = {v.id for result in space.graph.results for _, v in result.leaves if isinstance(v, Value)}
    returned |= {v.id for values in space.graph.left.values() for v in values}
    trails = {n.index: _follow(space, n, returned) for n in exits}
    met: dict[int, list[Node]] = {}
    for n in exits:
        met.setdefault(trails[n.index].last.id, []).append(n)
    group_of = {n.index: group for group in met.values() for n in group}
    calls: dict[SlotKey, list[list[Node]]] = {}
    for n in exits:
        calls.setdefault(_slot(n), []).append(group_of[n.index])
    joints: dict[tuple[SlotKey, ...], Joint] = {}
    refused: dict[SlotKey, str] = {}
    for slot, groups in calls.items():
        if any(len(group) > 1 for group in groups):
            found = _joint(space.graph, groups, calls)
            if isinstance(found, Joint):
                joints[found.slots] = found
            else:
                refused[slot] = found
    joined = {slot for joint in joints.values() for slot in joint.slots}
    apart = [n for n in exits if _slot(n) not in joined]
    return tuple(joints.values()), _notes(space, apart, trails, refused)


def _slot(node: Node) -> SlotKey:
    slot = slot_key(node)
    assert slot is not None
    return slot


def _follow(space: GraphIndex, exit: Node, returned: set[int]) -> _Trail:
    """Follow a result while it is used once, and there added with coefficient 1 or handed on as it is."""
    (value,) = exit.outputs
    while True:
        users = [space.graph.nodes[i] for i in space.users.get(value.id, ())]
        why = f"is used {len(users)} times" if len(users) > 1 else "is a result of the model" if value.id in returned else ""
        if not why and users:
            why = _changed(users[0], value)
        if why or not users:
            return _Trail(exit, value, why)
        (value,) = users[0].outputs


def _changed(node: Node, value: Value) -> str:
    """Says how a node changes `value` other than by an addition; "" where it does not."""
    if sum(v is value for v in node.inputs()) > 1:
        return f"is used twice in {node.opname}"
    if len(node.outputs) != 1 or _form(node.outputs[0]) != _form(value):
        return f"changes its form in {node.opname}"
    if is_a(node, Is.SUM | Is.DIFFERENCE):
        if node.outputs[0].shape != value.shape:
            return f"is broadcast in {node.opname}"
        scale = node.kwargs.get("alpha", 1) * (1 if is_a(node, Is.SUM) else -1)
        return "" if node.args[0] is value or scale == 1 else f"is multiplied by {scale} in the sum"
    if is_a(node, Is.DROPOUT):  # in eval mode too: in training it would change the value
        return "" if node.args[1] == 0 else f"passes a dropout with p = {node.args[1]}"
    return "" if is_a(node, Is.IDENTITY) and node.args[0] is value else f"passes {node.opname}"


def _form(value: Value) -> tuple[object, ...]:
    return prod(value.shape), value.dtype


def _joint(graph: Graph, groups: Sequence[Sequence[Node]], calls: Mapping[SlotKey, Sequence[Sequence[Node]]]) -> Joint | str:
    """The joint reduction of slots whose calls always meet as `groups` say; otherwise the reason why there is none."""
    slots = tuple(_slot(n) for n in groups[0])
    if any(tuple(_slot(n) for n in group) != slots for slot in slots for group in calls[slot]):
        return "not in every call"
    if len({path for _, path, _ in slots}) < len(slots):
        return "one module returns several of the summands"
    ordered = sorted(groups, key=lambda group: group[0].index)
    if any(a[-1].index > b[0].index for a, b in pairwise(ordered)):
        return "its calls are interleaved"
    parents = {_common_call(graph, [n.frame for n in group]) for group in groups}
    parent = next(iter(parents))
    if len(parents) > 1 or parent is None or any(parent and not path.startswith(parent + ".") for _, path, _ in slots):
        return "no module contains the summands in each call"
    for template in set(graph.repeats.values()):
        inside = [within(path, template) for _, path, _ in slots]
        if any(inside) and not within(parent, template):
            return "the summands are in repeated blocks of their own"
    if not any(result.training for result in graph.results):
        return "the path in training mode was not traced"
    return Joint(parent, slots)


def _common_call(graph: Graph, frames: Iterable[int]) -> str | None:
    """The module of the innermost call that contains all `frames`; None where only the caller of the model does."""
    chains = []
    for frame in frames:
        chain = [frame]
        while chain[-1] in graph.calls:
            chain.append(graph.calls[chain[-1]][1])
        chains.append(chain)
    common = next((f for f in chains[0] if all(f in chain for chain in chains[1:])), 0)
    return graph.calls[common][0] if common in graph.calls else None


# what stays apart -----------------------------------------------------------------------------------------------------------------


def _notes(space: GraphIndex, exits: Sequence[Node], trails: Mapping[int, _Trail], refused: Mapping[SlotKey, str]) -> tuple[str, ...]:
    """Makes one note for each pair of neighbours in one sum. A node that changes a result explains more than a difference between calls."""
    found: dict[str, str] = {}
    for a, b in pairwise(exits):
        if _slot(a) == _slot(b) or b.outputs[0].id in _reached(space, a, b.index)[0]:
            continue
        sums = _sums(space, a, b)
        if not sums:
            continue
        first, last = trails[a.index], trails[b.index]
        both = f"{_name(a)} and {_name(b)} meet in a sum but are all-reduced one by one: "
        if first.last is last.last:
            found.setdefault(both, refused.get(_slot(a), ""))
        else:
            guilty = next((t for t in (first, last) if t.last.id not in sums), first)
            found[both] = f"the result of {_name(guilty.exit)} {guilty.why}"
    return tuple(both + why for both, why in found.items())


def _name(exit: Node) -> str:
    return folded(_slot(exit)[1])


def _reached(space: GraphIndex, exit: Node, stop: int) -> tuple[set[int], set[int]]:
    """(values before node `stop` that depend on a result, those of them that are linear in it)."""
    (value,) = exit.outputs
    every, linear = {value.id}, {value.id}
    queue = list(space.users.get(value.id, ()))
    seen = set(queue)
    while queue:
        index = heappop(queue)
        if index > stop:
            break
        node = space.graph.nodes[index]
        hit = {v.id for v in space.inputs[index] if v.id in every}
        passes = hit <= linear and (isinstance(node.op, Pseudo) or any(hit <= group for group in space.axes.meanings[index].linear))
        for o in node.outputs:
            every.add(o.id)
            if passes:
                linear.add(o.id)
            for user in space.users.get(o.id, ()):
                if user not in seen:
                    seen.add(user)
                    heappush(queue, user)
    return every, linear


def _sums(space: GraphIndex, a: Node, b: Node) -> set[int]:
    """Values that are linear in the results of both exits, from a sum of the two on."""
    stop = next((result.stop for result in space.graph.results if result.stop > b.index), len(space.graph.nodes))
    (left, of_a), (right, of_b) = _reached(space, a, stop), _reached(space, b, stop)
    for index in range(b.index, stop):
        apart = [{v.id for v in space.inputs[index]} & (x - y) for x, y in ((of_a, right), (of_b, left))]
        if all(apart) and any(set().union(*apart) <= group for group in space.axes.meanings[index].linear):
            return of_a & of_b
    return set()
