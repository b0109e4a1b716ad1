"""The table of rules, by operator name, and the fallback for operators without one."""

from __future__ import annotations

from typing import Any

from autotp.axes import rules_basic, rules_index, rules_math
from autotp.axes.analysis import Axes, Context, Rule, analyse, is_pointwise
from autotp.axes.rules_basic import pointwise
from autotp.trace.graph import Graph, Node

RULES: dict[str, Rule] = {**rules_basic.RULES}
assert rules_math and rules_index  # importing them registers their rules in the same table
RULES.update(rules_basic.RULES)


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
