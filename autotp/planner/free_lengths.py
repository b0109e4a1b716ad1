"""Says which axes may be longer in other calls than in the traced ones."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from autotp.axes.analysis import Axes
from autotp.axes.atoms import Atom, axes_in, flat, leaf_atoms
from autotp.planner.partition import Atoms
from autotp.planner.varying import Asked, unsettled, written
from autotp.trace.graph import Origin
from autotp.trace.ints import SizeRef, leaves


def free_lengths(axes: Axes, asked: Sequence[Asked], weights: Atoms, activations: Collection[int]) -> Atoms:
    """Returns the axes that no parameter or buffer brings: lengths of arguments, what operators make of them, rows of other tensors.

    A parameter says the size of one that is among `weights`, see `weight_axes`. One that only a view makes of others is no length where a
    number of the code, or a dim of a parameter without lengths, says its size. `asked`: see `asked_sizes`.
    """
    found, pieces = _brought(axes, activations)
    dims = [flat(d) for v in axes.graph.params.values() for d in axes.dims.get(v.id, ())]
    own = frozenset(d[0] for d in dims if len(d) == 1) & found & weights
    fixed = own - unsettled(axes, asked, own)
    whole = found - pieces - fixed
    inside = pieces & frozenset(a for d in dims for a in leaf_atoms(d))
    said = written(asked, [d for d in dims if whole.isdisjoint(leaf_atoms(d))], pieces)
    alone = {a for each in asked if len(each.axes) == 1 and not each.sized for a in each.axes}
    return (found - fixed) - (inside & said - (_of_arguments(axes) - alone))


def _of_arguments(axes: Axes) -> Atoms:
    """Returns the axes that are factors of a dim of an argument: one of them at least is as long as the argument."""
    given = (v for node in axes.graph.nodes for v in node.inputs() if v.origin is Origin.INPUT)
    return frozenset(a for v in given for dim in map(flat, axes.dims.get(v.id, ())) if len(dim) > 1 for a in leaf_atoms(dim))


def _brought(axes: Axes, activations: Collection[int]) -> tuple[Atoms, Atoms]:
    """Returns the axes that are met in an argument of the model, a constant or a result of an operator first, and those of them that are
    only a part of a dim there.
    """
    held: set[Atom] = set()
    found: set[Atom] = set()
    pieces: set[Atom] = set()
    seen: set[int] = set()
    for node in axes.graph.nodes:
        sized = any(isinstance(leaf, SizeRef) for expr in node.ints for leaf in leaves(expr))
        values = [(v, v.origin in (Origin.INPUT, Origin.CONST)) for v in node.inputs()]
        for v, new in (*values, *((v, sized or v.id in activations) for v in node.outputs)):
            if v.id in seen:
                continue
            seen.add(v.id)
            for dim in map(flat, axes.dims.get(v.id, ())):
                for atom in dim:
                    own = set(leaf_atoms([atom])) or ({atom} if atom.segments else set())  # cut up into rows: as one
                    own = own - held - found if new else own.union(axes_in([atom])) - found
                    if new and len(dim) > 1:
                        pieces |= own
                    (found if new else held).update(own)
    return frozenset(found), frozenset(pieces)
