"""Lists what code between regions sends where hidden states are in token parts: `autotp.rewrite.sequence` says what it does with them."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from autotp.plan.conversions import CollectiveKind, When
from autotp.plan.spec import Traffic
from autotp.trace.graph import Graph, Pseudo, Value


def traffic_between(graph: Graph, tokens: frozenset[int], held: frozenset[int], by_token: frozenset[str]) -> Iterator[Traffic]:
    """Yields the collectives of operators in the first path's forward, and of their backward, under the names of traced modules.

    Args:
        graph: The trace.
        tokens: Values that are in token parts.
        held: Results that are part of another one's sum: zeros, whose gradient goes nowhere.
        by_token: Modules that run on rows; the gradients of their parameters are counted elsewhere.
    """
    if not graph.results:
        return
    trained = {v.id for v in graph.params.values()}
    weights = set(trained)  # made of parameters alone
    for node in graph.nodes[: graph.results[0].stop]:
        given = {v.id: v for v in node.inputs()}
        if not trained.isdisjoint(given):
            trained.update(v.id for v in node.outputs if v.dtype.is_floating_point and v.id not in held)
        if given and weights.issuperset(given):
            weights.update(v.id for v in node.outputs)
        parted = [v for v in given.values() if v.id in tokens]
        if not parted or isinstance(node.op, Pseudo) or node.module in by_token:
            continue
        if any(v.id in tokens for v in node.outputs):
            beside = (v for v in given.values() if v.id in trained and v.id not in tokens and v.shape)
            yield from (_sum(node.module, v, parted[0], v.id in weights) for v in beside)
        else:
            yield from (_gather(node.module, v) for v in parted)
    returned = {leaf.id: leaf for _, leaf in graph.results[0].leaves if isinstance(leaf, Value) and leaf.id in tokens}
    yield from (_gather("", v) for v in returned.values())


def _gather(module: str, x: Value) -> Traffic:
    return Traffic(module, CollectiveKind.ALL_GATHER, When.FORWARD, x.shape[-1], tokens=True)


def _sum(module: str, beside: Value, x: Value, is_weight: bool) -> Traffic:
    """The gradient of a tensor that is whole on every rank, and meets a rank's rows of `x`."""
    if is_weight:
        return Traffic(module, CollectiveKind.ALL_REDUCE, When.BACKWARD, 0, prod(beside.shape), tokens=True)
    if beside.shape[:-1] == x.shape[:-1]:  # each rank takes its rows
        return Traffic(module, CollectiveKind.ALL_GATHER, When.BACKWARD, beside.shape[-1], tokens=True)
    return Traffic(module, CollectiveKind.ALL_REDUCE, When.BACKWARD, beside.shape[-1], tokens=True)
