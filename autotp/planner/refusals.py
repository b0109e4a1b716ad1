"""Why a choice of cuts cannot become a plan."""

from __future__ import annotations

from dataclasses import dataclass

from autotp.axes.atoms import Atom
from autotp.planner.partition import Atoms
from autotp.trace.graph import Node


@dataclass(frozen=True, slots=True)
class Conflict:
    """Atoms that cannot be sharded, and the node that forbids it."""

    atoms: Atoms
    node: Node | None
    reason: str
    uncovered: tuple[tuple[Atom, ...], ...] = ()  # segments of a summed dim that would have to be sharded too

    def __str__(self) -> str:
        return self.reason if self.node is None else f"{self.reason}: {self.node}"


class Stuck(Exception):
    """Some int cannot be made local; carries its node and the reason."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason


class Undecidable(Exception):
    """No placement of the reductions satisfies every use; carries the node or value where it shows."""

    def __init__(self, what: str) -> None:
        super().__init__(what)


class Unrealisable(Exception):
    """A conversion that no place in the code can do; carries its node."""

    def __init__(self, node: Node, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason
