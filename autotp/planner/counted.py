"""Finds dims of size 1 that meet a dim that is cut and may be longer in another call: a list of one entry, a slice of one row.

What of them comes from a dim of 1 of an argument alone is checked where the model is called (`autotp.planner.ones`). What the code
itself makes 1 stays so: a new dim, a dim that is kept where it is summed over, a 1 that is written in a view. What is left is counted,
and the operator that meets the cut dim checks it (`Site.ones`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autotp.axes.operators.table import Is, arg, dim_of, is_a
from autotp.plan.spec import Site
from autotp.planner.dims_of_one import is_known, new_dims, ones_before, ones_of, summed_dims
from autotp.planner.ones import meets_a_cut
from autotp.planner.placements import GraphIndex, Labels
from autotp.planner.refusals import Refusal
from autotp.planner.varying import positions
from autotp.trace.graph import Node, Origin, Place, Pseudo, Value, outside
from autotp.trace.ints import AttrRef, IntExpr, Literal, SizeRef, leaves

#: Position of the list of sizes among the arguments of operators that have one.
_SIZED = {
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "view_copy", "expand", "broadcast_to"), 1),
    **dict.fromkeys(("zeros", "ones", "empty", "full"), 0),
    **dict.fromkeys(("new_zeros", "new_ones", "new_empty", "new_full"), 1),
}
Met = dict[tuple[str, Place], set[tuple[int, int]]]


def with_checks(space: GraphIndex, labels: Labels, sites: Mapping[str, list[Site]]) -> dict[str, list[Site]]:
    """Returns the sites of each module, with those added that check dims of size 1.

    Raises:
        Refusal: no call site can check one.
    """
    out = {module: list(listed) for module, listed in sites.items()}
    for (module, p), ones in _found(space, labels).items():
        listed = out.setdefault(module, [])
        at = next(
            (i for i, s in enumerate(listed) if (s.file, s.function, s.line, s.offset) == (p.file, p.function, p.line, p.offset)), None
        )
        if at is None:
            listed.append(Site(p.file, p.function, p.line, p.offset, ones=tuple(sorted(ones))))
        else:
            listed[at] = replace(listed[at], ones=tuple(sorted(ones)))
    return out


def _found(space: GraphIndex, labels: Labels) -> Met:
    """Returns what each place has to check; a tensor that is longer there in another traced call is not checked."""
    sure: _Sure | None = None
    found: Met = {}
    for node, inputs in zip(space.graph.nodes, space.inputs, strict=True):
        for v in inputs:
            if v.origin in (Origin.PARAM, Origin.BUFFER, Origin.INPUT) or 1 not in v.shape:
                continue
            for dim in meets_a_cut(space, labels, node, v):
                sure = sure or _Sure(space)
                if sure.of(v, dim):
                    continue
                at = [i for i, key in enumerate(node.tensors) if key == v.id]
                if node.place is None or outside(node) or space.graph.sealed(node) or not at:
                    raise Refusal(node, f"dim {dim} of {v} is 1 there, may be longer in another call, and no call site can check it")
                found.setdefault((node.module, node.place), set()).update((i, dim) for i in at)
    values = {v.id: v for n in space.graph.nodes for v in (*n.inputs(), *n.outputs)} if found else {}
    for node in space.graph.nodes if found else ():
        ones = found.get((node.module, node.place)) if node.place is not None else None
        if ones:
            ones -= {(i, d) for i, d in ones if i >= len(node.tensors) or not _is_one(values.get(node.tensors[i]), d)}
    return {place: ones for place, ones in found.items() if ones}


def _is_one(v: Value | None, dim: int) -> bool:
    return v is not None and -dim <= len(v.shape) and v.shape[dim] == 1


class _Sure:
    """Which dims are of size 1 in every call that the guards let pass."""

    def __init__(self, space: GraphIndex) -> None:
        self.space = space
        self.values = {v.id: v for n in space.graph.nodes for v in (*n.inputs(), *n.outputs)}
        self.known: dict[tuple[int, int, bool], bool] = {}
        for node in space.graph.nodes:  # in order: what is asked of a value asks what it is made of
            for out in node.outputs:
                for dim in ones_of(out):
                    for given in (True, False):
                        self.of(out, dim, given)

    def of(self, v: Value, dim: int, given: bool = True) -> bool:
        """True for a dim, counted from the last, that stays of size 1. `given`: those of arguments do, where tensors are made of them."""
        key = (v.id, dim, given)
        if key not in self.known:
            self.known[key] = self._of(v, dim, given)
        return self.known[key]

    def _of(self, v: Value, dim: int, given: bool) -> bool:
        node = self.space.made.get(v.id)
        if node is None:
            return (v.origin is not Origin.CONST or not self.space.graph.read) and (v.origin is not Origin.INPUT or given)
        at = dim + len(v.shape)
        if not isinstance(node.op, Pseudo):
            if dim in new_dims(node, v) or at in summed_dims(node):
                return True
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
        if node.opname == "flatten":
            first, last = (dim_of(arg(node, i, n, default), node.args[0]) for i, n, default in ((1, "start_dim", 0), (2, "end_dim", -1)))
            rank = len(node.args[0].shape)
            dims = range(first, last + 1) if at == first else [at if at < first else at + last - first]
            return all(self.of(node.args[0], d - rank, given) for d in dims)
        before = [(u, d) for u in node.inputs() for d in ones_before(self.space.leaves, node, u, v, dim)]
        if not before or not all(is_known(node, u, v) for u, _ in before):
            return False
        return (any if node.opname == "cat" else all)(self.of(u, d, given) for u, d in before)

    def _said(self, node: Node, at: int) -> bool | None:
        """True where a number that the code gives says so, None where none does."""
        where = _SIZED.get(node.opname)
        sizes = node.args[where] if where is not None and where < len(node.args) else None
        if node.opname == "unflatten":
            first = dim_of(node.args[1], node.args[0])
            sizes, at = node.args[2], at - first
        if not isinstance(sizes, (list, tuple)) or not 0 <= at < len(sizes) or sizes[at] == -1:
            return None
        exprs = [node.ints[p] for p in positions(node, sizes[at], at, len(sizes))]
        return all(map(self._fixed, exprs)) if exprs else None

    def _fixed(self, expr: IntExpr) -> bool:
        if isinstance(expr, (Literal, AttrRef)):
            return True
        if isinstance(expr, SizeRef):
            return self._size(expr)
        return all(self._size(leaf) for leaf in leaves(expr) if isinstance(leaf, SizeRef))

    def _size(self, leaf: SizeRef) -> bool:
        v = self.values.get(leaf.value_id)
        if v is None or leaf.dim < 0:
            return False
        return self.space.is_parameter(v.id) or (v.shape[leaf.dim] == 1 and self.of(v, leaf.dim - len(v.shape), given=False))

    def _cut(self, node: Node, v: Value, dim: int) -> bool | None:
        """True where a number says that one is taken; None for the dims that are not cut."""
        x, one = node.args[0], (Literal(1), Literal(-1))
        if not isinstance(x, Value) or len(x.shape) != len(v.shape):
            return None
        d = dim_of(arg(node, 1 if node.opname in ("slice", "narrow") else 2, "dim", 0), x) - len(x.shape)
        if d != dim:
            return None
        if node.opname == "slice":
            start, stop = arg(node, 2, "start"), arg(node, 3, "end")
            start, stop = start or 0, x.shape[dim] if stop is None else stop
            if start == 0 and stop >= x.shape[dim]:
                return None  # all of it
            plain = not any(isinstance(leaf, SizeRef) for e in node.ints for leaf in leaves(e))
            return plain and ((start == -1 and stop >= x.shape[dim]) or ((start >= 0) == (stop >= 0) and stop - start == 1))
        if node.opname == "narrow":
            return bool(node.ints) and node.ints[-1] in one
        plain = all(isinstance(e, (Literal, AttrRef)) for e in node.ints)
        if node.opname in ("split", "split_with_sizes", "unsafe_split"):
            said = isinstance(node.args[1], (list, tuple)) and x.shape[dim] != 1
            return plain and (said or node.args[1] == 1)  # the last piece of others is what is left
        return False
