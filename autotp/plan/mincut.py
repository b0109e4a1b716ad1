"""A minimum cut with vertices that can be merged: where to place conversions at the least cost.

Each value is two vertices, before and after a possible conversion. The source side is "not converted yet" (a partial sum, an
unreduced gradient); what must be whole is on the sink side. An edge before → after has the conversion's cost; every other
edge is a demand and infinite.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import networkx as nx

Vertex = Hashable
SOURCE, SINK = "source", "sink"


class Cut:
    """Collects demands and costs, then solves."""

    def __init__(self) -> None:
        self._graph: Any = nx.DiGraph()
        self._graph.add_nodes_from((SOURCE, SINK))
        self._conversions: dict[Hashable, tuple[Vertex, Vertex]] = {}

    def convertible(self, key: Hashable, before: Vertex, after: Vertex, cost: float | None) -> None:
        """`key` can be converted between its two vertices at `cost` (None: cannot)."""
        self.implies(after, before)
        if cost is None:
            self.implies(before, after)
            return
        if self._graph.has_edge(before, after):
            edge = self._graph[before][after]
            if "capacity" in edge:
                edge["capacity"] += cost
        else:
            self._graph.add_edge(before, after, capacity=cost)
        self._conversions[key] = (before, after)

    def implies(self, a: Vertex, b: Vertex) -> None:
        """If `a` is unconverted, so is `b`."""
        self._graph.add_edge(a, b)

    def same(self, a: Vertex, b: Vertex) -> None:
        """Both are converted or neither is."""
        self.implies(a, b)
        self.implies(b, a)

    def born(self, vertex: Vertex) -> None:
        """`vertex` is unconverted."""
        self._graph.add_edge(SOURCE, vertex)

    def needed(self, vertex: Vertex) -> None:
        """`vertex` must be converted."""
        self._graph.add_edge(vertex, SINK)

    def solve(self) -> tuple[set[Hashable], set[Vertex]] | None:
        """The keys to convert and the vertices left unconverted; None where the demands contradict each other."""
        reach = nx.descendants(self._graph, SOURCE) | {SOURCE}
        if SINK not in reach:
            return set(), reach
        live = self._graph.subgraph(reach).copy()
        try:
            _, (source_side, _) = nx.minimum_cut(live, SOURCE, SINK)
        except nx.NetworkXUnbounded:
            return None
        chosen = {key for key, (a, b) in self._conversions.items() if a in source_side and b not in source_side}
        return chosen, source_side
