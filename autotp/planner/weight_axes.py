"""Finds the axes whose size parameters say for good.

A weight of a product or a table says the size of what is multiplied with it. Where a parameter is only added (learned positions), code may
do otherwise with other lengths: ``x + positions if x.shape[1] == n else x``, an interpolation. So what it has may be a length.
"""

from __future__ import annotations

from collections.abc import Collection

from autotp.axes.analysis import Axes
from autotp.axes.atoms import Atom, flat
from autotp.axes.operators.table import Is, entry
from autotp.planner.partition import Atoms
from autotp.trace.graph import Origin, Value

_WEIGHTED = Is.PRODUCT | Is.CONVOLUTION | Is.LOOKUP


def weight_axes(axes: Axes, activations: Collection[int]) -> Atoms:
    """Returns the axes of whole dims of parameters and buffers that activations are multiplied with, or that they look up."""
    held: dict[int, set[Atom]] = {}  # value that no activation is part of → the axes of whole dims of the parameters that it is made of
    found: set[Atom] = set()
    for node in axes.graph.nodes:
        for v in node.inputs():
            if v.origin in (Origin.PARAM, Origin.BUFFER):
                held.setdefault(v.id, _of_whole_dims(axes, v))
        made = [v for v in node.inputs() if v.id in held]
        if not any(v.id in activations or v.origin is Origin.INPUT for v in node.inputs()):
            held.update((v.id, set().union(*(held[u.id] for u in made))) for v in node.outputs if made)
        elif (own := entry(node)) is not None and own.traits & _WEIGHTED:
            added = node.args[own.at] if own.at is not None and own.at < len(node.args) else None
            for v in made:
                if v is not added:
                    found |= held[v.id] & _of_whole_dims(axes, v)
    return frozenset(found)


def _of_whole_dims(axes: Axes, v: Value) -> set[Atom]:
    return {dim[0] for dim in map(flat, axes.dims.get(v.id, ())) if len(dim) == 1}
