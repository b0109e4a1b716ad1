"""Rules of elementwise operators."""

from __future__ import annotations

from autotp.axes.analysis import Context
from autotp.axes.operators.table import RULES, broadcast, rule
from autotp.trace.graph import Node, Value

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
