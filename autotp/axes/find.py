"""Finds the rule of each node, and the axes that the rules of a graph give together."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from autotp.axes import operators
from autotp.axes.analysis import Axes, Context, Rule, analyse, is_pointwise
from autotp.axes.operators.elementwise import pointwise
from autotp.axes.operators.table import OPERATORS, Is, entry, is_a
from autotp.trace.graph import Graph, Node, Pseudo

for _room in pkgutil.iter_modules(operators.__path__, operators.__name__ + "."):  # importing a room of rules enters them into the table
    import_module(_room.name)


def keep(op: Any) -> bool:
    """True for operators that have a rule and must not be decomposed."""
    return op._schema.name.rsplit("::", 1)[-1] in OPERATORS or is_pointwise(op)


def find_axes(graph: Graph, ends: Mapping[str, int] = MappingProxyType({})) -> Axes:
    """Finds the axes of a graph. `ends`: path of a module → the dim of its result, counted from the last, whose axis ends there."""
    return analyse(graph, rule_of, ends)


def rule_of(node: Node) -> Rule:
    """Returns the rule of a node's operator. Elementwise operators without one run in parallel; any other forbids to shard its
    tensors.
    """
    if not (isinstance(node.op, Pseudo) or is_a(node, Is.MAY_BE_EMPTY) or is_pointwise(node.op)) and any(
        0 in v.shape for v in node.outputs
    ):
        return _empty
    found = entry(node)
    if found is not None:
        return found.rule
    return pointwise if is_pointwise(node.op) and node.outputs else _unknown  # torch calls `equal` pointwise: one answer for all elements


def _empty(context: Context, node: Node) -> None:
    context.opaque("nothing is computed on empty tensors")


def _unknown(context: Context, node: Node) -> None:
    context.opaque()
