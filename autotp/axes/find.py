"""The table of rules, by operator name, and the fallback for operators without one."""

from __future__ import annotations

from typing import Any

from autotp.axes.analysis import Axes, Context, analyse, is_pointwise
from autotp.axes.operators import attention, constructors, elementwise, indexing, norms, products, reductions, shapes, slicing
from autotp.axes.operators.elementwise import pointwise
from autotp.axes.operators.table import RULES
from autotp.trace.graph import Graph, Node

#: Importing a room of rules puts them into the table.
ROOMS = (attention, constructors, elementwise, indexing, norms, products, reductions, shapes, slicing)


def keep(op: Any) -> bool:
    """True for operators that have a rule and must not be decomposed."""
    return op._schema.name.rsplit("::", 1)[-1] in RULES or is_pointwise(op)


def fallback(context: Context, node: Node) -> None:
    """Elementwise operators run in parallel; anything else blocks what it touches."""
    if is_pointwise(node.op):
        pointwise(context, node)
    else:
        context.opaque()


def find_axes(graph: Graph) -> Axes:
    """The axes of a graph."""
    return analyse(graph, RULES, fallback)
