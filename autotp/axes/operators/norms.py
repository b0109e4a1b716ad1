"""Rules of norms."""

from __future__ import annotations

from autotp.axes import atoms
from autotp.axes.analysis import Context
from autotp.axes.operators.table import Is, Padded, arg, rule
from autotp.plan.spec import DistributedForm
from autotp.trace.graph import Node, values_in


@rule("layer_norm", padded=Padded.AS_FIRST, at=3)
@rule("rms_norm", padded=Padded.ZERO)
def norm(context: Context, node: Node) -> None:
    """The last dims are normalised: their statistic crosses ranks."""
    x, shape, out = node.args[0], node.args[1], node.outputs[0]
    form = DistributedForm.LAYER_NORM if node.opname == "layer_norm" else DistributedForm.RMS_NORM
    k = len(shape)
    for i in range(-k, 0):
        if k == 1:
            context.contract(x, i, form, whole=True)
        else:
            context.mix(x, i)
        for weight in values_in([arg(node, 2, "weight"), arg(node, 3, "bias")]):
            context.join(weight, context.of(weight)[i], x, context.of(x)[i])
        context.demand(shape[i], x, [context.of(x)[i]], k + i, k)
    context.set(out, context.of(x))


@rule("_weight_norm", padded=Padded.NORMED)
def weight_norm(context: Context, node: Node) -> None:
    """v · g / |v|: one factor for each index of one dim, and a norm over all others. Dim -1 stands for none: a norm of all."""
    v, g = node.args[0], node.args[1]
    kept = arg(node, 2, "dim", 0)
    for i in range(len(v.shape)):
        if i == kept:
            context.join(g, context.of(g)[i], v, context.of(v)[i])
        else:
            context.contract(v, i, DistributedForm.WEIGHT_NORM, whole=True)
    context.set(node.outputs[0], context.of(v))


@rule("group_norm", padded=Padded.AS_FIRST, at=3)
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


@rule("instance_norm", padded=Padded.AS_FIRST, at=2, traits=Is.UPDATES_STATISTICS)
def instance_norm(context: Context, node: Node) -> None:
    """Examples and channels are parallel, unless statistics are kept over examples."""
    x = node.args[0]
    kept = list(values_in(node.args[3:5]))
    for other in (*values_in(node.args[1:3]), *kept):
        context.join(other, context.of(other)[0], x, context.of(x)[1])
    for i in (*((0,) if kept else ()), *range(2, len(x.shape))):
        context.mix(x, i)
    context.set(node.outputs[0], context.of(x))


@rule("batch_norm", traits=Is.UPDATES_STATISTICS)
def batch_norm(context: Context, node: Node) -> None:
    """Channels are parallel."""
    x = node.args[0]
    for other in values_in(node.args[1:5]):
        context.join(other, context.of(other)[0], x, context.of(x)[1])
    for i in (0, *range(2, len(x.shape))):
        context.mix(x, i)
    context.set(node.outputs[0], context.of(x))
