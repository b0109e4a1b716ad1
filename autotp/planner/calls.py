"""Finds which values a conversion at a call site reaches.

A site handles one call as the code wrote it: its arguments before, its result after. One such call may be several operators
(`cosine_embedding_loss` is a dozen), and values between them are out of reach. So is the result of an operator that changes its
argument in place: the code goes on with the argument.
"""

from __future__ import annotations

from autotp.axes.operators.table import Is, is_a
from autotp.plan.spec import DistributedForm
from autotp.rewrite.operators.distributed import FORMS
from autotp.trace.graph import Graph, Node, Pseudo, Value


class Calls:
    """Groups the nodes of a graph by the Python call that they belong to."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self._nodes: dict[int, list[Node]] = {}
        for node in graph.nodes:
            if node.call >= 0:
                self._nodes.setdefault(node.call, []).append(node)

    def nodes(self, node: Node) -> list[Node]:
        """Returns all nodes of the node's Python call, itself included."""
        return self._nodes.get(node.call, [node])

    def results(self, node: Node, value: Value) -> tuple[int, ...]:
        """Returns the positions of the output `value` among the tensors of the call's result; () where a conversion of it is out of
        reach.
        """
        call = self.graph.python.get(node.call)
        if call is None or node.place is None or isinstance(node.op, Pseudo) or in_place(node):
            return ()
        if any(v.id == value.id for other in self.nodes(node) for v in other.inputs()):
            return ()  # it is used inside of the call as well
        return tuple(i for i, key in enumerate(call.results) if key == value.id)

    def arguments(self, node: Node, value: Value) -> tuple[int, ...]:
        """Returns the positions of `value` among the tensors of the call's arguments; () where it is none of them, or is changed in
        place.
        """
        nodes = self.nodes(node)
        if node.place is None or isinstance(node.op, Pseudo) or any(v.id == value.id for other in nodes for v in writes(other)):
            return ()
        return tuple(i for i, key in enumerate(nodes[0].tensors) if key == value.id)

    def stands_for(self, node: Node, form: DistributedForm) -> bool:
        """True where the node is the only one of its Python call, and `form` can replace the function called."""
        call = self.graph.python.get(node.call)
        return call is not None and not self.graph.sealed(node) and len(self.nodes(node)) == 1 and call.function in FORMS[form].functions


def writes(node: Node) -> tuple[Value, ...]:
    """Returns the arguments that an operator changes in place."""
    if isinstance(node.op, Pseudo):
        return ()
    found: list[Value] = []
    for i, argument in enumerate(node.op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name)
            found += [given] if isinstance(given, Value) else []
    if is_a(node, Is.UPDATES_STATISTICS):
        found += [v for v in node.args[3:5] if isinstance(v, Value)]
    return tuple(found)


def in_place(node: Node) -> bool:
    """True for an operator that returns the argument that it changed."""
    return bool(writes(node)) and not isinstance(node.op, Pseudo) and any(r.alias_info is not None for r in node.op._schema.returns)
