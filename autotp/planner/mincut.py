"""Finds a minimum cut with vertices that can be merged, which places conversions at the least cost.

Each value is two vertices, before and after a possible conversion. The source side is "not converted yet" (a partial sum, an
unreduced gradient); values that must be whole are on the sink side. An edge before → after has the conversion's cost; every other
edge is a demand and infinite. Of all cuts of the least cost it is the one with the largest source side: conversions stand late.

Vertices that demand each other are one. Most are, so the flow is found on what is left, in whole numbers: it is exact.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from math import ldexp

import networkx as nx

Vertex = Hashable
SOURCE, SINK = "source", "sink"
_BITS = 60  # costs are whole numbers of 2⁻⁶⁰: a double of at least 1 is one of 2⁻⁵²


class MinCut:
    """Collects demands and costs, then solves."""

    def __init__(self) -> None:
        self._number: dict[Vertex, int] = {}
        self._parent: list[int] = []  # of a union of vertices that are one
        self._demands: list[tuple[int, int]] = []
        self._costs: dict[tuple[int, int], int] = {}
        self._conversions: dict[Hashable, tuple[int, int]] = {}

    def _of(self, vertex: Vertex) -> int:
        number = self._number.get(vertex)
        if number is None:
            number = self._number[vertex] = len(self._parent)
            self._parent.append(number)
        return number

    def _root(self, number: int) -> int:
        parent = self._parent
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    def convertible(self, key: Hashable, before: Vertex, after: Vertex, cost: float | None) -> None:
        """`key` can be converted between its two vertices at `cost` (None: cannot)."""
        if cost is None:
            self.same(before, after)
            return
        edge = self._of(before), self._of(after)
        self._demands.append(edge[::-1])
        self._costs[edge] = self._costs.get(edge, 0) + int(ldexp(cost, _BITS))
        self._conversions[key] = edge

    def implies(self, a: Vertex, b: Vertex) -> None:
        """If `a` is unconverted, so is `b`."""
        self._demands.append((self._of(a), self._of(b)))

    def same(self, a: Vertex, b: Vertex) -> None:
        """Both are converted or neither is."""
        self._parent[self._root(self._of(a))] = self._root(self._of(b))

    def born(self, vertex: Vertex) -> None:
        """`vertex` is unconverted."""
        self.implies(SOURCE, vertex)

    def needed(self, vertex: Vertex) -> None:
        """`vertex` must be converted."""
        self.implies(vertex, SINK)

    def solve(self) -> tuple[set[Hashable], set[Vertex]] | None:
        """The keys to convert and the vertices left unconverted; None where the demands contradict each other."""
        source, sink = self._of(SOURCE), self._of(SINK)
        roots = [self._root(n) for n in range(len(self._parent))]
        source, sink = roots[source], roots[sink]
        demands, costs = {(roots[a], roots[b]) for a, b in self._demands}, dict[tuple[int, int], int]()
        for (a, b), cost in self._costs.items():
            costs[roots[a], roots[b]] = costs.get((roots[a], roots[b]), 0) + cost
        live = _reached(source, [*demands, *costs])
        unconverted = _reached(source, demands)
        if sink in unconverted:
            return None
        at = {**dict.fromkeys(unconverted, source), **dict.fromkeys(_reached(sink, [(b, a) for a, b in demands]), sink)}
        capacities = dict[tuple[int, int], int]()
        unbounded = sum(costs.values()) + 1
        for (a, b), capacity in (*costs.items(), *((edge, unbounded) for edge in demands)):
            edge = at.get(a, a), at.get(b, b)
            if a in live and b in live and edge[0] != edge[1]:
                capacities[edge] = capacities.get(edge, 0) + capacity
        unconverted = _unconverted(source, sink, capacities)
        side = [n in live and at.get(n, n) in unconverted for n in roots]
        chosen = {key for key, (a, b) in self._conversions.items() if side[a] and not side[b]}
        return chosen, {vertex for vertex, n in self._number.items() if side[n]}


def _reached(start: int, edges: Iterable[tuple[int, int]]) -> set[int]:
    ends: dict[int, list[int]] = {}
    for a, b in edges:
        ends.setdefault(a, []).append(b)
    seen, queue = {start}, [start]
    while queue:
        for n in ends.get(queue.pop(), ()):
            if n not in seen:
                seen.add(n)
                queue.append(n)
    return seen


def _unconverted(source: int, sink: int, capacities: Mapping[tuple[int, int], int]) -> set[int]:
    graph = nx.DiGraph()
    graph.add_nodes_from((source, sink))
    graph.add_edges_from((a, b, {"capacity": capacity}) for (a, b), capacity in capacities.items())
    found: set[int] = nx.minimum_cut(graph, source, sink)[1][0]  # those from which no more could flow into the sink
    return found
