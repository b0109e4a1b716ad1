"""Rules of nodes that are no operators: crossings of module boundaries, writes, repeated blocks, autograd functions, hooks."""

from __future__ import annotations

from autotp.axes.analysis import Context
from autotp.axes.operators.table import Is, Padded, rule
from autotp.trace.graph import Node, Pseudo


@rule(
    Pseudo.ENTER,
    Pseudo.EXIT,
    padded=Padded.MOVED,
    traits=Is.SELECTION | Is.IDENTITY | Is.PASSES_SCORES | Is.PASSES_ARGUMENTS,
)
def crossing(context: Context, node: Node) -> None:
    """The same tensor on the other side of a module boundary; an axis may end there, and what leaves is gathered."""
    (value,), out = node.args, node.outputs[0]
    dims = list(context.of(value))
    if node.op is Pseudo.EXIT and node.slot is not None and (end := context.ends.get(node.slot[0])) is not None:
        dims[end] = context.of(out)[end]
    context.set(out, dims)
    context.linear([value])


@rule(Pseudo.WRITE, padded=Padded.MOVED, traits=Is.PASSES_ARGUMENTS | Is.MIXES)
def write(context: Context, node: Node) -> None:
    """A new version of a tensor whose storage was changed."""
    before, new = node.args
    context.set(node.outputs[0], context.of(before))
    context.linear([before, new])


@rule(Pseudo.REPEAT)
def repeat(context: Context, node: Node) -> None:
    """A block that was not run gets its arguments, and gives its results, as its template does."""
    here, there = node.args
    for a, b in zip(here, there, strict=True):
        for x, y in zip(context.of(a), context.of(b), strict=True):
            context.join(a, x, b, y)


@rule(Pseudo.APPLY)
def apply(context: Context, node: Node) -> None:
    """The arguments of an autograd function: sharded only where its backward was shown to allow it."""
    scope = context.graph.scopes[node.scope]
    for value in node.inputs():
        dims = context.of(value)
        for i, dim in enumerate(dims):
            if not scope.shown and i - len(dims) not in scope.local:
                context.block(value, dim, context.graph.sealed(node))


@rule(Pseudo.HOOK)
def hook(context: Context, node: Node) -> None:
    """A hook on a gradient."""
    context.opaque("a hook sees its gradient")


@rule(Pseudo.ESCAPE, Pseudo.BATCHED)
def escape(context: Context, node: Node) -> None:
    """A value that is used where nothing is recorded, or that is made there."""
    context.opaque("it is used inside a vmap")
