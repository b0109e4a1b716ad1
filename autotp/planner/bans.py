"""Records what later attempts at a plan must not do, and which cuts caused a failure."""

from __future__ import annotations

from dataclasses import dataclass

from autotp.axes.atoms import Atom
from autotp.planner.choice import Choice
from autotp.planner.partition import Partition
from autotp.planner.placements import NONE, GraphIndex
from autotp.planner.repeats import traced
from autotp.trace.graph import Node


@dataclass(frozen=True, slots=True)
class Accused:
    """A module whose numbers differ on the ranks; None: it cannot be told which. `backward`: gradients differ, not results."""

    module: str | None
    reason: str
    backward: bool = False


@dataclass
class Bans:
    """Lists what later attempts must not do: cuts with the reason, and nodes whose result stays whole."""

    cuts: dict[Partition, str]
    whole: frozenset[int] = NONE  # type: ignore[assignment]
    all: str = ""  # why no axis at all may be sharded

    @property
    def size(self) -> int:
        """Returns the number of bans."""
        return len(self.cuts) + len(self.whole)

    def blame(self, space: GraphIndex, choice: Choice, node: Node, reason: str) -> None:
        """Ban what made `node` fail: first that its result is made sharded, then the axes that meet it.

        The same line does the same in other modules, so axes that meet it there are banned with them.
        """
        alike = [n for n in space.graph.nodes if n is node or _same_line(n, node)] if node.index >= 0 else []
        values = [v for n in alike for v in (*space.inputs[n.index], *n.outputs)]
        generated = {n.index for n in space.graph.nodes if n.index in choice.labels.generated and (n is node or _feeds(n, node))}
        if generated - self.whole:
            self.whole |= generated
            return
        guilty = frozenset().union(*(space.carried.get(v.id, NONE) for v in values), NONE) & choice.on
        if not guilty:
            near = [v for n in space.graph.nodes if n.module == node.module for v in (*space.inputs[n.index], *n.outputs)]
            guilty = frozenset().union(*(choice.labels.of(v) for v in near), NONE) & choice.on
        if not guilty:
            guilty = choice.on
        self.cuts.update(dict.fromkeys((choice.cuts[a] for a in guilty), f"{reason}: {node}"))

    def accuse(self, space: GraphIndex, choice: Choice, accused: Accused) -> None:
        """Ban the cuts that meet in a module, or nearest to it on the way that its numbers come; all where the module is unknown."""
        guilty: frozenset[Atom] = choice.on
        if accused.module is not None:
            path = traced(accused.module, space.graph.repeats)
            nodes = space.graph.nodes
            inside = [n for n in nodes if n.module == path] or [n for n in nodes if n.module.startswith(path + ".")]
            if inside:
                way = nodes[inside[-1].index + 1 :] if accused.backward else tuple(reversed(nodes[: inside[0].index]))
                met = (_met(space, choice, n) for n in way)
                guilty = frozenset().union(*(_met(space, choice, n) for n in inside)) or next(filter(None, met), choice.on)
        where = accused.module or "the model"
        self.cuts.update(dict.fromkeys((choice.cuts[a] for a in guilty), f"{accused.reason}, first in {where}"))


def _met(space: GraphIndex, choice: Choice, node: Node) -> frozenset[Atom]:
    """The axes on which values of a node are sharded."""
    values = (*space.inputs[node.index], *node.outputs)
    return frozenset().union(*(choice.labels.of(v) for v in values), NONE) & choice.on


def _same_line(a: Node, b: Node) -> bool:
    """True for one operator at one place in the code, with the same numbers and with tensors of the same shapes."""
    if a.place is None or a.place != b.place or a.op is not b.op or _numbers(a) != _numbers(b):
        return False
    return [v.shape for v in (*a.inputs(), *a.outputs)] == [v.shape for v in (*b.inputs(), *b.outputs)]


def _numbers(node: Node) -> list[object]:
    return [x for x in node.args if isinstance(x, int | float)]


def _feeds(source: Node, node: Node) -> bool:
    made = {o.id for o in source.outputs}
    return any(v.id in made for v in node.inputs())
