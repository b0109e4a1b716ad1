"""Finds the widths of attention heads, which are not sharded."""

from __future__ import annotations

from autotp.axes.atoms import Atom
from autotp.axes.operators.table import Is, is_a
from autotp.planner.placements import NONE, GraphIndex
from autotp.trace.graph import Node, Value


def head_widths(space: GraphIndex) -> set[Atom]:
    """Returns the atoms inside of one attention head: the dim that a query·key product sums over, and the last dim of the values."""
    found: set[Atom] = set()
    for node in space.graph.nodes:
        if is_a(node, Is.ATTENTION):
            found |= space.leaves[node.args[2].id][-1] | space.leaves[node.args[0].id][-1]
        elif is_a(node, Is.SOFTMAX):
            scores = _source(space, node.args[0])
            if scores is not None and len(scores.outputs[0].shape) >= 3:
                found |= frozenset().union(*(atoms for _, atoms in space.contracts[scores.index]), NONE)
        elif is_a(node, Is.MATRIX_PRODUCT) and len(node.args[0].shape) >= 3:
            source = _source(space, node.args[0], Is.SOFTMAX)
            if source is not None:
                found |= space.leaves[node.args[1].id][-1]
    return found


def _source(space: GraphIndex, value: Value, traits: Is = Is.MAKES_SCORES) -> Node | None:
    """Returns the operator with one of `traits` that a value comes from through operators that scores pass; None for a product with
    a parameter.
    """
    for _ in range(24):
        node = space.made.get(value.id)
        if node is None:
            return None
        if is_a(node, traits):
            return None if any(space.parameter_of(v.id) is not None for v in node.inputs()) else node
        if not is_a(node, Is.PASSES_SCORES):
            return None
        value = next(node.inputs())
    return None
