"""Finds dims of arguments that have to stay of size 1: a mask of one head for all, a gate of one number for each token.

A dim of size 1 has no axis. Where it meets a dim that is cut, it stands for each rank's part. With another size it would be whole, and
would not fit the part, or would stretch a part of one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autotp.axes.analysis import is_pointwise
from autotp.axes.operators.products import letters
from autotp.planner.dims_of_one import ones_before, ones_of, stretched
from autotp.planner.placements import GraphIndex, Labels
from autotp.trace.graph import Node, Origin, Pseudo, Value

#: Path of an argument of the model → its dims, counted from the last.
Ones = tuple[tuple[tuple[str | int, ...], tuple[int, ...]], ...]


def find_ones(space: GraphIndex, labels: Labels) -> Ones:
    """Returns the dims of the model's arguments that no call may make longer than 1."""
    asked: dict[int, set[int]] = {}
    found: dict[tuple[str | int, ...], set[int]] = {}
    longer: dict[tuple[str | int, ...], set[int]] = {}  # in some call
    for node in reversed(space.graph.nodes):
        given = [v for v in space.inputs[node.index] if v.origin is Origin.INPUT or v.id in space.activations]
        for v in given:
            dims = set(meets_a_cut(space, labels, node, v))
            for out in node.outputs:
                for d in asked.get(out.id, ()):
                    dims.update(ones_before(space.leaves, node, v, out, d))
            if dims:
                asked.setdefault(v.id, set()).update(dims)
        if node.op is Pseudo.ENTER and node.slot is not None and node.slot[0] == "":
            for v in node.inputs():
                if v.origin is Origin.INPUT:
                    found.setdefault(node.slot[1], set()).update(asked.get(v.id, ()))
                    longer.setdefault(node.slot[1], set()).update(d for d in range(-len(v.shape), 0) if v.shape[d] != 1)
    kept = {path: tuple(sorted(dims - longer[path])) for path, dims in sorted(found.items(), key=repr)}
    return tuple((path, dims) for path, dims in kept.items() if dims)


def meets_a_cut(space: GraphIndex, labels: Labels, node: Node, v: Value) -> Iterator[int]:
    """Yields the dims of size 1 of an argument of a node that are broadcast against a dim that is cut."""
    if node.opname == "einsum":
        terms, _ = letters(node)
        cut = {c for u, term in terms for c, atoms in zip(term, space.leaves[u.id], strict=True) if labels.of(u) & atoms}
        yield from (d for u, term in terms if u is v for d in ones_of(v) if term[d] in cut)
        return
    for out in node.outputs:
        on = labels.of(out)
        if on and stretched(node, v, out) and not _names_rows(node, v):
            yield from (d for d in ones_of(v) if out.shape[d] > 1 and on & space.leaves[out.id][d])


def _names_rows(node: Node, v: Value) -> bool:
    """True for ids, whose dims are not those that they stand beside."""
    return not (v.dtype.is_floating_point or v.dtype is torch.bool or is_pointwise(node.op))
