"""Finds dims of arguments that have to stay of size 1: a mask of one head for all, a gate of one number for each token.

A dim of size 1 has no axis. Where it meets a dim that is cut, it stands for each rank's part. With another size it would be whole, and
would not fit the part, or would stretch a part of one.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

import torch

from autotp.axes.operators.table import Is, is_a
from autotp.planner.placements import GraphIndex, Labels
from autotp.trace.graph import Node, Origin, Pseudo, Value

#: Path of an argument of the model → its dims, counted from the last.
Ones = tuple[tuple[tuple[str | int, ...], tuple[int, ...]], ...]
_RESHAPING = frozenset(("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten"))


def find_ones(space: GraphIndex, labels: Labels) -> Ones:
    """Returns the dims of the model's arguments that no call may make longer than 1."""
    asked: dict[int, set[int]] = {}
    found: dict[tuple[str | int, ...], set[int]] = {}
    longer: dict[tuple[str | int, ...], set[int]] = {}  # in some call
    for node in reversed(space.graph.nodes):
        given = [v for v in space.inputs[node.index] if v.origin is Origin.INPUT or v.id in space.activations]
        for out in node.outputs:
            cut = labels.of(out)
            met = {d for d in range(-len(out.shape), 0) if out.shape[d] > 1 and cut & space.leaves[out.id][d]} if cut else set()
            for v in given:
                if _stretched(node, v, out) and (v.dtype.is_floating_point or v.dtype is torch.bool):  # ids name rows
                    asked.setdefault(v.id, set()).update(d for d in met if -d <= len(v.shape) and v.shape[d] == 1)
                for d in asked.get(out.id, ()):
                    asked.setdefault(v.id, set()).update(_before(node, v, out, d))
        if node.op is Pseudo.ENTER and node.slot is not None and node.slot[0] == "":
            for v in node.inputs():
                if v.origin is Origin.INPUT:
                    found.setdefault(node.slot[1], set()).update(asked.get(v.id, ()))
                    longer.setdefault(node.slot[1], set()).update(d for d in range(-len(v.shape), 0) if v.shape[d] != 1)
    kept = {path: tuple(sorted(dims - longer[path])) for path, dims in sorted(found.items(), key=repr)}
    return tuple((path, dims) for path, dims in kept.items() if dims)


def _before(node: Node, v: Value, out: Value, dim: int) -> Iterator[int]:
    """Yields the dims of size 1 of an argument of a node that a dim of size 1 of its result comes from."""
    if node.opname in _RESHAPING:
        ahead = prod(out.shape[:dim])
        yield from (d for d in range(-len(v.shape), 0) if v.shape[d] == 1 and prod(v.shape[:d]) == ahead)
    elif node.opname in ("transpose", "permute", "t"):
        dims = list(range(-len(v.shape), 0))
        if node.opname == "permute":
            order = [d % len(dims) - len(dims) for d in node.args[1]]
        else:
            order = list(dims)
            a, b = node.args[1:3] if node.opname == "transpose" else (0, 1)
            order[a], order[b] = order[b], order[a]
        yield order[dim]
    elif -dim <= len(v.shape) and v.shape[dim] == 1 and (_stretched(node, v, out) or len(v.shape) == len(out.shape)):
        yield dim


def _stretched(node: Node, v: Value, out: Value) -> bool:
    """True where an argument of a node is broadcast to its result. Products sum over last dims, which are others."""
    summed = 2 if is_a(node, Is.MATRIX_PRODUCT) or is_a(node, Is.MAKES_SCORES) else 1 if is_a(node, Is.ATTENTION) else 0
    dims = range(-len(v.shape), -summed)
    return len(v.shape) <= len(out.shape) and all(v.shape[d] in (1, out.shape[d]) for d in dims)
