"""Says which dims of size 1 stay of size 1 in other calls than the traced ones: no axis follows these."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from math import prod

from autotp.axes.analysis import Axes
from autotp.axes.operators.table import Is, arg, dim_of, is_a
from autotp.planner.dims_of_one import RESHAPING, Leaves, is_known, new_dims, ones_before, ones_of, summed_dims
from autotp.planner.partition import Atoms
from autotp.planner.varying import Asked, positions, written
from autotp.trace.graph import Node, Origin, Pseudo, Value
from autotp.trace.ints import IntExpr, Literal, SizeRef, leaves, parts

#: Position of the list of sizes among the arguments of operators that have one.
_SIZED = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "view_copy", "expand", "broadcast_to"), 1),
    **dict.fromkeys(("zeros", "ones", "empty", "full"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), 1),
}
_POOLS = ("max_pool", "avg_pool", "lp_pool")


class Sure:
    """Which dims are of size 1 in every call that the guards let pass."""

    def __init__(self, axes: Axes, asked: Sequence[Asked], made: Mapping[int, Node], leaves: Leaves) -> None:
        self.asked = asked
        self.axes, self.graph, self.made, self.leaves = axes, axes.graph, made, leaves
        self.values = {v.id: v for n in self.graph.nodes for v in (*n.inputs(), *n.outputs)}
        self.known: dict[tuple[int, int, bool], bool] = {}
        for node in self.graph.nodes:  # in order: what is asked of a value asks what it is made of
            for out in node.outputs:
                for dim in ones_of(out):
                    self.of(out, dim)

    def of(self, v: Value, dim: int, given: bool = True) -> bool:
        """True for a dim, counted from the last, that stays of size 1. `given`: those of arguments do, where tensors are made of them."""
        key = (v.id, dim, given)
        if key not in self.known:
            self.known[key] = (given and self.of(v, dim, given=False)) or self._of(v, dim, given)
        return self.known[key]

    def _of(self, v: Value, dim: int, given: bool) -> bool:
        node = self.made.get(v.id)
        if node is None:
            return (v.origin is not Origin.CONST or not self.graph.read) and (v.origin is not Origin.INPUT or given)
        at = dim + len(v.shape)
        if not isinstance(node.op, Pseudo):
            if dim in new_dims(node, v) or at in summed_dims(node):  # pooling to one place is such a mean too, for a 1 made of a length
                return not any(e.value == 1 and any(isinstance(leaf, SizeRef) for leaf in leaves(e)) for e in node.ints)
            if node.opname in RESHAPING and not node.ints and node.tensors:  # the sizes are torch's own (`outer`), or those of the tensors
                called = [self.values.get(key) for key in node.tensors]
                return all(u is not None and all(self.of(u, d, given) for d in ones_of(u)) for u in called)
            if (said := self._said(node, at)) is not None:
                return said
            if is_a(node, Is.CUTS) and (cut := self._cut(node, v, dim)) is not None:
                return cut
            if node.opname in ("stack", "cat") and at == dim_of(arg(node, 1, "dim", 0), v):
                return False
            if node.opname in ("arange", "linspace"):
                return any(True for e in node.ints for _ in leaves(e)) and all(map(self._fixed, node.ints))
            channels = 1 - len(node.args[1].shape) if is_a(node, Is.CONVOLUTION) else -1 if node.opname in ("linear", "mm", "addmm") else 0
            if dim == channels:
                return True  # as many as a parameter has
            if (is_a(node, Is.CONVOLUTION) or node.opname.startswith(_POOLS)) and node.args[0].shape[dim] > 1:
                return self._written(node.args[0], dim) and all(map(self._fixed, node.ints))
        if node.opname == "flatten":
            first, last = (dim_of(arg(node, i, n, default), node.args[0]) for i, n, default in ((1, "start_dim", 0), (2, "end_dim", -1)))
            rank = len(node.args[0].shape)
            dims = range(first, last + 1) if at == first else [at if at < first else at + last - first]
            return all(self.of(node.args[0], d - rank, given) for d in dims)
        before = [(u, d) for u in node.inputs() for d in ones_before(self.leaves, node, u, v, dim)]
        if not before or not all(is_known(node, u, v) for u, _ in before):
            return False
        return (any if node.opname == "cat" else all)(self.of(u, d, given) for u, d in before)

    @cached_property
    def written(self) -> Atoms:
        """Axes whose size a number of the code says; none that an argument brings as it is. One that a parameter has may be a length that
        only happens to be its own.
        """
        brought = (v for n in self.graph.nodes for v in n.inputs() if v.origin is Origin.INPUT)
        return written(self.asked) - {dim[0] for v in brought for dim in self.axes.dims.get(v.id, ()) if len(dim) == 1}

    def _written(self, v: Value, dim: int) -> bool:
        atoms = self.leaves[v.id][dim]
        return prod(a.size for a in atoms) == v.shape[dim] and atoms <= self.written

    def _said(self, node: Node, at: int) -> bool | None:
        """True where a number that the code gives says so, None where none does."""
        where = _SIZED.get(node.opname)
        sizes = node.args[where] if where is not None and where < len(node.args) else None
        if node.opname == "unflatten":
            first = dim_of(node.args[1], node.args[0])
            sizes, at = node.args[2], at - first
        if node.opname.startswith("adaptive"):
            sizes = arg(node, 1, "output_size")
            sizes = [sizes] * int(node.opname[-2]) if isinstance(sizes, int) else sizes
            at -= len(node.args[0].shape) - len(sizes)
        if not isinstance(sizes, (list, tuple)) or not 0 <= at < len(sizes) or sizes[at] == -1:
            return None
        exprs = [node.ints[p] for p in positions(node, sizes[at], at, len(sizes))]
        return all(map(self._fixed, exprs)) if exprs else None

    def _fixed(self, expr: IntExpr) -> bool:
        """True for a number that is the same in other calls."""
        if not self.graph.chosen.isdisjoint(parts(expr)):
            return False
        return all(self._size(leaf) for leaf in leaves(expr) if isinstance(leaf, SizeRef))

    def _plain(self, node: Node) -> bool:
        """True where no size is part of a call's numbers, nor was in the choice of one."""
        return all(self.graph.chosen.isdisjoint(parts(e)) and not any(isinstance(leaf, SizeRef) for leaf in leaves(e)) for e in node.ints)

    def _size(self, leaf: SizeRef) -> bool:
        v = self.values.get(leaf.value_id)
        if v is None or leaf.dim < 0:
            return False
        return v.origin is Origin.PARAM or (v.shape[leaf.dim] == 1 and self.of(v, leaf.dim - len(v.shape), given=False))

    def _cut(self, node: Node, v: Value, dim: int) -> bool | None:
        """True where a number says that one is taken; None for the dims that are not cut."""
        x, one = node.args[0], {Literal(1), Literal(-1)} - self.graph.chosen
        if not isinstance(x, Value) or len(x.shape) != len(v.shape):
            return None
        d = dim_of(arg(node, 1 if node.opname in ("slice", "narrow") else 2, "dim", 0), x) - len(x.shape)
        if d != dim:
            return None
        if node.opname == "slice":
            start, stop = arg(node, 2, "start"), arg(node, 3, "end")
            start, stop = start or 0, sys.maxsize if stop is None else stop
            if start == 0 and stop >= x.shape[dim]:
                return None  # all of it
            plain = bool(node.ints) and self._plain(node)
            return plain and ((start == -1 and stop >= x.shape[dim]) or ((start >= 0) == (stop >= 0) and stop - start == 1))
        if node.opname == "narrow":
            return len(node.ints) == 3 and node.ints[-1] in one  # others are those of an operator that is made of it (`diff`)
        plain = self._plain(node)
        if node.opname in ("split", "split_with_sizes", "unsafe_split"):
            said = isinstance(node.args[1], (list, tuple)) and x.shape[dim] != 1
            return plain and (said or node.args[1] == 1)  # the last piece of others is what is left
        return False
