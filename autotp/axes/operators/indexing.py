"""Rules of operators that take indices: what is indexed is mixed, the other dims run in parallel where they are counted alike."""

from __future__ import annotations

import torch

from autotp.axes import atoms
from autotp.axes.analysis import Context
from autotp.axes.atoms import Dim
from autotp.axes.operators.table import Is, Padded, arg, dim_of, rule
from autotp.plan.spec import DistributedForm
from autotp.trace.graph import Node, Origin, Value


@rule("embedding", padded=Padded.MOVED, traits=Is.LOOKUP | Is.ON_LAST_DIM)
def embedding(context: Context, node: Node) -> None:
    """Rows of a table. Gradients that count the ids, or name rows, are made of the whole table and all ids."""
    table, ids, out = node.args[0], node.args[1], node.outputs[0]
    for position, option in ((3, "scale_grad_by_freq"), (4, "sparse")):
        if arg(node, position, option, False):
            context.opaque(f"{option}=True of an embedding: its gradient is made of the whole table")
            return
    context.contract(table, 0, DistributedForm.LOOKUP)
    context.set(out, [*context.of(ids), *context.of(table)[1:]])
    context.linear([table])


def _known_row(context: Context, node: Node, x: Value, d: int, where: Value) -> bool:
    """`x[..., [k], ...]` with a number k: a piece of size 1, where what is counted over to reach it is whole.

    Of a parameter it may be a table's row for a length of one (`positions[list(range(n))]`), as is a number of this call.
    """
    known = context.graph.constants.get(where.id)
    if known is None or known.numel() != 1 or known.dim() != 1 or known.dtype == torch.bool:
        return False
    if x.origin is Origin.PARAM or context.of_calls(where):
        return False
    k, n = int(known), x.shape[d]
    at = k % n
    pieces = atoms.cut(context.of(x)[d], [at, 1, n - at - 1])
    context.block(x, pieces[0 if k >= 0 else 2], "an index is counted over the dim")
    context.set(node.outputs[0], [[] if i == d else dim for i, dim in enumerate(context.of(x))])
    context.linear([x])
    return True


def _is_mask(place: Value) -> bool:
    return place.dtype in (torch.bool, torch.uint8)


def _masked_span(places: list[Value | None]) -> int:
    """Up to which dim a mask of several dims among the indices reaches; 0 where there is none."""
    if not any(v is not None and _is_mask(v) and len(v.shape) > 1 for v in places):
        return 0
    return sum(len(v.shape) if v is not None and _is_mask(v) else 1 for v in places)


def _mix_masks(context: Context, places: list[Value | None]) -> None:
    for v in places:
        for i in range(len(v.shape) if v is not None and _is_mask(v) else 0):
            context.mix(v, i)  # type: ignore[arg-type]


@rule("index", padded=Padded.MOVED, traits=Is.SELECTION)
@rule("_unsafe_index", padded=Padded.MOVED)
def index(context: Context, node: Node) -> None:
    """Tensor indices: indexed dims are mixed, the others stay."""
    x, out = node.args[0], node.outputs[0]
    places = list(node.args[1])
    indexed = [i for i, v in enumerate(places) if v is not None]
    _mix_masks(context, places)
    if span := _masked_span(places):
        for v in places:
            for i in range(len(v.shape) if v is not None else 0):
                context.mix(v, i)
        for i in range(min(span, len(x.shape))):
            context.mix(x, i)
        tail = [context.of(x)[i] for i in range(span, len(x.shape))]
        lead = len(out.shape) - len(tail)
        context.set(out, [*[atoms.new(n) for n in out.shape[:lead]], *tail])
        context.linear([x])
        return
    if len(indexed) == 1 and _known_row(context, node, x, indexed[0], places[indexed[0]]):
        return
    for i in indexed:
        context.mix(x, i)
    shape = max((1 if _is_mask(v) else len(v.shape) for v in places if v is not None), default=0)
    at = indexed[0] if indexed == list(range(indexed[0], indexed[0] + len(indexed))) else 0
    kept = [(i, d) for i, d in enumerate(context.of(x)) if i not in indexed]
    before = [d for i, d in kept if i < at] if at == indexed[0] else []
    after = [d for i, d in kept if i >= at] if at == indexed[0] else [d for _, d in kept]
    sizes = out.shape[len(before) : len(before) + shape]
    middle: list[Dim] = [atoms.new(n) for n in sizes]
    for v in places:
        if v is not None and not _is_mask(v):
            for k in range(1, len(v.shape) + 1):
                if v.shape[-k] == sizes[-k] != 1:
                    context.join(v, context.of(v)[-k], out, middle[-k])
    context.set(out, [*before, *middle, *after])
    context.linear([x])


@rule("index_select", padded=Padded.MOVED, traits=Is.SELECTION)
@rule("gather", padded=Padded.MOVED)
def pick(context: Context, node: Node) -> None:
    """Indices along one dim. Where `gather` has fewer of them in another dim than there are entries, both are counted from 0."""
    x, d, where = node.args[0], dim_of(node.args[1], node.args[0]), node.args[2]
    context.mix(x, d)
    if node.opname == "index_select":
        dims = [dim if i != d else context.of(where)[0] if where.shape else [] for i, dim in enumerate(context.of(x))]
    else:
        dims = list(context.of(where))
        for i in range(len(x.shape)):
            if i == d:
                context.mix(where, i)
            else:
                _counted(context, i, x, where)
    context.set(node.outputs[0], dims)
    context.linear([x])


def _counted(context: Context, i: int, *values: Value) -> None:
    """Dim `i` of all `values` runs in parallel where it is as long in each; otherwise the entries are counted from 0 in each."""
    if len({v.shape[i] for v in values}) == 1:
        for other in values[1:]:
            context.join(values[0], context.of(values[0])[i], other, context.of(other)[i])
    else:
        for v in values:
            context.block(v, context.of(v)[i], f"{context.node.opname} takes the first entries of a longer dim")


@rule("take_along_dim", padded=Padded.MOVED)
def take_along_dim(context: Context, node: Node) -> None:
    """Indices along one dim, with broadcasting in the others."""
    x, where, d = node.args[0], node.args[1], arg(node, 2, "dim")
    if d is None:
        context.opaque("the indices are counted over all elements")
        return
    d, out = dim_of(d, x), node.outputs[0]
    context.mix(x, d)
    context.mix(where, d)
    dims: list[Dim] = []
    for i, n in enumerate(out.shape):
        carrying = [v for v in ((where,) if i == d else (x, where)) if v.shape[i] == n != 1]
        if len(carrying) == 2:
            context.join(x, context.of(x)[i], where, context.of(where)[i])
        dims.append(context.of(carrying[0])[i] if carrying else [])
    context.set(out, dims)
    context.linear([x])


@rule("index_add", "index_add_", "scatter_add", "scatter_add_", padded=Padded.ZERO)
@rule("index_copy", "index_copy_", padded=Padded.MOVED, traits=Is.MIXES)
@rule("scatter", "scatter_", padded=Padded.MOVED, traits=Is.FILLS | Is.MIXES, at=3)
@rule("scatter_reduce")
def put(context: Context, node: Node) -> None:
    """Writing along one dim; the others run in parallel where all have the same entries there."""
    x, d, where = node.args[0], dim_of(node.args[1], node.args[0]), node.args[2]
    source = arg(node, 3, "src", arg(node, 3, "source"))
    given = isinstance(source, Value) and bool(source.shape)
    scatters = node.opname.startswith("scatter")
    for i in range(len(where.shape) if not scatters or len(where.shape) != len(x.shape) else 0):
        context.mix(where, i)  # one index for each entry of the source along the dim
    each = [v for v, there in ((x, True), (source, given), (where, scatters)) if there and len(v.shape) == len(x.shape)]
    for i in range(len(x.shape)):
        if i == d:
            for v in each:
                context.mix(v, i)
        else:
            _counted(context, i, *each)
    for v in (source,) if given and not any(v is source for v in each) else ():
        for i in range(len(v.shape)):
            context.mix(v, i)
    context.set(node.outputs[0], context.of(x))
    if isinstance(source, Value) and node.opname.startswith(("index_add", "scatter_add", "index_copy")):
        context.linear([x, source])


@rule("index_put", "index_put_", "_index_put_impl_")
def index_put(context: Context, node: Node) -> None:
    """x[indices] = values: trailing dims of the values follow x; indices, indexed dims and those before them are mixed."""
    x, places, values = node.args[:3]
    span = _masked_span(places) or 1 + max(i for i, v in enumerate(places) if v is not None)
    for i in range(min(span, len(x.shape))):
        context.mix(x, i)
    for v in places:
        for i in range(len(v.shape) if v is not None else 0):
            context.mix(v, i)
    trailing = range(min(span, len(x.shape)), len(x.shape))
    for k, i in enumerate(reversed(trailing), start=1):
        if k <= len(values.shape) and values.shape[-k] == x.shape[i] != 1:
            context.join(x, context.of(x)[i], values, context.of(values)[-k])
    for i in range(len(values.shape) - len(trailing)):
        context.mix(values, i)
    context.set(node.outputs[0], context.of(x))
    context.linear([x, values])


@rule("masked_scatter", "masked_scatter_")
def masked_scatter(context: Context, node: Node) -> None:
    """Elements of the source in order: its positions matter, and so do the target's."""
    context.opaque("masked_scatter fills by position")
    context.dims.pop(node.outputs[0].id, None)
    context.set(node.outputs[0], context.of(node.args[0]))


@rule("one_hot")
def one_hot(context: Context, node: Node) -> None:
    """A new dim of classes."""
    x, out = node.args[0], node.outputs[0]
    if arg(node, 1, "num_classes", -1) == -1:
        context.opaque("the number of classes depends on data")
        return
    known = context.dims.get(out.id)
    context.set(out, [*context.of(x), known[-1] if known else atoms.new(out.shape[-1])])
