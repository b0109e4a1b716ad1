"""Rules of operators that cut dims, and join tensors along them."""

from __future__ import annotations

from typing import Any

from autotp.axes import atoms
from autotp.axes.analysis import Context
from autotp.axes.atoms import Dim, Opaque
from autotp.axes.operators.table import Is, Padded, arg, dim_of, rule
from autotp.trace.graph import Node, Value, values_in


def _cut(context: Context, node: Node, x: Value, d: int, sizes: list[int]) -> list[Dim]:
    try:
        return atoms.cut(context.of(x)[d], sizes)
    except Opaque as why:
        context.block(x, context.of(x)[d], str(why))
        return [atoms.new(n) for n in sizes]


def _with(context: Context, x: Value, d: int, dim: Dim) -> list[Dim]:
    dims = list(context.of(x))
    dims[d] = dim
    return dims


@rule("split", "split_with_sizes", "chunk", "unsafe_split", padded=Padded.MOVED, traits=Is.CUTS | Is.MAY_BE_EMPTY)
@rule("unsafe_chunk", "tensor_split", padded=Padded.MOVED, traits=Is.CUTS)
def split(context: Context, node: Node) -> None:
    """A dim is cut into consecutive pieces."""
    x = node.args[0]
    d = dim_of(arg(node, 2, "dim", 0), x)
    sizes = [out.shape[d] for out in node.outputs]
    pieces = _cut(context, node, x, d, sizes)
    wanted = arg(node, 1, "split_size")
    if node.opname in ("chunk", "unsafe_chunk", "tensor_split") or len(set(sizes)) == 1:
        for piece in pieces[1:]:  # pieces of one size stay of one size on a shard
            if node.opname != "split_with_sizes" and len(set(sizes)) == 1 and len(pieces) > 1 and not _same_cut(pieces[0], piece):
                context.block(x, context.of(x)[d], "pieces of one size would differ on a shard")
    for out, piece in zip(node.outputs, pieces, strict=True):
        context.set(out, _with(context, x, d, piece))
    context.linear([x])
    if node.opname in ("chunk", "unsafe_chunk", "tensor_split"):
        context.counts(wanted, x, d)
    if node.opname == "tensor_split":
        if isinstance(arg(node, 1, "indices"), (list, tuple)):  # positions, from either end
            context.block(x, context.of(x)[d], "the dim is cut at positions")
    elif isinstance(wanted, (list, tuple)):
        for i, n in enumerate(wanted):
            context.demand(n, node.outputs[i], [pieces[i]], i, len(wanted))
            if n == x.shape[d]:
                context.takes(n, x, d)
    elif node.opname in ("split", "unsafe_split") and wanted == sizes[0]:  # a larger number gives one piece, of any shard too
        context.demand(wanted, node.outputs[0], [pieces[0]])


def _same_cut(a: Dim, b: Dim) -> bool:
    """Conservative only where the run would not notice: unequal local pieces fail the shape check of the replay."""
    return atoms.dim_size(a) == atoms.dim_size(b)


@rule("slice", padded=Padded.MOVED, traits=Is.CUTS | Is.MAY_BE_EMPTY | Is.PASSES_ARGUMENTS | Is.PASSES_SCORES | Is.SELECTION)
@rule("narrow", padded=Padded.MOVED, traits=Is.CUTS | Is.MAY_BE_EMPTY)
@rule("slice_copy", padded=Padded.MOVED, traits=Is.CUTS)
def slice_(context: Context, node: Node) -> None:
    """A run of a dim."""
    x, out = node.args[0], node.outputs[0]
    d = dim_of(arg(node, 1, "dim", 0), x)
    n = x.shape[d]
    if node.opname == "narrow":
        first, length, step = node.args[2], node.args[3], 1
        if not isinstance(first, int):
            context.opaque()
            return
        start = first % n if n else 0
        stop = start + length
    else:
        start, stop, step = arg(node, 2, "start"), arg(node, 3, "end"), arg(node, 4, "step", 1)
    raw = (start, stop)
    start = 0 if start is None else max(start + n, 0) if start < 0 else min(start, n)
    stop = n if stop is None else max(stop + n, 0) if stop < 0 else min(stop, n)
    context.linear([x])
    if stop <= start:
        _empty(context, node, x, d, raw)
        return
    if step != 1:
        _strided(context, x, out, d, step)
        return
    if (start, stop) == (0, n):
        context.set(out, context.of(x))
        if node.opname == "narrow":
            context.demand(node.args[3], x, [context.of(x)[d]])
        for number in (node.args[3],) if node.opname == "narrow" else raw:
            context.takes(number, x, d)
        return
    sizes = [start, stop - start, n - stop]
    before, piece, after = _cut(context, node, x, d, sizes)
    context.set(out, _with(context, x, d, piece))
    if node.opname == "narrow":
        if node.args[2] < 0:
            context.meaning.demands.append(_negative(node.args[2], x, [piece, after]))
        else:
            context.demand(node.args[2], x, [before])
        context.demand(node.args[3], x, [piece])
        return
    pieces = [(before, sizes[0]), (piece, sizes[1]), (after, sizes[2])]
    for number, at in ((raw[0], 1), (raw[1], 2)):
        if isinstance(number, int) and 0 < number < n:
            context.demand(number, x, [d for d, s in pieces[:at] if s])
        elif isinstance(number, int) and -n < number < 0:
            context.meaning.demands.append(_negative(number, x, [d for d, s in pieces[at:] if s]))


def _empty(context: Context, node: Node, x: Value, d: int, bounds: tuple[int | None, int | None]) -> None:
    """No index of a dim. No number has to follow the dim's size: the run is empty on a shard, or the call fails there.

    Only from an end to a place counted from the start (``x[-6:6]`` of 12) there may be something on a shard.
    """
    start, stop = bounds
    if start is not None and start < 0 and stop is not None and stop > 0:
        context.block(x, context.of(x)[d], "the ends of an empty slice would cross on a shard")
    for number in bounds:  # another call may take something
        context.takes(number, x, d)
    if node.opname == "narrow" and node.args[2] == x.shape[d]:
        context.demand(node.args[2], x, [context.of(x)[d]])
    context.set(node.outputs[0], _with(context, x, d, atoms.new(0)))


def _negative(number: int, x: Value, dims: list[Dim]) -> Any:
    from autotp.axes.analysis import Demand

    return Demand(number, x.id, tuple(tuple(d) for d in dims))


def _strided(context: Context, x: Value, out: Value, d: int, step: int) -> None:
    """Every `step`-th index: the minor factor is taken apart (an interleaved gate/up keeps its major factor)."""
    n = x.shape[d]
    context.counts(step, x, d)
    if n % step or out.shape[d] * step != n:
        context.mix(x, d)
        context.set(out, _with(context, x, d, atoms.new(out.shape[d])))
        return
    try:
        major, minor = atoms.split(context.of(x)[d], [n // step, step])
    except Opaque as why:
        context.block(x, context.of(x)[d], str(why))
        major, minor = atoms.new(out.shape[d]), []
    context.block(x, minor, "a strided slice takes the factor apart")
    context.set(out, _with(context, x, d, major))


@rule("cat", padded=Padded.MOVED, traits=Is.MAY_BE_EMPTY | Is.PASSES_ARGUMENTS | Is.PASSES_SCORES)
@rule("concat", "concatenate", padded=Padded.MOVED)
def cat(context: Context, node: Node) -> None:
    """Tensors laid end to end; empty legacy tensors of shape [0] are passed over."""
    out = node.outputs[0]
    values = [v for v in values_in(node.args[0]) if v.shape != (0,)]
    d = (arg(node, 1, "dim", 0)) % max(len(out.shape), 1)
    for other in values[1:]:
        for i in range(len(out.shape)):
            if i != d:
                context.join(values[0], context.of(values[0])[i], other, context.of(other)[i])
    context.set(out, _with(context, values[0], d, atoms.concat([context.of(v)[d] for v in values])))
    context.linear(values)


@rule("stack", padded=Padded.MOVED, traits=Is.MIXES)
def stack(context: Context, node: Node) -> None:
    """A fresh dim."""
    values, out = list(values_in(node.args[0])), node.outputs[0]
    for other in values[1:]:
        for a, b in zip(context.of(values[0]), context.of(other), strict=True):
            context.join(values[0], a, other, b)
    dims = list(context.of(values[0]))
    at = arg(node, 1, "dim", 0) % len(out.shape)
    known = context.dims.get(out.id)
    fresh = known[at] if known else atoms.new(len(values))
    dims.insert(at, fresh)
    context.set(out, dims)
    context.block(out, fresh, "stacked tensors are told apart by position")
    context.linear(values)


@rule("unbind", "select_copy", padded=Padded.MOVED)
@rule("select", padded=Padded.MOVED, traits=Is.SELECTION)
def unbind(context: Context, node: Node) -> None:
    """Single indices of a dim: the dim is gone. What a selected index of a concatenation is counted over stays whole."""
    x = node.args[0]
    d = dim_of(arg(node, 1, "dim", 0), x)
    dim = context.of(x)[d]
    why = f"{node.opname} picks single indices of the dim"
    k = arg(node, 2, "index") if node.opname != "unbind" else None
    atom = next(iter(atoms.flat(dim)), None)
    if isinstance(k, int) and atom is not None and atom.segments is not None:
        try:
            before, _, after = atoms.cut(dim, [k % x.shape[d], 1, x.shape[d] - k % x.shape[d] - 1])
            context.block(x, before if k >= 0 else after, why)
        except Opaque:
            context.block(x, dim, why)
    else:
        context.block(x, dim, why)
    for out in node.outputs:
        context.set(out, [dim for i, dim in enumerate(context.of(x)) if i != d])
    context.linear([x])


@rule("constant_pad_nd", padded=Padded.MOVED, traits=Is.FILLS | Is.PASSES_ARGUMENTS, at=2)
@rule("pad", padded=Padded.MOVED, traits=Is.FILLS | Is.PASSES_ARGUMENTS, at=3)
def pad(context: Context, node: Node) -> None:
    """Padded dims are fresh."""
    x, out = node.args[0], node.outputs[0]
    dims = list(context.of(x))
    for i, (a, b) in enumerate(zip(x.shape, out.shape, strict=True)):
        amounts = node.args[1]
        j = (len(x.shape) - 1 - i) * 2
        if a != b or (j < len(amounts) and (amounts[j] or amounts[j + 1])):
            context.mix(x, i)
            dims[i] = atoms.new(b)
    context.set(out, dims)
    if arg(node, 2, "value", 0) in (0, None) and (node.opname != "pad" or arg(node, 2, "mode", "constant") == "constant"):
        context.linear([x])
