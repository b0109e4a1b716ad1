"""Finds the code that holds values which are not simply whole: a rank's part, a summand, or a whole one whose gradient is a summand.

Code takes other paths than those that were traced, with modules and parameters of which the plan knows nothing. Where all that the
code holds is whole, they compute as on one device. In other code autotp refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping

from autotp.plan.spec import Boundary, Shown
from autotp.planner.assemble import Draft
from autotp.planner.repeats import with_copies
from autotp.trace.graph import Pseudo

_ORDER = (Shown.SUM, Shown.PART, Shown.GRADIENT)  # the one that fewest operators may meet first


def find_holding(draft: Draft, boundaries: Mapping[str, tuple[Boundary, ...]]) -> dict[str, Shown]:
    """Returns path of a module → what its own code holds that is not simply whole, the worst of it.

    A value whose gradient is a summand has uses in regions. These are operators of the code, or modules that have it at their boundary.
    """
    graph, labels, moves = draft.space.graph, draft.choice.labels, draft.moves
    found: dict[str, Shown] = {}

    def add(path: str, shown: Shown) -> None:
        found[path] = min(found.get(path, shown), shown, key=_ORDER.index)

    for node in graph.nodes:
        if isinstance(node.op, Pseudo):
            continue
        values = (*node.inputs(), *node.outputs)
        if any(v.id in moves.partial for v in values):
            add(node.module, Shown.SUM)
        elif any(labels.of(v) for v in values):
            add(node.module, Shown.PART)
    for path, slots in boundaries.items():
        for slot in slots:  # what the code makes of a summand that it gets is in its operators
            add(path, Shown.PART if slot.shown is Shown.PART else Shown.GRADIENT)
    for path, caller in graph.calls.values():
        if caller in graph.calls:
            for slot in boundaries.get(path, ()):
                add(graph.calls[caller][0], _around(slot.shown))
    return dict(with_copies(found.items(), graph.repeats))


def _around(shown: Shown) -> Shown:
    """What code holds that has a value at the boundary of a module that it calls."""
    return shown if shown in (Shown.PART, Shown.GRADIENT) else Shown.SUM
