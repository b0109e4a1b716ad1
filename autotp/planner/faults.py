"""Says what is wrong with the dims of a tensor that is sharded on some atoms."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from autotp.axes.atoms import Atom
from autotp.planner.partition import Atoms, Partitions, meets_two


@dataclass(frozen=True, slots=True)
class Faults:
    """What is wrong with a tensor of some dims that is sharded on some atoms. `twice`: an atom in two of its dims."""

    cuts: tuple[tuple[Atoms, str], ...]
    twice: Atom | None = None


def faults_of(dims: Iterable[Iterable[Atom]], leaves: Iterable[Atoms], on: Atoms, cuts: Partitions) -> Faults:
    """Returns the faults of a tensor with `dims`, whose leaf atoms are `leaves`, sharded on the atoms `on`."""
    met = {cuts[a] for a in on}
    found = [(on, "two sharded axes meet in one tensor")] if len(met) > 1 and meets_two(dims, on, cuts) else []
    found += [(cut.atoms, "a tensor carries only the minor factor of the axis") for cut in met if cut.major not in on]
    leaves = tuple(leaves)
    return Faults(tuple(found), next((a for a in on if sum(a in d for d in leaves) > 1), None))
