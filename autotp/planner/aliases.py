"""Finds which values of a trace are one tensor, or parts of one, and which nodes change them in place.

Each value points to the one whose storage it was made of. A view points to its source, the result of an in-place operator to the
argument that it changed, and both sides of a module boundary to each other. At the end of such a path is the value that the storage
was made for. A conversion makes a new tensor, so a change after it does not reach the tensor before it. And a tensor that outlives
a call (a buffer, an argument of the model, a constant) must be the same on every rank when the call ends.
"""

from __future__ import annotations

from autotp.axes.operators.table import Is, is_a
from autotp.planner.calls import in_place, writes
from autotp.trace.graph import Graph, Node, Origin, Pseudo, Value


class Storage:
    """Knows the paths of all values, and the nodes that change something in place."""

    def __init__(self, graph: Graph) -> None:
        self._from: dict[int, Value] = {}
        self.changes: list[tuple[Node, Value]] = []
        self.updates: list[Node] = []  # WRITE nodes: something else that shares storage with a change is used later
        for node in graph.nodes:
            changed = writes(node)
            self.changes += [(node, v) for v in changed]
            if node.op is Pseudo.WRITE:
                self.updates.append(node)
            source = _source(node, changed)
            if source is not None:
                self._from |= {o.id: source for o in node.outputs if o.dtype is source.dtype}
        self.changed = {v.id for _, target in self.changes for v in self.path(target)}

    def path(self, value: Value) -> list[Value]:
        """Returns `value`, the value that it is made of, and so on to the value that the storage was made for."""
        found = [value]
        while (source := self._from.get(found[-1].id)) is not None:
            found.append(source)
        return found

    def apart(self, update: Node) -> list[Value]:
        """Returns the values between the alias that a WRITE node gives a new version and the tensor that was changed, on both ways."""
        alias, new = update.args
        ways = self.path(alias), self.path(new)
        common = {v.id for v in ways[0]} & {v.id for v in ways[1]}
        return [v for way in ways for v in way if v.id not in common]


def outlives(value: Value) -> bool:
    """True for a value that exists before and after a call of the model."""
    return value.origin is not Origin.NODE


def _source(node: Node, changed: tuple[Value, ...]) -> Value | None:
    """The argument whose storage the results of a node are in."""
    if node.op in (Pseudo.ENTER, Pseudo.EXIT, Pseudo.WRITE):
        return node.args[0]  # type: ignore[no-any-return]
    if isinstance(node.op, Pseudo) or is_a(node, Is.FRESH):
        return None
    if changed:
        return changed[0] if in_place(node) else None
    if not is_a(node, Is.DROPOUT) and not any(r.alias_info is not None for r in node.op._schema.returns):
        return None
    return next(node.inputs(), None)
