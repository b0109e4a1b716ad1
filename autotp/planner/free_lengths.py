"""Says which axes may be longer in other calls than in the traced ones."""

from __future__ import annotations

from autotp.axes.analysis import Axes
from autotp.axes.atoms import Atom, flat, leaf_atoms
from autotp.planner.partition import Atoms
from autotp.planner.varying import unsettled
from autotp.trace.graph import Origin


def free_lengths(axes: Axes, of_parameters: Atoms, weights: Atoms) -> Atoms:
    """Returns the axes that no parameter or buffer brings: lengths of arguments, what operators make of them, rows of other tensors.

    A parameter says the size of one that is among `weights`, see `weight_axes`. One that a view puts into a dim of a parameter, as a
    factor, may be longer, if nothing says its size.
    """
    found = _brought(axes)
    dims = [flat(d) for v in axes.graph.params.values() for d in axes.dims.get(v.id, ())]
    whole = frozenset(d[0] for d in dims if len(d) == 1 and d[0] in found)
    factors = frozenset(a for d in dims if len(d) > 1 for a in d if a in found) - whole
    asked = factors | (whole & weights)
    return (found - of_parameters) | (whole - weights) | (unsettled(axes, asked, weights) if asked else asked)


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
