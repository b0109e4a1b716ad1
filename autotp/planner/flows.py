"""Finds the values that gradients flow through."""

from __future__ import annotations

from autotp.axes.operators.table import Is, is_a
from autotp.trace.graph import Graph, Origin, Pseudo


def differentiable(graph: Graph, arguments: bool = True) -> set[int]:
    """Returns the values that a gradient can flow through: floats that depend on parameters or, with `arguments`, on float arguments of
    the model.

    The arguments and results of a template stand for those of all blocks alike. So its arguments count as those of every one of
    them: the first block of a decoder may start from zeros or from something detached, and the next ones not.
    """
    found = {v.id for v in graph.params.values() if v.dtype.is_floating_point}
    scopes: set[int] = set()  # autograd functions that a gradient reaches, also where their forward detaches
    again = True
    while again:
        again = False
        for node in graph.nodes:
            if node.op is Pseudo.REPEAT:
                for here, there in zip(*node.args, strict=True):
                    if here.id in found and there.id not in found:
                        found.add(there.id)
                        again = True
                continue
            if node.op is Pseudo.APPLY and any(v.id in found for v in node.inputs()):
                scopes.add(node.scope)
            if node.scope in scopes:
                found |= {o.id for o in node.outputs if o.dtype.is_floating_point or o.dtype.is_complex}
                continue
            if is_a(node, Is.DETACHES) or (node.outputs and all(o.id in graph.fills for o in node.outputs)):
                continue
            for v in node.inputs():
                if arguments and v.origin is Origin.INPUT and v.dtype.is_floating_point:
                    found.add(v.id)
            if any(v.id in found for v in node.inputs()):
                found |= {o.id for o in node.outputs if o.dtype.is_floating_point or o.dtype.is_complex}
    return found


def made_of_arguments(graph: Graph) -> set[int]:
    """Returns the values that depend on an argument of the model: parameters, and what is made of these alone, do not."""
    found: set[int] = set()
    for node in graph.nodes:
        if any(v.origin is Origin.INPUT or v.id in found for v in node.inputs()):
            found |= {o.id for o in node.outputs}
    return found
