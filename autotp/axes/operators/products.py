"""Rules of products: what is summed over, and what runs in parallel."""

from __future__ import annotations

from autotp.axes import atoms
from autotp.axes.analysis import Context
from autotp.axes.atoms import Dim
from autotp.axes.operators.table import Is, Padded, arg, rule
from autotp.trace.graph import Node, Value, values_in


def product(context: Context, a: Value, i: int, b: Value, j: int) -> None:
    """Sum over dim i of a and dim j of b."""
    context.join(a, context.of(a)[i], b, context.of(b)[j])
    context.contract(a, i)
    context.contract(b, j)


def _bias(context: Context, bias: object, out: Value) -> None:
    if isinstance(bias, Value):
        for k in range(1, len(bias.shape) + 1):
            if bias.shape[-k] == out.shape[-k]:
                context.join(bias, context.of(bias)[-k], out, context.of(out)[-k])
        context.meaning.once.append(bias.id)


@rule("linear", padded=Padded.PRODUCT, traits=Is.ON_LAST_DIM | Is.PRODUCT, at=2)
def linear(context: Context, node: Node) -> None:
    """x [..., i] · w [o, i] + b [o]."""
    x, w, out = node.args[0], node.args[1], node.outputs[0]
    product(context, x, -1, w, -1)
    context.set(out, [*context.of(x)[:-1], *context.of(w)[:-1]])
    bias = arg(node, 2, "bias")
    _bias(context, bias, out)
    if bias is None:
        context.linear([x], [w])


@rule("addmm", padded=Padded.PRODUCT, traits=Is.PRODUCT, at=0)
@rule("baddbmm", padded=Padded.PRODUCT, traits=Is.MAKES_SCORES | Is.PRODUCT, at=0)
def addmm(context: Context, node: Node) -> None:
    """bias + a · b."""
    bias, a, b = node.args[:3]
    out = node.outputs[0]
    product(context, a, -1, b, -2)
    if len(a.shape) == 3:
        context.join(a, context.of(a)[0], b, context.of(b)[0])
    context.set(out, [*context.of(a)[:-1], context.of(b)[-1]])
    _bias(context, bias, out)


@rule("mm", padded=Padded.PRODUCT, traits=Is.PRODUCT)
@rule("bmm", "matmul", padded=Padded.PRODUCT, traits=Is.MAKES_SCORES | Is.MATRIX_PRODUCT | Is.PRODUCT)
@rule("mv", "dot", "vdot", padded=Padded.PRODUCT)
def matmul(context: Context, node: Node) -> None:
    """a [..., m, k] · b [..., k, n] with the broadcasting of torch.matmul."""
    a, b, out = node.args[0], node.args[1], node.outputs[0]
    product(context, a, -1, b, -2 if len(b.shape) > 1 else -1)
    tail: list[Dim] = []
    if len(a.shape) > 1:
        tail.append(context.of(a)[-2])
    if len(b.shape) > 1:
        tail.append(context.of(b)[-1])
    batch: list[Dim] = []
    for i in range(len(out.shape) - len(tail)):
        k = len(out.shape) - len(tail) - i  # from the right, before the matrix dims
        carrying = [(v, context.of(v)[-2 - k]) for v in (a, b) if len(v.shape) >= 2 + k and v.shape[-2 - k] != 1]
        if len(carrying) == 2:
            context.join(*carrying[0], *carrying[1])
        batch.append(carrying[0][1] if carrying else [])
    context.set(out, [*batch, *tail])
    context.linear([a], [b])


def letters(node: Node) -> tuple[list[tuple[Value, str]], str]:
    """Returns the operands of an `einsum`, each with a letter for each of its dims, and the letters of its result."""
    equation: str = node.args[0].replace(" ", "")
    values = list(values_in(node.args[1]))
    if "->" not in equation:
        found = equation.replace(",", "")
        equation += "->" + "".join(sorted(c for c in set(found) if found.count(c) == 1 and c.isalpha()))
    left, right = equation.split("->")
    terms = left.split(",")
    if "..." in equation:
        width = max(len(v.shape) - len(t.replace("...", "")) for v, t in zip(values, terms, strict=True))
        free = [c for c in "ZYXWVUTSRQPO" if c not in equation][:width]
        owns = [len(v.shape) - len(t.replace("...", "")) for v, t in zip(values, terms, strict=True)]
        terms = [t.replace("...", "".join(free[width - own :])) for t, own in zip(terms, owns, strict=True)]
        right = right.replace("...", "".join(free))
    return list(zip(values, terms, strict=True)), right


@rule("einsum", padded=Padded.PRODUCT, traits=Is.MAKES_SCORES | Is.PRODUCT)
def einsum(context: Context, node: Node) -> None:
    """Named dims: equal letters join, letters absent from the result are summed."""
    terms, right = letters(node)
    named: dict[str, tuple[Value, Dim]] = {}
    for value, term in terms:
        if len(set(term)) != len(term):
            context.opaque("einsum takes a diagonal")
            return
        for i, letter in enumerate(term):
            if value.shape[i] == 1:
                continue
            if letter in named:
                context.join(*named[letter], value, context.of(value)[i])
            else:
                named[letter] = (value, context.of(value)[i])
            if letter not in right:
                context.contract(value, i)
    context.set(node.outputs[0], [named[c][1] if c in named else [] for c in right])
    context.linear(*[[v] for v, _ in terms])


@rule("bilinear", padded=Padded.PRODUCT, traits=Is.PRODUCT, at=3)
def bilinear(context: Context, node: Node) -> None:
    """x [..., i] · w [o, i, j] · y [..., j] + b [o]."""
    x, y, w, out = node.args[0], node.args[1], node.args[2], node.outputs[0]
    product(context, x, -1, w, 1)
    product(context, y, -1, w, 2)
    for i in range(len(x.shape) - 1):
        context.join(x, context.of(x)[i], y, context.of(y)[i])
    context.set(out, [*context.of(x)[:-1], context.of(w)[0]])
    bias = arg(node, 3, "bias")
    _bias(context, bias, out)
    if bias is None:
        context.linear([x], [y], [w])


@rule("_grouped_mm", padded=Padded.FINITE, traits=Is.ALIGNED | Is.PRODUCT)
def grouped_mm(context: Context, node: Node) -> None:
    """Rows of x [n, k] times their expert's w [E, k, m]."""
    x, w, out = node.args[0], node.args[1], node.outputs[0]
    if len(x.shape) != 2 or len(w.shape) != 3:
        context.opaque()
        return
    product(context, x, 1, w, 1)
    context.mix(w, 0)
    context.set(out, [context.of(x)[0], context.of(w)[2]])
    context.linear([x], [w])


@rule("conv1d", "conv2d", "conv3d", padded=Padded.PRODUCT, traits=Is.CONVOLUTION, at=2)
@rule("convolution", "_convolution", padded=Padded.PRODUCT, at=2)
def conv(context: Context, node: Node) -> None:
    """Channels: contracted (groups 1) or parallel (depthwise); positions are mixed, but for those that a kernel of 1 passes over."""
    x, w, out = node.args[0], node.args[1], node.outputs[0]
    groups = arg(node, 6, "groups", 1) if node.opname.startswith("conv") and node.opname[4:5].isdigit() else 0
    spatial = len(w.shape) - 2
    channel = len(x.shape) - spatial - 1
    dims = [*context.of(x)[:channel], [], *[atoms.new(n) for n in out.shape[channel + 1 :]]]
    if out.id in context.dims:
        dims[channel + 1 :] = context.dims[out.id][channel + 1 :]
    for i in range(channel + 1, len(x.shape)):
        if _passes(node, i - channel - 1):
            dims[i] = context.of(x)[i]
            continue
        context.mix(x, i)
        context.mix(w, i - channel + 1)
    if groups == 1:
        product(context, x, channel, w, 1)
        dims[channel] = context.of(w)[0]
    elif groups == x.shape[channel] and w.shape[1] == 1:
        rows = context.of(w)[0] if w.shape[0] == groups else None
        if rows is None:
            rows, _ = atoms.split(context.of(w)[0], [groups, w.shape[0] // groups])
        context.join(x, context.of(x)[channel], w, rows)
        dims[channel] = context.of(w)[0]
        context.demand(groups, x, [context.of(x)[channel]])
    elif groups > 1:
        major, minor = atoms.split(context.of(x)[channel], [groups, w.shape[1]])
        rows, each = atoms.split(context.of(w)[0], [groups, w.shape[0] // groups])
        _group_by_group(context, x, (major, minor), w, (rows, context.of(w)[1]), each)
        dims[channel] = context.of(w)[0]
        context.demand(groups, x, [major])
    else:
        context.opaque("a grouped convolution")
        return
    _summed(context, node, channel, dims)


def _passes(node: Node, i: int) -> bool:
    """True for the `i`-th of the positions of a convolution that takes each of them alone: a kernel, a stride of 1, and no padding."""

    def number(at: int, name: str, default: int) -> object:
        found = arg(node, at, name, default)
        return found[i if len(found) > 1 else 0] if isinstance(found, (list, tuple)) and found else found

    kernel, padding = node.args[1].shape[2 + i], number(4, "padding", 0)
    return kernel == 1 and number(3, "stride", 1) == 1 and (padding == 0 or isinstance(padding, str))


def _group_by_group(context: Context, x: Value, split: tuple[Dim, Dim], w: Value, of_weight: tuple[Dim, Dim], each: Dim) -> None:
    """Groups are parallel; the channels inside of one are summed by ranks that have all of them."""
    (major, minor), (rows, inner) = split, of_weight
    context.join(x, major, w, rows)
    context.join(x, minor, w, inner)
    for value, dim in ((x, minor), (w, inner), (w, each)):
        context.block(value, dim, "the channels inside a group of a convolution are not cut")


def _summed(context: Context, node: Node, channel: int, dims: list[Dim]) -> None:
    """Give the result of a convolution its dims, and add the bias."""
    x, w, bias, out = node.args[0], node.args[1], arg(node, 2, "bias"), node.outputs[0]
    context.set(out, dims)
    if isinstance(bias, Value):
        context.join(bias, context.of(bias)[0], out, dims[channel])
        context.meaning.once.append(bias.id)
    else:
        context.linear([x], [w])


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d", padded=Padded.PRODUCT, traits=Is.CONVOLUTION, at=2)
def conv_transpose(context: Context, node: Node) -> None:
    """x [..., i, p] with w [i, o / groups, k]: channels as in a convolution, groups alone where there are any; positions are mixed."""
    x, w, out = node.args[0], node.args[1], node.outputs[0]
    groups = arg(node, 6, "groups", 1)
    spatial = len(w.shape) - 2
    channel = len(x.shape) - spatial - 1
    dims = [*context.of(x)[:channel], [], *[atoms.new(n) for n in out.shape[channel + 1 :]]]
    if out.id in context.dims:
        dims[channel:] = context.dims[out.id][channel:]
    for i in range(channel + 1, len(x.shape)):
        context.mix(x, i)
        context.mix(w, i - channel + 1)
    if groups == 1:
        product(context, x, channel, w, 0)
        dims[channel] = context.of(w)[1]
    else:
        dims[channel] = dims[channel] or atoms.new(out.shape[channel])
        major, minor = atoms.split(context.of(x)[channel], [groups, x.shape[channel] // groups])
        rows, inner = atoms.split(context.of(w)[0], [groups, w.shape[0] // groups])
        outer, each = atoms.split(dims[channel], [groups, w.shape[1]])
        _group_by_group(context, x, (major, minor), w, (rows, inner), context.of(w)[1])
        context.join(x, major, out, outer)
        context.join(w, context.of(w)[1], out, each)
        context.demand(groups, x, [major])
    _summed(context, node, channel, dims)


@rule("linalg_solve_triangular", padded=Padded.SOLVED)
@rule("linalg_solve")
def solve(context: Context, node: Node) -> None:
    """A [..., n, n] X = B [..., n, k]: batch dims and columns are parallel, the n unknowns of a system are mixed."""
    a, b, out = node.args[0], node.args[1], node.outputs[0]
    if not node.kwargs.get("left", True) or len(a.shape) != len(b.shape):
        context.opaque()
        return
    for value, index in ((a, -1), (a, -2), (b, -2)):
        context.mix(value, index)
    for i in range(len(b.shape) - 2):
        if a.shape[i] == b.shape[i]:
            context.join(a, context.of(a)[i], b, context.of(b)[i])
    context.set(out, [context.of(b if b.shape[i] == n else a)[i] for i, n in enumerate(out.shape)])
    context.linear([b])
