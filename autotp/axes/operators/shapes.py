"""Rules of operators that regroup, permute and repeat dims."""

from __future__ import annotations

from autotp.axes import atoms
from autotp.axes.analysis import Context
from autotp.axes.atoms import Dim, Opaque
from autotp.axes.operators.table import Is, Padded, arg, broadcast, dim_of, dims_of, rule
from autotp.trace.graph import Node, Value


def _groups(a: tuple[int, ...], b: tuple[int, ...]) -> list[tuple[range, range]]:
    """The finest common grouping of two shapes: runs of dims with equal products."""
    out = []
    i = j = 0
    while i < len(a) or j < len(b):
        i0, j0 = i, j
        left = right = 1
        while True:
            if left == right and (i > i0 or j > j0):
                break
            if left <= right and i < len(a):
                left *= a[i]
                i += 1
            elif j < len(b):
                right *= b[j]
                j += 1
            else:
                left *= a[i]
                i += 1
        out.append((range(i0, i), range(j0, j)))
    return out


@rule("view", "reshape", padded=Padded.MOVED, traits=Is.IDENTITY | Is.PASSES_ARGUMENTS | Is.PASSES_SCORES | Is.SELECTION)
@rule("_unsafe_view", "flatten", padded=Padded.MOVED, traits=Is.IDENTITY)
@rule("unflatten", "view_copy", padded=Padded.MOVED)
def view(context: Context, node: Node) -> None:
    """Row-major regrouping of dims."""
    x, out = node.args[0], node.outputs[0]
    source = context.of(x)
    dims: list[Dim] = [[] for _ in out.shape]
    for left, right in _groups(x.shape, out.shape):
        merged = [a for i in left for a in source[i]]
        sizes = [out.shape[j] for j in right]
        try:
            parts = atoms.split(merged, sizes)
        except Opaque as why:
            context.block(x, merged, str(why))
            parts = [atoms.new(n) for n in sizes]
        for j, part in zip(right, parts, strict=True):
            dims[j] = part
    context.set(out, dims)
    context.linear([x])
    sizes = arg(node, 2, "sizes") if node.opname == "unflatten" else arg(node, 1, "size")
    first = dim_of(node.args[1], x) if node.opname == "unflatten" else 0
    if node.opname != "flatten" and isinstance(sizes, (list, tuple)):
        for i, n in enumerate(sizes):
            context.demand(n, out, [dims[first + i]], i, len(sizes))


@rule("transpose", padded=Padded.MOVED, traits=Is.PASSES_SCORES | Is.SELECTION)
@rule("transpose_", "swapaxes", padded=Padded.MOVED)
def transpose(context: Context, node: Node) -> None:
    """Two dims change places."""
    x = node.args[0]
    dims = list(context.of(x))
    if dims:
        i, j = dim_of(node.args[1], x), dim_of(node.args[2], x)
        dims[i], dims[j] = dims[j], dims[i]
    context.set(node.outputs[0], dims)
    context.linear([x])


@rule("t", "numpy_T", "mT", padded=Padded.MOVED, traits=Is.SELECTION)
@rule("matrix_H", "adjoint", "mH", padded=Padded.MOVED)
def t(context: Context, node: Node) -> None:
    """Transposes of matrices."""
    x = node.args[0]
    dims = list(context.of(x))
    if len(dims) >= 2:
        dims[-1], dims[-2] = dims[-2], dims[-1]
    context.set(node.outputs[0], dims if len(dims) == 2 or node.opname != "numpy_T" else dims[::-1])
    context.linear([x])


@rule("permute", padded=Padded.MOVED, traits=Is.PASSES_SCORES | Is.SELECTION)
def permute(context: Context, node: Node) -> None:
    """Dims change places."""
    x = node.args[0]
    context.set(node.outputs[0], [context.of(x)[dim_of(i, x)] for i in node.args[1]])
    context.linear([x])


@rule("squeeze", "unsqueeze", padded=Padded.MOVED, traits=Is.PASSES_ARGUMENTS | Is.PASSES_SCORES | Is.SELECTION)
@rule("squeeze_", "unsqueeze_", padded=Padded.MOVED)
def squeeze(context: Context, node: Node) -> None:
    """Dims of size 1 come and go."""
    x, out = node.args[0], node.outputs[0]
    if node.opname.startswith("unsqueeze"):
        dims = list(context.of(x))
        dims.insert(node.args[1] % len(out.shape), [])
    else:
        gone = dims_of(node.args[1] if len(node.args) > 1 else None, x)
        dims = [d for i, d in enumerate(context.of(x)) if not (i in gone and x.shape[i] == 1)]
    context.set(out, dims)
    context.linear([x])


@rule("expand", padded=Padded.MOVED, traits=Is.PASSES_SCORES | Is.SELECTION)
@rule("expand_as", "broadcast_to", padded=Padded.MOVED)
def expand(context: Context, node: Node) -> None:
    """Dims of size 1 are repeated: a new atom, the same on every index."""
    x, out = node.args[0], node.outputs[0]
    shift = len(out.shape) - len(x.shape)
    dims = []
    for i, n in enumerate(out.shape):
        same = i >= shift and x.shape[i - shift] == n
        dims.append(context.of(x)[i - shift] if same else atoms.new(n))
    if out.id in context.dims:
        for i, n in enumerate(out.shape):
            if not (i >= shift and x.shape[i - shift] == n):
                dims[i] = context.dims[out.id][i]
    context.set(out, dims)
    context.linear([x])
    context.meaning.generates = True
    if isinstance(node.args[1], (list, tuple)):
        for i, n in enumerate(node.args[1]):
            context.demand(n, out, [dims[i]], i, len(node.args[1]))
    elif isinstance(node.args[1], Value):
        broadcast(context, [node.args[1]], out)


@rule("repeat", padded=Padded.MOVED)
def repeat(context: Context, node: Node) -> None:
    """Each dim is laid out `r` times: a new major atom."""
    x, out = node.args[0], node.outputs[0]
    repeats = node.args[1]
    shift = len(repeats) - len(x.shape)
    known = context.dims.get(out.id)
    dims = []
    for i, r in enumerate(repeats):
        base = context.of(x)[i - shift] if i >= shift else []
        fresh = atoms.new(r)
        if known is not None and r != 1:
            fresh = atoms.split(known[i], [r, out.shape[i] // r])[0]
        dims.append([*fresh, *base])
        if r != 1:
            context.demand(r, out, [fresh], i, len(repeats))
    context.set(out, dims)
    context.linear([x])
    context.meaning.generates = True


@rule("repeat_interleave", padded=Padded.MOVED)
def repeat_interleave(context: Context, node: Node) -> None:
    """Each index is repeated `r` times: a new minor atom."""
    x, out = node.args[0], node.outputs[0]
    r, dim = arg(node, 1, "repeats"), arg(node, 2, "dim")
    if not isinstance(r, int) or dim is None:
        context.opaque("the repeats are data")
        return
    d = dim_of(dim, x)
    dims = list(context.of(x))
    known = context.dims.get(out.id)
    fresh = atoms.new(r) if known is None else atoms.split(known[d], [out.shape[d] // r, r])[1]
    dims[d] = [*dims[d], *fresh]
    context.set(out, dims)
    context.linear([x])
    context.meaning.generates = True
    context.demand(r, out, [fresh])
    context.demand(node.kwargs.get("output_size"), out, [dims[d]])


@rule("view_as_complex", "view_as_real", padded=Padded.MOVED)
def complex_view(context: Context, node: Node) -> None:
    """A last dim of size 2 becomes the parts of complex numbers, and back."""
    x, out = node.args[0], node.outputs[0]
    if node.opname == "view_as_complex":
        context.block(x, context.of(x)[-1], "real and imaginary parts belong together")
        context.set(out, context.of(x)[:-1])
    else:
        known = context.dims.get(out.id)
        context.set(out, [*context.of(x), known[-1] if known else atoms.new(2)])
        context.block(out, context.of(out)[-1], "real and imaginary parts belong together")
    context.linear([x])
