"""Finds dims of arguments that have to stay of size 1: a mask of one head for all, a gate of one number for each token.

A dim of size 1 has no axis. Where it meets a dim that is cut, it stands for each rank's part. With another size it would be whole, and
would not fit the part, or would stretch a part of one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from autotp.axes.analysis import is_pointwise
from autotp.axes.operators.products import letters
from autotp.axes.operators.table import Is, arg, is_a
from autotp.planner.partition import Atoms
from autotp.planner.placements import GraphIndex, Labels
from autotp.trace.graph import Node, Origin, Pseudo, Value

#: Path of an argument of the model → its dims, counted from the last.
Ones = tuple[tuple[tuple[str | int, ...], tuple[int, ...]], ...]
_RESHAPING = frozenset(("view", "_unsafe_view", "reshape"))
_OF_MATRICES = ("t", "mT", "mH", "adjoint", "matrix_H")


def find_ones(space: GraphIndex, labels: Labels) -> Ones:
    """Returns the dims of the model's arguments that no call may make longer than 1."""
    asked: dict[int, set[int]] = {}
    found: dict[tuple[str | int, ...], set[int]] = {}
    longer: dict[tuple[str | int, ...], set[int]] = {}  # in some call
    for node in reversed(space.graph.nodes):
        given = [v for v in space.inputs[node.index] if v.origin is Origin.INPUT or v.id in space.activations]
        for v in given:
            dims = set(_meets_a_cut(space, labels, node, v))
            for out in node.outputs:
                for d in asked.get(out.id, ()):
                    dims.update(_before(space, node, v, out, d))
            if dims:
                asked.setdefault(v.id, set()).update(dims)
        if node.op is Pseudo.ENTER and node.slot is not None and node.slot[0] == "":
            for v in node.inputs():
                if v.origin is Origin.INPUT:
                    found.setdefault(node.slot[1], set()).update(asked.get(v.id, ()))
                    longer.setdefault(node.slot[1], set()).update(d for d in range(-len(v.shape), 0) if v.shape[d] != 1)
    kept = {path: tuple(sorted(dims - longer[path])) for path, dims in sorted(found.items(), key=repr)}
    return tuple((path, dims) for path, dims in kept.items() if dims)


def _ones_of(v: Value) -> list[int]:
    return [d for d in range(-len(v.shape), 0) if v.shape[d] == 1]


def _meets_a_cut(space: GraphIndex, labels: Labels, node: Node, v: Value) -> Iterator[int]:
    """Yields the dims of size 1 of an argument of a node that are broadcast against a dim that is cut."""
    if node.opname == "einsum":
        terms, _ = letters(node)
        cut = {c for u, term in terms for c, atoms in zip(term, space.leaves[u.id], strict=True) if labels.of(u) & atoms}
        yield from (d for u, term in terms if u is v for d in _ones_of(v) if term[d] in cut)
        return
    for out in node.outputs:
        on = labels.of(out)
        if on and _stretched(node, v, out) and not _names_rows(node, v):
            yield from (d for d in _ones_of(v) if out.shape[d] > 1 and on & space.leaves[out.id][d])


def _before(space: GraphIndex, node: Node, v: Value, out: Value, dim: int) -> Iterator[int]:
    """Yields the dims of size 1 of an argument of a node that a dim of size 1 of its result comes from.

    Where it is not known what the node does with dims, these are the dims that lie between the same axes.
    """
    if node.opname == "einsum":
        terms, right = letters(node)
        yield from (d for u, term in terms if u is v for d in _ones_of(v) if term[d] == right[dim])
    elif (order := _order(node, v, out)) is not None:
        yield from (d for d in _ones_of(v) if d == order[dim])
    elif _stretched(node, v, out) or (len(v.shape) == len(out.shape) and node.opname not in _RESHAPING):
        yield from (d for d in _ones_of(v) if d == dim)
    else:
        common = space.carried[v.id] & space.carried[out.id]
        here, there = ([d for d in _ones_of(x) if _ahead(space, x, d) & common == _ahead(space, out, dim) & common] for x in (v, out))
        yield from here if len(here) != len(there) else (d for d, o in zip(here, there, strict=True) if o == dim)


def _order(node: Node, v: Value, out: Value) -> list[int | None] | None:
    """Returns which dim of its argument each dim of a node's result is, counted from the last, None for a new one. None for other nodes."""
    rank, more = len(v.shape), len(out.shape) - len(v.shape)
    order: list[int | None] = list(range(-rank, 0))
    if node.opname == "permute":
        return [d % rank - rank for d in node.args[1]]
    if node.opname == "numpy_T":
        return order[::-1]
    if node.opname in ("transpose", *_OF_MATRICES) and rank > 1:
        a, b = node.args[1:3] if node.opname == "transpose" else (-2, -1)
        order[a], order[b] = order[b], order[a]
        return order
    if node.opname in ("unsqueeze", "stack"):
        order.insert(arg(node, 1, "dim", 0) % len(out.shape), None)
        return order
    gone = arg(node, 1, "dim", 0 if node.opname == "unbind" else None)
    gone = [gone] if isinstance(gone, int) else gone if isinstance(gone, (list, tuple)) else []
    if more < 0 and len(gone) == -more and all(isinstance(d, int) for d in gone):  # a sum, a mean, one of several rows
        return [d for d in order if d not in [g % rank - rank for g in gone]]
    return None


def _ahead(space: GraphIndex, value: Value, dim: int) -> Atoms:
    return frozenset().union(*space.leaves[value.id][:dim])


def _names_rows(node: Node, v: Value) -> bool:
    """True for ids, whose dims are not those that they stand beside."""
    return not (v.dtype.is_floating_point or v.dtype is torch.bool or is_pointwise(node.op))


def _stretched(node: Node, v: Value, out: Value) -> bool:
    """True where an argument of a node is broadcast to its result. Products sum over last dims, which are others."""
    summed = 2 if is_a(node, Is.MATRIX_PRODUCT) or is_a(node, Is.MAKES_SCORES) else 1 if is_a(node, Is.ATTENTION) else 0
    dims = range(-len(v.shape), -summed)
    return len(v.shape) <= len(out.shape) and all(v.shape[d] in (1, out.shape[d]) for d in dims)
