"""Follows constants that are filled with one number.

A value filled with one number may be cut or summed freely: zeros are whole and a partial sum at once. The argument of a template
stands for that of every block alike to it. So a number inside counts only where all of these blocks get it: the first block of a
decoder may start from zeros, and the next ones not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autotp.trace.graph import Graph, Node, Pseudo

#: Operators whose result is one number, by name.
FILLS = {"zeros": 0.0, "ones": 1.0, "zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}
#: Operators whose result is the number at this place among their arguments.
FILL_AT = {"full": 1, "full_like": 1, "new_full": 2, "fill_": 1}
#: Operators that keep the number of their first argument.
KEEPING = frozenset(("to", "clone", "contiguous", "expand", "view", "reshape", "detach", "alias", "unsqueeze", "lift_fresh"))


def filled(node: Node, fills: Mapping[int, float]) -> float | None:
    """Returns the number that the results of `node` are filled with, if those among its arguments are filled as `fills` say."""
    name = node.opname
    number = FILLS.get(name)
    if number is None and name in FILL_AT:
        at = FILL_AT[name]
        raw = node.args[at] if at < len(node.args) else None
        number = float(raw) if isinstance(raw, (int, float)) else None
    if number is None and name in KEEPING:
        source = next(node.inputs(), None)
        number = fills.get(source.id) if source is not None else None
    return number


def of_every_block(graph: Graph) -> Graph:
    """Returns the graph without the fills inside of templates that a block alike does not get too."""
    lost: set[int] = set()
    while True:
        differing = {
            (str(node.slot[1][0]), there.id)
            for node in graph.nodes
            if node.op is Pseudo.REPEAT and node.slot is not None
            for here, there in zip(*node.args, strict=True)
            if there.id in graph.fills and (here.id in lost or graph.fills.get(here.id) != graph.fills[there.id])
        }
        before = len(lost)
        for node in graph.nodes:
            if _takes(node, differing) or (next((v.id in lost for v in node.inputs()), False) and _passes(node)):
                lost.update(o.id for o in node.outputs if o.id in graph.fills)
        if len(lost) == before:
            return replace(graph, fills={key: number for key, number in graph.fills.items() if key not in lost}) if lost else graph


def _takes(node: Node, differing: set[tuple[str, int]]) -> bool:
    return node.op is Pseudo.ENTER and node.slot is not None and (node.slot[0], node.args[0].id) in differing


def _passes(node: Node) -> bool:
    return node.op in (Pseudo.ENTER, Pseudo.EXIT) or node.opname in KEEPING
