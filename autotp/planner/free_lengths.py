"""Says which axes may be longer in other calls than in the traced ones."""

from __future__ import annotations

from collections.abc import Collection

from autotp.axes.analysis import Axes
from autotp.axes.atoms import Atom, flat, leaf_atoms
from autotp.axes.operators.table import Is, entry
from autotp.planner.partition import Atoms
from autotp.planner.varying import unsettled
from autotp.trace.graph import Origin

_WEIGHTED = Is.PRODUCT | Is.CONVOLUTION | Is.LOOKUP


def free_lengths(axes: Axes, of_parameters: Atoms, activations: Collection[int]) -> Atoms:
    """Returns the axes that no parameter or buffer brings: lengths of arguments, what operators make of them, rows of other tensors.

    A parameter says the size of one where it is its weight in a product. Where it is only added (learned positions), code may do otherwise
    with other lengths (``if x.shape[1] == n``, an interpolation). One that a view puts into a dim of a parameter, as a factor, may be
    longer, if nothing says its size.
    """
    found = _brought(axes)
    dims = [flat(d) for v in axes.graph.params.values() for d in axes.dims.get(v.id, ())]
    whole = frozenset(d[0] for d in dims if len(d) == 1 and d[0] in found)
    factors = frozenset(a for d in dims if len(d) > 1 for a in d if a in found) - whole
    weights = _of_weights(axes, activations)
    asked = factors | (whole & weights)
    return (found - of_parameters) | (whole - weights) | (unsettled(axes, asked) if asked else asked)


def _brought(axes: Axes) -> Atoms:
    """Returns the axes that are met in an argument of the model, a constant or a result of an operator first."""
    held: set[Atom] = set()
    found: set[Atom] = set()
    for node in axes.graph.nodes:
        for v in node.inputs():
            own = {a for dim in axes.dims.get(v.id, ()) for a in leaf_atoms(dim)}
            (found if v.origin in (Origin.INPUT, Origin.CONST) else held).update(own - found - held)
        for v in node.outputs:
            found.update(a for dim in axes.dims.get(v.id, ()) for a in leaf_atoms(dim) if a not in held)
    return frozenset(found)


def _of_weights(axes: Axes, activations: Collection[int]) -> Atoms:
    """Returns the axes of whole dims of tensors that no argument is part of where they are multiplied with one that is, or looked up."""
    found: set[Atom] = set()
    for node in axes.graph.nodes:
        own = entry(node)
        if own is None or not own.traits & _WEIGHTED:
            continue
        added = node.args[own.at] if own.at is not None and own.at < len(node.args) else None
        for v in node.inputs():
            if v is not added and v.id not in activations and v.origin is not Origin.INPUT:
                found.update(dim[0] for dim in map(flat, axes.dims.get(v.id, ())) if len(dim) == 1)
    return frozenset(found)
