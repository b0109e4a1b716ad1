"""Finds the column-parallel Linears that read one tensor: they run together while training (`autotp.rewrite.modules.linears`)."""

from __future__ import annotations

from collections.abc import Sequence

from autotp.plan.conversions import Op
from autotp.plan.spec import ModulePlan
from autotp.planner.repeats import Rename, with_copies
from autotp.planner.traffic import Sources
from autotp.trace.graph import Graph, Pseudo, Value


def find_together(graph: Graph, modules: Sequence[ModulePlan], linears: frozenset[str]) -> tuple[tuple[str, ...], ...]:
    """Returns groups of paths, each in the order of the calls of the first traced path."""
    copied = {m.path for m in modules if m.path in linears and _only_copies(m)}
    enters = {(m.path, s.path) for m in modules for s in m.inputs if any(c.op is Op.COPY for c in s.conversions)}
    sources, groups, elsewhere = Sources(graph, modules), dict[int, dict[str, None]](), set[int | None]()
    for node in graph.nodes[: graph.results[0].stop if graph.results else None]:
        value = node.args[0] if node.op is Pseudo.ENTER and node.slot in enters else None
        if isinstance(value, Value) and node.slot is not None:
            source = sources.of(value)
            if source is not None and node.slot[0] in copied:
                groups.setdefault(source, {})[node.slot[0]] = None
            else:
                elsewhere.add(source)
    # where others copy the tensor too, all share one copy and one sum of its gradient
    found = [tuple(group) for source, group in groups.items() if source not in elsewhere]
    once = [group for group in found if not any(set(group) & set(other) for other in found if other is not group)]
    return tuple(group for _, group in with_copies(((group[0], group) for group in once), graph.repeats, _moved))


def _moved(group: tuple[str, ...], rename: Rename) -> tuple[str, ...]:
    return tuple(map(rename, group))


def _only_copies(m: ModulePlan) -> bool:
    inputs = [(s.path, tuple(c.op for c in s.conversions)) for s in m.inputs]
    return inputs == [(("input",), (Op.COPY,))] and not (m.outputs or m.uses or m.sites or m.attributes or m.joint)
