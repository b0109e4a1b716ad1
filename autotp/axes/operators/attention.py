"""The rule of attention."""

from __future__ import annotations

from autotp.axes import atoms
from autotp.axes.analysis import Context
from autotp.axes.operators.table import Is, Padded, arg, rule
from autotp.trace.graph import Node, Value


@rule("scaled_dot_product_attention", padded=Padded.ATTENDED, traits=Is.ATTENTION)
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
