"""Says which dims of size 1 of a node's arguments a dim of size 1 of its result comes from: no axis follows these."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from autotp.axes.analysis import is_pointwise
from autotp.axes.operators.products import letters
from autotp.axes.operators.table import Is, arg, dim_of, is_a
from autotp.planner.partition import Atoms
from autotp.trace.graph import Node, Pseudo, Value

#: Value → the leaf axes of each of its dims.
Leaves = Mapping[int, tuple[Atoms, ...]]
RESHAPING = frozenset(("view", "_unsafe_view", "reshape"))
_SPREADS = Is.MATRIX_PRODUCT | Is.MAKES_SCORES | Is.ATTENTION
_BROADCASTS = frozenset(("expand", "expand_as", "broadcast_to", "broadcast_tensors", "masked_fill", "where"))
_OF_MATRICES = ("t", "mT", "mH", "adjoint", "matrix_H")


def ones_of(v: Value) -> list[int]:
    """Returns the dims of size 1, counted from the last."""
    return [d for d in range(-len(v.shape), 0) if v.shape[d] == 1]


def ones_before(leaves: Leaves, node: Node, v: Value, out: Value, dim: int) -> Iterator[int]:
    """Yields the dims of size 1 of an argument of a node that a dim of size 1 of its result comes from.

    Where it is not known what the node does with dims, these are the dims that lie between the same axes.
    """
    if node.opname == "einsum":
        terms, right = letters(node)
        yield from (d for u, term in terms if u is v for d in ones_of(v) if term[d] == right[dim])
    elif (order := _order(node, v, out)) is not None:
        yield from (d for d in ones_of(v) if d == order[dim])
    elif stretched(node, v, out) or (len(v.shape) == len(out.shape) and node.opname not in RESHAPING):
        yield from (d for d in ones_of(v) if d == dim)
    else:
        common = frozenset().union(*leaves[v.id]) & frozenset().union(*leaves[out.id])
        here, there = ([d for d in ones_of(x) if _ahead(leaves, x, d) & common == _ahead(leaves, out, dim) & common] for x in (v, out))
        yield from here if len(here) != len(there) else (d for d, o in zip(here, there, strict=True) if o == dim)


def is_known(node: Node, v: Value, out: Value) -> bool:
    """True where it is known what a node does with the dims of an argument, which `ones_before` may guess."""
    if node.opname == "einsum" or _order(node, v, out) is not None or isinstance(node.op, Pseudo):
        return True
    spreads = is_pointwise(node.op) or is_a(node, _SPREADS) or node.opname in _BROADCASTS
    return node.opname not in RESHAPING and (len(v.shape) == len(out.shape) or (spreads and stretched(node, v, out)))


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
    gone = arg(node, 1, "dim", 0 if node.opname == "unbind" else None) if node.opname != "flatten" else None
    gone = [gone] if isinstance(gone, int) else gone if isinstance(gone, (list, tuple)) else []
    if more < 0 and len(gone) == -more and all(isinstance(d, int) for d in gone):  # a sum, a mean, one of several rows
        return [d for d in order if d not in [g % rank - rank for g in gone]]
    return None


def new_dims(node: Node, out: Value) -> tuple[int, ...]:
    """Returns the dims of a node's result, counted from the last, that it makes of size 1 whatever its argument is."""
    return (node.args[1] % len(out.shape) - len(out.shape),) if node.opname in ("unsqueeze", "unsqueeze_") else ()


def summed_dims(node: Node) -> set[int]:
    """Returns the dims that a node sums over, or takes a statistic of, and keeps as dims of size 1."""
    gone = arg(node, 1, "dim")
    gone = [gone] if isinstance(gone, int) else gone if isinstance(gone, (list, tuple)) else []
    first = next(node.inputs(), None)
    kept = first is not None and any(a is True for a in (*node.args[2:], node.kwargs.get("keepdim")))
    return {dim_of(d, first) for d in gone if isinstance(d, int)} if kept and first is not None else set()


def _ahead(leaves: Leaves, value: Value, dim: int) -> Atoms:
    return frozenset().union(*leaves[value.id][:dim])


def stretched(node: Node, v: Value, out: Value) -> bool:
    """True where an argument of a node is broadcast to its result. Products sum over last dims, which are others."""
    summed = 2 if is_a(node, Is.MATRIX_PRODUCT) or is_a(node, Is.MAKES_SCORES) else 1 if is_a(node, Is.ATTENTION) else 0
    dims = range(-len(v.shape), -summed)
    return len(v.shape) <= len(out.shape) and all(v.shape[d] in (1, out.shape[d]) for d in dims)
