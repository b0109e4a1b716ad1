"""Rules of elementwise, view, cut and join operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autotp.axes import atoms
from autotp.axes.analysis import Context, Rule
from autotp.axes.atoms import Dim, Opaque
from autotp.trace.graph import Node, Value, values_in

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the base names of operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def arg(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an ATen call by position or keyword."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def dim_of(index: int, value: Value) -> int:
    """A dim index counted from the front."""
    return index % max(len(value.shape), 1)


def dims_of(index: Any, value: Value) -> list[int]:
    """A dim index or list of them counted from the front; None or [] means all."""
    if index is None or index == []:
        return list(range(len(value.shape)))
    return [dim_of(i, value) for i in (index if isinstance(index, (list, tuple)) else [index])]


def broadcast(context: Context, values: list[Value], out: Value) -> None:
    """Join the operands' dims from the right; a size-1 dim constrains nothing."""
    dims: list[Dim] = []
    for i, size in enumerate(out.shape):
        carrying: list[tuple[Value, Dim]] = []
        for value in values:
            j = i - (len(out.shape) - len(value.shape))
            if j >= 0 and value.shape[j] == size and size != 1:
                carrying.append((value, context.of(value)[j]))
        for value, dim in carrying[1:]:
            context.join(*carrying[0], value, dim)
        dims.append(carrying[0][1] if carrying else atoms.new(size))
    context.set(out, dims)


_UNARY_LINEAR = (
    "neg",
    "to",
    "_to_copy",
    "clone",
    "contiguous",
    "detach",
    "detach_",
    "alias",
    "lift_fresh",
    "lift_fresh_copy",
    "type_as",
    "positive",
    "resolve_conj",
    "resolve_neg",
    "real",
    "dropout",
    "zero_",
    "_conj",
)


@rule(*_UNARY_LINEAR)
def unary(context: Context, node: Node) -> None:
    """x → x elementwise and linear."""
    x = next(node.inputs())
    for out in node.outputs:
        context.set(out, context.of(x))
    context.linear([x])


@rule("add", "sub", "add_", "sub_", "rsub")
def add(context: Context, node: Node) -> None:
    """Sums: partial only when every tensor operand is."""
    values = list(node.inputs())
    broadcast(context, values, node.outputs[0])
    numbers = [a for a in node.args[1:2] if isinstance(a, (int, float)) and a != 0]
    if not numbers and all(v.shape == node.outputs[0].shape or len(values) > 1 for v in values):
        context.linear(values)


@rule("mul", "mul_", "multiply")
def mul(context: Context, node: Node) -> None:
    """Products: linear in each operand alone."""
    values = list(node.inputs())
    broadcast(context, values, node.outputs[0])
    context.linear(*[[v] for v in values])


@rule("div", "div_", "true_divide")
def div(context: Context, node: Node) -> None:
    """Quotients: linear in the first operand, unless rounded."""
    values = list(node.inputs())
    broadcast(context, values, node.outputs[0])
    if node.kwargs.get("rounding_mode") is None and isinstance(node.args[0], Value) and values.count(node.args[0]) == 1:
        context.linear([node.args[0]])


@rule("where")
def where(context: Context, node: Node) -> None:
    """Selection by a mask: linear in the two branches together."""
    if len(node.args) < 3:
        context.opaque("the result's shape depends on data")
        return
    broadcast(context, list(node.inputs()), node.outputs[0])
    branches = [v for v in node.args[1:3] if isinstance(v, Value)]
    if len(branches) == 2 or all(a == 0 for a in node.args[1:3] if not isinstance(a, Value)):
        context.linear(branches)


@rule("masked_fill", "masked_fill_")
def masked_fill(context: Context, node: Node) -> None:
    """Filling under a mask: linear when the filling is 0."""
    values = [v for v in node.inputs() if v.shape]
    broadcast(context, values, node.outputs[0])
    if node.args[2] == 0 and not isinstance(node.args[2], Value):
        context.linear([node.args[0]])


@rule("copy_")
def copy(context: Context, node: Node) -> None:
    """dst takes src's content."""
    broadcast(context, [node.args[0], node.args[1]], node.outputs[0])
    context.linear([node.args[1], node.args[0]])


def pointwise(context: Context, node: Node) -> None:
    """Elementwise operators without a rule of their own."""
    values = [v for v in node.inputs() if v.shape]
    for out in node.outputs:
        broadcast(context, values, out)


# fmt: off
for _name in (
    "silu", "silu_", "gelu", "relu", "relu_", "softplus", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "elu", "celu",
    "selu", "mish", "log_sigmoid", "tanh", "sigmoid", "clamp", "clip", "erf", "isnan", "nan_to_num",
    "bitwise_not", "logical_not", "relu6", "hardshrink", "softshrink", "fill_", "abs", "addcmul", "addcdiv",
    "lerp", "isinf", "isfinite", "bitwise_and_", "threshold", "remainder", "floor_divide", "polar", "complex",
    "angle", "square", "sign",
):
    RULES.setdefault(_name, pointwise)
# fmt: on


@rule("isin")
def isin(context: Context, node: Node) -> None:
    """Membership in a set that every rank must see whole."""
    x, members = node.args[0], node.args[1]
    if isinstance(members, Value):
        for i in range(len(members.shape)):
            context.mix(members, i)
    if isinstance(x, Value):
        context.set(node.outputs[0], context.of(x))


# views ------------------------------------------------------------------------------------------------------------------------


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


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_copy")
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


@rule("transpose", "transpose_", "swapaxes")
def transpose(context: Context, node: Node) -> None:
    """Two dims change places."""
    x = node.args[0]
    dims = list(context.of(x))
    if dims:
        i, j = dim_of(node.args[1], x), dim_of(node.args[2], x)
        dims[i], dims[j] = dims[j], dims[i]
    context.set(node.outputs[0], dims)
    context.linear([x])


@rule("t", "numpy_T", "mT", "matrix_H", "adjoint", "mH")
def t(context: Context, node: Node) -> None:
    """Transposes of matrices."""
    x = node.args[0]
    dims = list(context.of(x))
    if len(dims) >= 2:
        dims[-1], dims[-2] = dims[-2], dims[-1]
    context.set(node.outputs[0], dims if len(dims) == 2 or node.opname != "numpy_T" else dims[::-1])
    context.linear([x])


@rule("permute")
def permute(context: Context, node: Node) -> None:
    """Dims change places."""
    x = node.args[0]
    context.set(node.outputs[0], [context.of(x)[dim_of(i, x)] for i in node.args[1]])
    context.linear([x])


@rule("squeeze", "squeeze_", "unsqueeze", "unsqueeze_")
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


@rule("expand", "expand_as", "broadcast_to")
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


@rule("repeat")
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


@rule("repeat_interleave")
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


# cuts and joins -----------------------------------------------------------------------------------------------------------------


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


@rule("split", "split_with_sizes", "chunk", "unsafe_split", "unsafe_chunk", "tensor_split")
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
    if node.opname == "tensor_split":
        if isinstance(arg(node, 1, "indices"), (list, tuple)):  # positions, from either end
            context.block(x, context.of(x)[d], "the dim is cut at positions")
    elif isinstance(wanted, (list, tuple)):
        for i, n in enumerate(wanted):
            context.demand(n, node.outputs[i], [pieces[i]], i, len(wanted))
    elif node.opname in ("split", "unsafe_split"):
        context.demand(wanted, node.outputs[0], [pieces[0]])


def _same_cut(a: Dim, b: Dim) -> bool:
    """Conservative only where the run would not notice: unequal local pieces fail the shape check of the replay."""
    return atoms.dim_size(a) == atoms.dim_size(b)


@rule("slice", "narrow", "slice_copy")
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
    if step != 1:
        _strided(context, x, out, d, step)
        return
    if (start, stop) == (0, n):
        context.set(out, context.of(x))
        return
    sizes = [start, stop - start, n - stop]
    before, piece, after = _cut(context, node, x, d, sizes) if stop > start else (atoms.new(n), atoms.new(0), [])
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


def _negative(number: int, x: Value, dims: list[Dim]) -> Any:
    from autotp.axes.analysis import Demand

    return Demand(number, x.id, tuple(tuple(d) for d in dims))


def _strided(context: Context, x: Value, out: Value, d: int, step: int) -> None:
    """Every `step`-th index: the minor factor is taken apart (an interleaved gate/up keeps its major factor)."""
    n = x.shape[d]
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


@rule("cat", "concat", "concatenate")
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


@rule("view_as_complex", "view_as_real")
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


@rule("stack")
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


@rule("unbind", "select", "select_copy")
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


@rule("constant_pad_nd", "pad")
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
