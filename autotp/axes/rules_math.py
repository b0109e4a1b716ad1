"""Rules of products, reductions, norms, attention, losses and constructors."""

from __future__ import annotations

from autotp.axes import atoms
from autotp.axes.analysis import Context
from autotp.axes.atoms import Dim
from autotp.axes.kernel import Kernel
from autotp.axes.rules_basic import arg, broadcast, dim_of, dims_of, rule
from autotp.trace.graph import Node, Value, values_in

# products -----------------------------------------------------------------------------------------------------------------------


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


@rule("linear")
def linear(context: Context, node: Node) -> None:
    """x [..., i] · w [o, i] + b [o]."""
    x, w, out = node.args[0], node.args[1], node.outputs[0]
    product(context, x, -1, w, -1)
    context.set(out, [*context.of(x)[:-1], *context.of(w)[:-1]])
    bias = arg(node, 2, "bias")
    _bias(context, bias, out)
    if bias is None:
        context.linear([x], [w])


@rule("addmm", "baddbmm")
def addmm(context: Context, node: Node) -> None:
    """bias + a · b."""
    bias, a, b = node.args[:3]
    out = node.outputs[0]
    product(context, a, -1, b, -2)
    if len(a.shape) == 3:
        context.join(a, context.of(a)[0], b, context.of(b)[0])
    context.set(out, [*context.of(a)[:-1], context.of(b)[-1]])
    _bias(context, bias, out)


@rule("mm", "bmm", "matmul", "mv", "dot", "vdot")
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


@rule("einsum")
def einsum(context: Context, node: Node) -> None:
    """Named dims: equal letters join, letters absent from the result are summed."""
    equation: str = node.args[0].replace(" ", "")
    values = list(values_in(node.args[1]))
    if "->" not in equation:
        letters = equation.replace(",", "")
        equation += "->" + "".join(sorted(c for c in set(letters) if letters.count(c) == 1 and c.isalpha()))
    left, right = equation.split("->")
    if "..." in equation:
        width = max(len(v.shape) - len(t.replace("...", "")) for v, t in zip(values, left.split(","), strict=True))
        free = [c for c in "ZYXWVUTSRQPO" if c not in equation][:width]
        terms = []
        for v, term in zip(values, left.split(","), strict=True):
            own = len(v.shape) - len(term.replace("...", ""))
            terms.append(term.replace("...", "".join(free[width - own :])))
        left, right = ",".join(terms), right.replace("...", "".join(free))
    named: dict[str, tuple[Value, Dim]] = {}
    for value, term in zip(values, left.split(","), strict=True):
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
    context.linear(*[[v] for v in values])


@rule("_grouped_mm")
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


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def conv(context: Context, node: Node) -> None:
    """Channels: contracted (groups 1) or parallel (depthwise); positions are mixed."""
    x, w, bias = node.args[0], node.args[1], arg(node, 2, "bias")
    out = node.outputs[0]
    groups = arg(node, 6, "groups", 1) if node.opname.startswith("conv") and node.opname[4:5].isdigit() else 0
    spatial = len(w.shape) - 2
    channel = len(x.shape) - spatial - 1
    dims = [*context.of(x)[:channel], [], *[atoms.new(n) for n in out.shape[channel + 1 :]]]
    if out.id in context.dims:
        dims[channel + 1 :] = context.dims[out.id][channel + 1 :]
    for i in range(channel + 1, len(x.shape)):
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
    else:
        context.opaque("a grouped convolution")
        return
    context.set(out, dims)
    if isinstance(bias, Value):
        context.join(bias, context.of(bias)[0], out, dims[channel])
        context.meaning.once.append(bias.id)
    else:
        context.linear([x], [w])


# attention ----------------------------------------------------------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def sdpa(context: Context, node: Node) -> None:
    """q [..., h, t, d], k and v [..., kv, s, d]: heads are parallel; positions and the q·k width are mixed."""
    q, k, v, out = *node.args[:3], node.outputs[0]
    mask = arg(node, 3, "attn_mask")
    for name, value in (("query·key product", q), ("query·key product", k)):
        context.block(value, context.of(value)[-1], f"{name} under a softmax")
    context.join(q, context.of(q)[-1], k, context.of(k)[-1])
    context.join(k, context.of(k)[-2], v, context.of(v)[-2])
    context.mix(k, -2)
    context.mix(v, -2)
    batch = []
    for i in range(len(q.shape) - 2):
        dim = context.of(q)[i]
        for other in (k, v):
            if other.shape[i] == q.shape[i]:
                context.join(q, dim, other, context.of(other)[i])
            elif other.shape[i] != 1:
                major, _ = atoms.split(dim, [other.shape[i], q.shape[i] // other.shape[i]])
                context.join(q, major, other, context.of(other)[i])
        batch.append(dim)
    context.set(out, [*batch, context.of(q)[-2], context.of(v)[-1]])
    if isinstance(mask, Value):
        scores = [*batch, context.of(q)[-2], context.of(k)[-2]]
        for i in range(1, len(mask.shape) + 1):
            if mask.shape[-i] != 1:
                context.join(mask, context.of(mask)[-i], q, scores[-i])
        if mask.shape[-1] != 1:
            context.mix(mask, -1)
    if arg(node, 5, "is_causal", False):
        context.block(q, context.of(q)[-2], "a causal mask counts the positions of the queries")
    context.linear([v])


# reductions ---------------------------------------------------------------------------------------------------------------------


def reduced(context: Context, node: Node, x: Value, gone: list[int]) -> None:
    """Set the dims of the results of a reduction over `gone`."""
    for out in node.outputs:
        keep = len(out.shape) == len(x.shape)
        context.set(out, [[] if i in gone else d for i, d in enumerate(context.of(x)) if keep or i not in gone])


@rule("sum", "mean", "nansum")
def total(context: Context, node: Node) -> None:
    """Sums over a sharded dim are partial sums; means too, after division by the number of ranks."""
    x = node.args[0]
    gone = dims_of(arg(node, 1, "dim"), x)
    for i in gone:
        context.contract(x, i, Kernel.MEAN if node.opname == "mean" else None)
    reduced(context, node, x, gone)
    if node.opname != "nansum":  # a NaN in one summand is one in the sum, and only the sum is left out
        context.linear([x])


@rule("var", "std", "linalg_vector_norm", "norm", "var_mean", "std_mean")
def statistic(context: Context, node: Node) -> None:
    """Statistics along a dim: all-reduced where there is a distributed form."""
    x = node.args[0]
    overload = getattr(node.op, "_overloadname", "")
    kernel = None
    if node.opname.startswith(("var", "std")):
        kernel = Kernel.VAR if len(node.outputs) == 1 else None
        gone = dims_of(arg(node, 1, "dim"), x) if overload != "default" else dims_of(None, x)
    elif node.opname == "linalg_vector_norm":
        kernel = Kernel.VECTOR_NORM if arg(node, 1, "ord", 2) == 2 else None
        gone = dims_of(arg(node, 2, "dim"), x)
    else:
        gone = dims_of(arg(node, 2, "dim") if node.opname == "norm" else arg(node, 1, "dim"), x)
        if node.opname == "norm" and arg(node, 1, "p", 2) in (2, None):
            kernel = Kernel.VECTOR_NORM
    for i in gone:
        if kernel is None or x.dtype.is_complex:
            context.mix(x, i)
        else:
            context.contract(x, i, kernel, whole=True)
    reduced(context, node, x, gone)


@rule("amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "logsumexp", "prod", "median", "mode", "count_nonzero")
def extreme(context: Context, node: Node) -> None:
    """Reductions that are not sums; `max(a, b)` is elementwise."""
    values = list(node.inputs())
    if len(values) == 2:
        broadcast(context, values, node.outputs[0])
        return
    x = values[0]
    gone = dims_of(arg(node, 1, "dim"), x)
    for i in gone:
        context.mix(x, i)
    reduced(context, node, x, gone)


@rule(
    "softmax",
    "log_softmax",
    "_softmax",
    "_log_softmax",
    "cumsum",
    "cumprod",
    "logcumsumexp",
    "cummax",
    "sort",
    "argsort",
    "flip",
    "roll",
    "cumsum_",
    "fft_fft",
    "fft_ifft",
    "msort",
)
def along(context: Context, node: Node) -> None:
    """Operators that mix along one dim (or several) and leave the others alone."""
    x = node.args[0]
    where = {
        "flip": (1, "dims"),
        "roll": (2, "dims"),
        "argsort": (1, "dim"),
        "sort": (1, "dim"),
        "fft_fft": (2, "dim"),
        "fft_ifft": (2, "dim"),
    }
    position, name = where.get(node.opname, (1, "dim"))
    index = arg(node, position, name, -1 if node.opname in ("sort", "argsort") else None)
    if isinstance(index, bool) or (node.opname in ("sort", "argsort") and not isinstance(index, int)):
        index = None
    for i in dims_of(index, x):
        context.mix(x, i)
    for out in node.outputs:
        if out.shape == x.shape:
            context.set(out, context.of(x))
        else:
            context.opaque()


@rule("topk")
def topk(context: Context, node: Node) -> None:
    """The k largest along a dim."""
    x = node.args[0]
    d = dim_of(arg(node, 2, "dim", -1), x)
    context.mix(x, d)
    fresh = atoms.new(node.outputs[0].shape[d])
    for out in node.outputs:
        context.set(out, [fresh if i == d else dim for i, dim in enumerate(context.of(x))])


@rule("tril", "triu", "tril_", "triu_")
def triangle(context: Context, node: Node) -> None:
    """Positions of the last two dims matter."""
    x = node.args[0]
    context.mix(x, -1)
    context.mix(x, -2)
    context.set(node.outputs[0], context.of(x))


@rule("linalg_solve_triangular", "linalg_solve")
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


@rule("glu")
def glu(context: Context, node: Node) -> None:
    """Two halves of a dim, multiplied."""
    x, out = node.args[0], node.outputs[0]
    d = dim_of(arg(node, 1, "dim", -1), x)
    a, b = atoms.cut(context.of(x)[d], [x.shape[d] // 2] * 2)
    context.join(x, a, x, b)
    context.set(out, [a if i == d else dim for i, dim in enumerate(context.of(x))])


# norms --------------------------------------------------------------------------------------------------------------------------


@rule("layer_norm", "rms_norm")
def norm(context: Context, node: Node) -> None:
    """The last dims are normalised: their statistic crosses ranks."""
    x, shape, out = node.args[0], node.args[1], node.outputs[0]
    kernel = Kernel.LAYER_NORM if node.opname == "layer_norm" else Kernel.RMS_NORM
    k = len(shape)
    for i in range(-k, 0):
        if k == 1:
            context.contract(x, i, kernel, whole=True)
        else:
            context.mix(x, i)
        for weight in values_in([arg(node, 2, "weight"), arg(node, 3, "bias")]):
            context.join(weight, context.of(weight)[i], x, context.of(x)[i])
        context.demand(shape[i], x, [context.of(x)[i]], k + i, k)
    context.set(out, context.of(x))


@rule("group_norm")
def group_norm(context: Context, node: Node) -> None:
    """Channels in groups: groups are parallel, what is inside one is mixed."""
    x, groups = node.args[0], node.args[1]
    major, minor = atoms.split(context.of(x)[1], [groups, x.shape[1] // groups])
    context.block(x, minor, "group_norm mixes the channels of a group")
    for i in range(2, len(x.shape)):
        context.mix(x, i)
    for weight in values_in(node.args[2:4]):
        context.join(weight, context.of(weight)[0], x, context.of(x)[1])
    context.set(node.outputs[0], context.of(x))
    context.demand(groups, x, [major])


@rule("batch_norm")
def batch_norm(context: Context, node: Node) -> None:
    """Channels are parallel."""
    x = node.args[0]
    for other in values_in(node.args[1:5]):
        context.join(other, context.of(other)[0], x, context.of(x)[1])
    for i in (0, *range(2, len(x.shape))):
        context.mix(x, i)
    context.set(node.outputs[0], context.of(x))


# losses ---------------------------------------------------------------------------------------------------------------------------


@rule(
    "cross_entropy_loss", "nll_loss", "nll_loss_nd", "kl_div", "mse_loss", "binary_cross_entropy_with_logits", "l1_loss", "smooth_l1_loss"
)
def loss(context: Context, node: Node) -> None:
    """Losses see whole dims."""
    context.opaque(f"{node.opname} needs whole dims")


# constructors -------------------------------------------------------------------------------------------------------------------


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")
def filled(context: Context, node: Node) -> None:
    """Constants of one value: they may follow any axis."""
    out = node.outputs[0]
    dims = context.of(out)
    context.meaning.generates = True
    sizes = next((a for a in node.args if isinstance(a, (list, tuple))), None)
    if sizes is not None:
        for i, n in enumerate(sizes):
            context.demand(n, out, [dims[i]], i, len(sizes))


@rule("zeros_like", "ones_like", "full_like", "empty_like")
def filled_like(context: Context, node: Node) -> None:
    """Constants of one value in the shape of another tensor."""
    context.set(node.outputs[0], context.of(node.args[0]))
    if node.opname == "zeros_like":
        context.linear([node.args[0]])


@rule("arange", "eye", "linspace", "tril_indices", "triu_indices", "rand", "randn", "randint", "randperm", "hann_window")
def positions(context: Context, node: Node) -> None:
    """Constants that know their position: whole on every rank."""
    for out in node.outputs:
        context.of(out)


@rule(
    "bernoulli",
    "rand_like",
    "randn_like",
    "randint_like",
    "multinomial",
    "normal",
    "uniform_",
    "normal_",
    "bernoulli_",
    "exponential_",
    "rrelu",
)
def random(context: Context, node: Node) -> None:
    """Random numbers: whole, so that every rank draws the same."""
    context.opaque(f"{node.opname} draws random numbers")
