"""Says why a choice of cuts cannot become a plan."""

from __future__ import annotations

from dataclasses import dataclass

from autotp.axes.atoms import Atom
from autotp.planner.partition import Atoms
from autotp.trace.graph import Node


@dataclass(frozen=True, slots=True)
class Conflict:
    """A node forbids to shard these atoms."""

    atoms: Atoms
    node: Node | None
    reason: str
    uncovered: tuple[tuple[Atom, ...], ...] = ()  # segments of a summed dim that would have to be sharded too

    def __str__(self) -> str:
        return self.reason if self.node is None else f"{self.reason}: {self.node}"


class Refusal(Exception):
    """A choice of cuts needs something that cannot be done: at a node, or None where only the whole shows it."""

    def __init__(self, node: Node | None, reason: str) -> None:
        super().__init__(reason)
        self.node, self.reason = node, reason

    def __str__(self) -> str:
        return self.reason if self.node is None else f"{self.reason}: {self.node}"
