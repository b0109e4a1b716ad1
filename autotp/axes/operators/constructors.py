"""Rules of operators that make tensors."""

from __future__ import annotations

from autotp.axes.analysis import Context
from autotp.axes.operators.table import Padded, rule
from autotp.trace.graph import Node


@rule("zeros", "ones", "full", "empty", "scalar_tensor")
@rule("new_zeros", "new_ones", "new_full", "new_empty", padded=Padded.FINITE)
def filled(context: Context, node: Node) -> None:
    """Constants of one value: they may follow any axis."""
    out = node.outputs[0]
    dims = context.of(out)
    context.meaning.generates = True
    sizes = next((a for a in node.args if isinstance(a, (list, tuple))), None)
    if sizes is not None:
        for i, n in enumerate(sizes):
            context.demand(n, out, [dims[i]], i, len(sizes))


@rule("zeros_like", "ones_like", "full_like", "empty_like", padded=Padded.FINITE)
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
