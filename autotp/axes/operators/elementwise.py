"""Rules of elementwise operators."""

from __future__ import annotations

from autotp.axes.analysis import Context
from autotp.axes.operators.table import Is, Padded, broadcast, rule
from autotp.trace.graph import Node, Value


@rule("neg", padded=Padded.TOTAL)
@rule(
    "to", "_to_copy", "clone", "contiguous", padded=Padded.MOVED, traits=Is.IDENTITY | Is.PASSES_ARGUMENTS | Is.PASSES_SCORES | Is.SELECTION
)
@rule("detach", padded=Padded.MOVED, traits=Is.DETACHES | Is.SELECTION)
@rule("type_as", padded=Padded.MOVED, traits=Is.PASSES_SCORES)
@rule("detach_", "lift_fresh_copy", "positive", "resolve_conj", "resolve_neg", "real", padded=Padded.MOVED)
@rule("alias", padded=Padded.MOVED, traits=Is.IDENTITY | Is.SELECTION)
@rule("lift_fresh", padded=Padded.MOVED, traits=Is.FRESH)
@rule("dropout", padded=Padded.MOVED, traits=Is.FILLS | Is.DROPOUT | Is.ON_LAST_DIM | Is.PASSES_SCORES)
@rule("zero_", "_conj")
def unary(context: Context, node: Node) -> None:
    """x → x elementwise and linear."""
    x = next(node.inputs())
    for out in node.outputs:
        context.set(out, context.of(x))
    context.linear([x])


@rule("add", "add_", padded=Padded.TOTAL, traits=Is.PASSES_SCORES | Is.SUM)
@rule("sub", padded=Padded.TOTAL, traits=Is.DIFFERENCE | Is.PASSES_SCORES)
@rule("sub_", padded=Padded.TOTAL, traits=Is.DIFFERENCE)
@rule("rsub", padded=Padded.TOTAL)
def add(context: Context, node: Node) -> None:
    """Sums: partial only when every tensor operand is."""
    values = list(node.inputs())
    broadcast(context, values, node.outputs[0])
    numbers = [a for a in node.args[1:2] if isinstance(a, (int, float)) and a != 0]
    if not numbers and all(v.shape == node.outputs[0].shape or len(values) > 1 for v in values):
        context.linear(values)


@rule("mul", "mul_", padded=Padded.MULTIPLIED, traits=Is.PASSES_SCORES)
@rule("multiply", padded=Padded.MULTIPLIED)
def mul(context: Context, node: Node) -> None:
    """Products: linear in each operand alone."""
    values = list(node.inputs())
    broadcast(context, values, node.outputs[0])
    context.linear(*[[v] for v in values])


@rule("div", "div_", padded=Padded.DIVIDED, traits=Is.PASSES_SCORES)
@rule("true_divide", padded=Padded.DIVIDED)
def div(context: Context, node: Node) -> None:
    """Quotients: linear in the first operand, unless rounded."""
    values = list(node.inputs())
    broadcast(context, values, node.outputs[0])
    if node.kwargs.get("rounding_mode") is None and isinstance(node.args[0], Value) and values.count(node.args[0]) == 1:
        context.linear([node.args[0]])


@rule("where", padded=Padded.CHOSEN, traits=Is.PASSES_ARGUMENTS | Is.PASSES_SCORES, at=0)
def where(context: Context, node: Node) -> None:
    """Selection by a mask: linear in the two branches together."""
    if len(node.args) < 3:
        context.opaque("the result's shape depends on data")
        return
    broadcast(context, list(node.inputs()), node.outputs[0])
    branches = [v for v in node.args[1:3] if isinstance(v, Value)]
    if len(branches) == 2 or all(a == 0 for a in node.args[1:3] if not isinstance(a, Value)):
        context.linear(branches)


@rule("masked_fill", padded=Padded.CHOSEN, traits=Is.PASSES_ARGUMENTS | Is.PASSES_SCORES, at=1)
@rule("masked_fill_", padded=Padded.CHOSEN, traits=Is.PASSES_SCORES, at=1)
def masked_fill(context: Context, node: Node) -> None:
    """Filling under a mask: linear when the filling is 0."""
    values = [v for v in node.inputs() if v.shape]
    broadcast(context, values, node.outputs[0])
    if node.args[2] == 0 and not isinstance(node.args[2], Value):
        context.linear([node.args[0]])


@rule("copy_", padded=Padded.MOVED, traits=Is.MIXES | Is.PASSES_ARGUMENTS)
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
rule(
    "silu", "silu_", "gelu", "relu", "relu_", "softplus", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "elu",
    "celu", "selu", "mish", "log_sigmoid", "sigmoid", "clamp", "clip", "erf", "isnan", "bitwise_not", "logical_not", "relu6",
    "fill_", "abs", "addcmul", "lerp", "isinf", "isfinite", "bitwise_and_", "threshold", "complex", "square", "sign", "atan",
    "bitwise_and", "bitwise_or", "ceil", "clamp_max", "clamp_min", "cos", "eq", "erfc", "exp", "exp2", "expm1", "floor",
    "ge", "gt", "le", "logical_and", "logical_or", "lt", "maximum", "minimum", "ne", "round", "sin",
    padded=Padded.TOTAL,
)(pointwise)
rule(
    "tanh", "nan_to_num",
    padded=Padded.TOTAL,
    traits=Is.PASSES_SCORES,
)(pointwise)
rule(
    "hardshrink", "softshrink", "addcdiv", "remainder", "floor_divide", "polar", "angle",
)(pointwise)
rule(
    "pow",
    padded=Padded.POWER,
)(pointwise)
# fmt: on


@rule("prelu", padded=Padded.AS_FIRST)
def prelu(context: Context, node: Node) -> None:
    """Channels have a slope each, or all share one."""
    x, slopes = node.args
    if slopes.shape not in ((), (1,)):
        context.join(slopes, context.of(slopes)[0], x, context.of(x)[1])
    context.set(node.outputs[0], context.of(x))


@rule("isin", padded=Padded.TOTAL)
def isin(context: Context, node: Node) -> None:
    """Membership in a set that every rank must see whole."""
    x, members = node.args[0], node.args[1]
    if isinstance(members, Value):
        for i in range(len(members.shape)):
            context.mix(members, i)
    if isinstance(x, Value):
        context.set(node.outputs[0], context.of(x))
