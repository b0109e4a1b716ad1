"""Finds a minimum cut with vertices that can be merged, which places conversions at the least cost.

Each value is two vertices, before and after a possible conversion. The source side is "not converted yet" (a partial sum, an
unreduced gradient); values that must be whole are on the sink side. An edge before → after has the conversion's cost; every other
edge is a demand and infinite.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import networkx as nx

Vertex = Hashable
SOURCE, SINK = "source", "sink"


class MinCut:
    """Collects demands and costs, then solves."""

    def __init__(self) -> None:
        self._graph: Any = nx.DiGraph()
        self._conversions: dict[Hashable, tuple[int, int]] = {}
        self._number: dict[Vertex, int] = {}

    def _of(self, vertex: Vertex) -> int:
        """Vertices are numbered as they come: the solver's sets then have the same order in every process."""
        return self._number.setdefault(vertex, len(self._number))

    def convertible(self, key: Hashable, before: Vertex, after: Vertex, cost: float | None) -> None:
        """`key` can be converted between its two vertices at `cost` (None: cannot)."""
        self.implies(after, before)
        if cost is None:
            self.implies(before, after)
            return
        a, b = self._of(before), self._of(after)
        if self._graph.has_edge(a, b):
            edge = self._graph[a][b]
            if "capacity" in edge:
                edge["capacity"] += cost
        else:
            self._graph.add_edge(a, b, capacity=cost)
        self._conversions[key] = (a, b)

    def implies(self, a: Vertex, b: Vertex) -> None:
        """If `a` is unconverted, so is `b`."""
        self._graph.add_edge(self._of(a), self._of(b))

    def same(self, a: Vertex, b: Vertex) -> None:
        """Both are converted or neither is."""
        self.implies(a, b)
        self.implies(b, a)

    def born(self, vertex: Vertex) -> None:
        """`vertex` is unconverted."""
        self._graph.add_edge(self._of(SOURCE), self._of(vertex))

    def needed(self, vertex: Vertex) -> None:
        """`vertex` must be converted."""
        self._graph.add_edge(self._of(vertex), self._of(SINK))

    def solve(self) -> tuple[set[Hashable], set[Vertex]] | None:
        """The keys to convert and the vertices left unconverted; None where the demands contradict each other."""
        source, sink = self._of(SOURCE), self._of(SINK)
        self._graph.add_nodes_from((source, sink))
        reach = nx.descendants(self._graph, source) | {source}
        name = {number: vertex for vertex, number in self._number.items()}
        if sink not in reach:
            return set(), {name[n] for n in reach}
        live = nx.DiGraph()
        live.add_nodes_from(n for n in self._graph if n in reach)
        live.add_edges_from((a, b, d) for a, b, d in self._graph.edges(data=True) if a in reach and b in reach)
        try:
            _, (source_side, _) = nx.minimum_cut(live, source, sink)
        except nx.NetworkXUnbounded:
            return None
        chosen = {key for key, (a, b) in self._conversions.items() if a in source_side and b not in source_side}
        return chosen, {name[n] for n in source_side}
