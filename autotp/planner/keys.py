"""Names the places where a conversion can stand."""

from __future__ import annotations

from dataclasses import dataclass

from autotp.planner.placements import GraphIndex, SlotKey
from autotp.trace.graph import Node, Place, Pseudo


@dataclass(frozen=True, slots=True)
class AtSlot:
    """A conversion at a module boundary. A hook there treats every call of its module alike."""

    slot: SlotKey


@dataclass(frozen=True, slots=True)
class AtPlace:
    """A conversion of result number `result` of the operator that a place in the code calls.

    An intervention treats every call from there alike.
    """

    module: str
    place: Place | None
    opname: str
    result: int


@dataclass(frozen=True, slots=True)
class AtValue:
    """One value, which no conversion in the code reaches."""

    value: int


Key = AtSlot | AtPlace | AtValue


def slot_key(node: Node) -> SlotKey | None:
    """Returns the boundary slot that an ENTER or EXIT node crosses."""
    if node.op in (Pseudo.ENTER, Pseudo.EXIT) and node.slot is not None:
        return (node.op, *node.slot)
    return None


class Keys:
    """The keys of all results of a graph. of: value → its key. at: key → (node, number of the result) of each.

    numbers: value → a number, equal where the keys are.
    """

    def __init__(self, space: GraphIndex) -> None:
        self.of: dict[int, Key] = {}
        self.at: dict[Key, list[tuple[Node, int]]] = {}
        self.numbers: dict[int, int] = {}
        numbers: dict[Key, int] = {}
        for node in space.graph.nodes:
            for i, o in enumerate(node.outputs):
                key = self.of[o.id] = _key_of(space, node, i)
                self.at.setdefault(key, []).append((node, i))
                self.numbers[o.id] = numbers.setdefault(key, len(numbers))


def _key_of(space: GraphIndex, node: Node, index: int) -> Key:
    """Returns the place where a conversion of result `index` of a node stands."""
    slot = slot_key(node)
    if slot is not None:
        return AtSlot(slot)
    if not space.calls.results(node, node.outputs[index]):
        return AtValue(node.outputs[index].id)
    return AtPlace(node.module, node.place, node.opname, index)
