"""Finds conversions that a plan may not make on tensors that are changed in place.

A conversion makes a new tensor, so a change after it does not reach the tensor before it. And a tensor that outlives a call (a
buffer, an argument of the model, a constant) has to be the same on every rank when the call ends: no part, no summand. Running
statistics are the exception: each rank updates its channels, and the module puts the parts together (`autotp.plan.spec.Written`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from autotp.axes.operators.table import Is, is_a
from autotp.plan.conversions import Conversion, Op
from autotp.planner.aliases import outlives
from autotp.planner.calls import in_place
from autotp.planner.placements import NONE, GraphIndex, Labels
from autotp.trace.graph import Node, Value


def wrongly_changed(
    space: GraphIndex, labels: Labels, partial: frozenset[int], converted: Callable[[Value], Sequence[Conversion]]
) -> tuple[Node, str] | None:
    """Returns the first node that changes something where the plan does not allow it, and why.

    `converted`: the conversions between a value and the one that it is made of. `partial`: values that are partial sums.
    """
    storage = space.storage
    for node in storage.updates:
        if any(converted(v) for v in storage.apart(node)):
            return node, "a tensor is changed in place on one side of a conversion and used on the other"
    for node, target in storage.changes:
        path = storage.path(target)
        if any(c.op in (Op.COPY, Op.ONCE) for v in path for c in converted(v)):
            return node, "what enters a sharded region is changed in place there"
        if not outlives(path[-1]):
            continue
        if any(converted(v) for v in path):
            return node, "what outlives the call is changed in place behind a conversion"
        if is_a(node, Is.UPDATES_STATISTICS):
            continue
        new = node.outputs[0] if in_place(node) else target
        if labels.of(new) or labels.slices.get((node.index, target.id)) or new.id in partial:
            return node, "what outlives the call would be a part or a summand on each rank"
    return None


def statistics(space: GraphIndex, labels: Labels) -> Iterator[tuple[Node, Value]]:
    """Yields the nodes that update statistics of which each rank has a part, and the statistics."""
    for node, target in space.storage.changes:
        if is_a(node, Is.UPDATES_STATISTICS) and (labels.of(target) | labels.slices.get((node.index, target.id), NONE)):
            yield node, target
