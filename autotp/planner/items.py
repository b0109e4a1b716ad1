"""Finds which values at module boundaries stand for any number of their like, and which containers may only be as they were traced.

Code makes lists of any length: a tensor for each chunk, for each token. Conversions stand at the places that a traced call had. Where
all items of a list have one *signature*, their conversions become one that stands for every item: the same code made them, or takes
them. Where they have not, the place of an item tells nothing in a call with more or fewer of them, and such a call is refused. A
container of whole values that nothing converts may be of any length.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from autotp.plan.conversions import Conversion, Op
from autotp.plan.expressions import Expr, Factor
from autotp.plan.items import DICT, Items, Path, Step, each, is_at
from autotp.planner.naming import Namer
from autotp.planner.placements import GraphIndex, Labels, SlotKey
from autotp.planner.reductions import Moves, Side
from autotp.planner.repeats import within
from autotp.trace.containers import Container
from autotp.trace.graph import Node, Pseudo, Value


@dataclass(frozen=True, slots=True)
class Signature:
    """How a rank has a tensor outside and inside of a module in the calls that were traced, and what converts it."""

    placements: frozenset[Hashable]
    hanging: bool  # its gradient is a summand on a side
    conversions: tuple[Hashable, ...]
    kept: bool  # it waits for another module's summand

    @property
    def is_whole(self) -> bool:
        """True where nothing is at stake: whole on either side, and nothing converts it."""
        return self.placements <= {(None, None)} and not self.hanging and not self.conversions


@dataclass(frozen=True, slots=True)
class Place:
    """A tensor at a boundary: its path in a call that was traced, and what of it is still to go. dims: how many it has."""

    path: Path
    rest: Path
    signature: Signature
    dims: frozenset[int]

    def below(self) -> Place:
        """Returns it as the container at its next step has it."""
        return replace(self, rest=self.rest[1:])


class Signatures:
    """Tells the signatures of the slots of a graph, with conversions at `slots`."""

    def __init__(
        self, space: GraphIndex, labels: Labels, moves: Moves, namer: Namer, slots: Mapping[SlotKey, Sequence[Conversion]]
    ) -> None:
        self._space, self._labels, self._moves, self._namer, self._slots = space, labels, moves, namer, slots

    def of(self, key: SlotKey, nodes: Iterable[Node]) -> Signature:
        """Returns the signature of a slot that `nodes` cross."""
        crossings = [(node.args[0], node.outputs[0]) for node in nodes]
        hanging = any((side, key) in self._moves.hanging for side in (Side.ABOVE, Side.BELOW))
        found = self._slots.get(key, ())
        return Signature(
            frozenset((self._placement(a), self._placement(b)) for a, b in crossings),
            hanging and any(v.id in self._space.flows for pair in crossings for v in pair),
            tuple((c.op, c.dim, sizes_of(c.expr)) for c in found),
            any(c.op in (Op.HOLD, Op.JOIN) for c in found),
        )

    def _placement(self, value: Value) -> Hashable:
        """Returns None of a whole value, what tells where it is cut of a part."""
        if value.id in self._moves.partial:
            return "summand"
        on = self._labels.of(value)
        if not on:
            return None
        dims = zip(self._space.axes.dims[value.id], self._space.leaves[value.id], strict=True)
        return tuple((i - len(value.shape), sizes_of(self._namer.expr(d, on))) for i, (d, leaves) in enumerate(dims) if leaves & on)


def sizes_of(expr: Expr | None) -> Hashable:
    """Returns what is alike in expressions that differ in the names of their factors alone."""
    if expr is None or isinstance(expr, Factor):
        return expr and (expr.size, expr.sharded, expr.pieces, bool(expr.of), expr.granule)
    return (type(expr).__name__, tuple(sizes_of(p) for p in expr.parts))


class Boundaries:
    """The containers at the boundaries of all modules. merged: slot → the path that stands for it and its like; others are left out."""

    def __init__(self, space: GraphIndex, signature: Callable[[SlotKey, list[Node]], Signature]) -> None:
        self._graph = space.graph
        self.merged: dict[SlotKey, Path] = {}
        self.items: dict[str, list[Items]] = {}
        crossings: dict[SlotKey, list[Node]] = {}
        for node in self._graph.nodes:
            if node.op in (Pseudo.ENTER, Pseudo.EXIT) and node.slot is not None and node.slot[0] in self._graph.containers:
                crossings.setdefault((node.op, *node.slot), []).append(node)
        places: dict[tuple[Pseudo, str], list[Place]] = {}
        for key, nodes in crossings.items():
            kind, module, where = key
            if values := [n for n in nodes if isinstance(n.args[0], Value)]:
                found, dims = signature(key, values), frozenset(len(n.outputs[0].shape) for n in values)
                for path in self._graph.members.get((module, where), (where,)) if kind is Pseudo.ENTER else (where,):
                    places.setdefault((kind, module), []).append(Place(path, path, found, dims))
        for (kind, module), every in places.items():
            if not all(p.signature.is_whole for p in every):
                self._walk(kind, module, (), every)

    def _walk(self, kind: Pseudo, module: str, path: Path, places: list[Place]) -> None:
        """Follow the `places` below `path`, which may stand for several."""
        self.merged.update({(kind, module, p.path): path for p in places if not p.rest and p.path != path})
        below = [p for p in places if p.rest]
        if not below or all(p.signature.is_whole for p in below):
            return
        known = [c for c in self._graph.containers[module] if c.result is (kind is Pseudo.EXIT) and is_at(c.path, path)]
        steps: dict[Step, Step] = {}  # step → the one that stands for it
        for like, group in _by_step(below).items():
            own = {p.rest[0]: None for p in group}
            if known and _alike(group) and (len(own) > 1 or self._may_grow(kind, module, path, group)):
                steps.update(dict.fromkeys(own, like))
                self._walk(kind, module, (*path, like), [p.below() for p in group])
                continue
            for step in own:
                self._walk(kind, module, (*path, step), [p.below() for p in group if p.rest[0] == step])
        lengths, unnamed = _lengths(known, steps), () if known or (kind is Pseudo.ENTER and not path) else _named(below)
        if lengths or unnamed:
            self.items.setdefault(module, []).append(Items(kind is Pseudo.EXIT, path, lengths, unnamed))

    def _may_grow(self, kind: Pseudo, module: str, path: Path, group: list[Place]) -> bool:
        """True where blocks that were not traced add items like the one that a hook of their template added (attentions)."""
        blocks = any(not module or within(t, module) for t in self._graph.repeats.values())
        return blocks and kind is Pseudo.EXIT and bool(path) and all(len(p.rest) == 1 and p.signature.conversions for p in group)


def _by_step(places: list[Place]) -> dict[Step, list[Place]]:
    """Returns the places by what stands for their first steps."""
    found: dict[Step, list[Place]] = {}
    for p in places:
        found.setdefault(each(p.rest[0]), []).append(p)
    return found


def _alike(places: list[Place]) -> bool:
    """True where the items that hold the places have tensors of one signature at the same places in them."""
    found: dict[Path, Signature] = {}
    for p in places:
        if p.signature.kept or found.setdefault(p.rest[1:], p.signature) != p.signature:
            return False
    return not any(rest[:n] in found for rest in found for n in range(len(rest)))


def _named(places: Iterable[Place]) -> tuple[tuple[int, int], ...]:
    """Returns where tensors are in fields that have names, as `Items.unnamed`."""
    found = [p for p in places if isinstance(p.rest[0], str) and not p.signature.is_whole]
    return tuple(sorted({(len(p.rest), dims) for p in found for dims in p.dims}))


def _lengths(known: Iterable[Container], steps: Mapping[Step, Step]) -> tuple[tuple[int, tuple[Step, ...]], ...]:
    """Returns the lengths of containers with the steps to their tensors, without lists whose items are all alike."""
    found: dict[int, dict[Step, None]] = {}
    for c in sorted(known, key=repr):
        if c.length == DICT or not any(steps.get(s) == "*" for s in c.steps):
            found.setdefault(c.length, {}).update(dict.fromkeys(steps.get(s, s) for s in c.steps))
    return tuple((length, tuple(sorted(found[length], key=str))) for length in sorted(found))
