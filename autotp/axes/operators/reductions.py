"""Rules of reductions, of what mixes along a dim, and of losses."""

from __future__ import annotations

from autotp.axes import atoms
from autotp.axes.analysis import Context
from autotp.axes.operators.table import Is, Padded, arg, broadcast, dim_of, dims_of, rule
from autotp.plan.spec import DistributedForm
from autotp.trace.graph import Node, Value


def reduced(context: Context, node: Node, x: Value, gone: list[int]) -> None:
    """Set the dims of the results of a reduction over `gone`."""
    for out in node.outputs:
        keep = len(out.shape) == len(x.shape)
        context.set(out, [[] if i in gone else d for i, d in enumerate(context.of(x)) if keep or i not in gone])


@rule("sum", "nansum", padded=Padded.ZERO)
@rule("mean", padded=Padded.MOVED)
def total(context: Context, node: Node) -> None:
    """Sums over a sharded dim are partial sums; means too, after division by the number of ranks."""
    x = node.args[0]
    gone = dims_of(arg(node, 1, "dim"), x)
    for i in gone:
        context.contract(x, i, DistributedForm.MEAN if node.opname == "mean" else None)
    reduced(context, node, x, gone)
    if node.opname != "nansum":  # a NaN in one summand is one in the sum, and only the sum is left out
        context.linear([x])


@rule("var", "linalg_vector_norm", "norm", padded=Padded.ZERO)
@rule("std", "var_mean", "std_mean")
def statistic(context: Context, node: Node) -> None:
    """Statistics along a dim: all-reduced where there is a distributed form."""
    x = node.args[0]
    overload = getattr(node.op, "_overloadname", "")
    form = None
    if node.opname.startswith(("var", "std")):
        form = DistributedForm.VAR if len(node.outputs) == 1 else None
        gone = dims_of(arg(node, 1, "dim"), x) if overload != "default" else dims_of(None, x)
    elif node.opname == "linalg_vector_norm":
        form = DistributedForm.VECTOR_NORM if arg(node, 1, "ord", 2) == 2 else None
        gone = dims_of(arg(node, 2, "dim"), x)
    else:
        gone = dims_of(arg(node, 2, "dim") if node.opname == "norm" else arg(node, 1, "dim"), x)
        if node.opname == "norm" and arg(node, 1, "p", 2) in (2, None):
            form = DistributedForm.VECTOR_NORM
    for i in gone:
        if form is None or x.dtype.is_complex:
            context.mix(x, i)
        else:
            context.contract(x, i, form, whole=True)
    reduced(context, node, x, gone)


@rule("amax", "amin", padded=Padded.MOVED)
@rule("max", "min", padded=Padded.MOVED, traits=Is.MIXES)
@rule("argmax", "argmin", "any", "all", "_is_any_true", "_is_all_true", "logsumexp", "count_nonzero", padded=Padded.FINITE)
@rule("prod", "median", "mode", "nanmedian", "kthvalue", "aminmax")
def extreme(context: Context, node: Node) -> None:
    """Reductions that are not sums; `max(a, b)` is elementwise."""
    values = list(node.inputs())
    if len(values) == 2:
        broadcast(context, values, node.outputs[0])
        return
    x = values[0]
    gone = dims_of(arg(node, 2, "dim", -1) if node.opname == "kthvalue" else arg(node, 1, "dim"), x)
    for i in gone:
        context.mix(x, i)
    reduced(context, node, x, gone)


@rule("softmax", "_softmax", padded=Padded.FINITE, traits=Is.SOFTMAX)
@rule("log_softmax", "_log_softmax", "argsort", padded=Padded.FINITE)
@rule("cumsum", "sort", "cumsum_", padded=Padded.ZERO)
@rule("cumprod", "logcumsumexp", "cummax", "fft_fft", "fft_ifft", "msort")
@rule("flip", "roll", padded=Padded.MOVED)
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


@rule("topk", padded=Padded.ZERO)
def topk(context: Context, node: Node) -> None:
    """The k largest along a dim."""
    x = node.args[0]
    d = dim_of(arg(node, 2, "dim", -1), x)
    context.mix(x, d)
    fresh = atoms.new(node.outputs[0].shape[d])
    for out in node.outputs:
        context.set(out, [fresh if i == d else dim for i, dim in enumerate(context.of(x))])


@rule("tril", "triu", "tril_", "triu_", padded=Padded.MOVED, traits=Is.FILLS)
def triangle(context: Context, node: Node) -> None:
    """Positions of the last two dims matter."""
    x = node.args[0]
    context.mix(x, -1)
    context.mix(x, -2)
    context.set(node.outputs[0], context.of(x))


@rule("glu", padded=Padded.FINITE)
def glu(context: Context, node: Node) -> None:
    """Two halves of a dim, multiplied."""
    x, out = node.args[0], node.outputs[0]
    d = dim_of(arg(node, 1, "dim", -1), x)
    a, b = atoms.cut(context.of(x)[d], [x.shape[d] // 2] * 2)
    context.join(x, a, x, b)
    context.set(out, [a if i == d else dim for i, dim in enumerate(context.of(x))])


@rule("mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits")
def loss_of_elements(context: Context, node: Node) -> None:
    """Losses of each element, which may be summed up."""
    weights = {"binary_cross_entropy": 1, "binary_cross_entropy_with_logits": 2}.get(node.opname, 0)
    if arg(node, 2 + weights, "reduction", 1) == 0:
        broadcast(context, list(node.inputs()), node.outputs[0])
    else:
        loss(context, node)


@rule("cross_entropy_loss", "nll_loss", "nll_loss_nd", "kl_div")
def loss(context: Context, node: Node) -> None:
    """Losses see whole dims."""
    context.opaque(f"{node.opname} needs whole dims")
