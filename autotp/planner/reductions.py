"""Decides where partial sums are reduced, forward and backward.

Forward: a value that is a partial sum must be whole where it meets an operator that does not commute with the sum.
Backward: a whole value that is used inside a sharded region gets a partial gradient from there. It must be reduced before it meets
gradients that are whole already, or reaches a parameter, exactly once on every path. Both are minimum cuts over the values of the
graph. Conversions are cheap where a tensor crosses a module boundary, because hooks reach it there, and on parameters. Anywhere
else they need an intervention at a call site, which costs `SITE`.

Value and gradient types (forward → backward): P → its gradient is whole; S → sharded; R → whole (R) or partial (P).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from math import prod

from autotp.axes.operators.table import Is, is_a
from autotp.planner.keys import AtPlace, AtSlot, AtValue, Key, Keys, slot_key
from autotp.planner.mincut import MinCut, Vertex
from autotp.planner.placements import GraphIndex, Labels, SlotKey
from autotp.planner.refusals import Refusal
from autotp.planner.repeats import times
from autotp.trace.graph import Node, Origin, Pseudo, Value, outside

SITE = 1e12
_TORCH = frozenset(("aten", "prim", "prims", "_c10d_functional"))  # operators whose backward is known to be linear in the gradient
TOKENS_SCALE = 100.0  # examples are tiny: an activation stands for this many times its elements against a parameter's


@dataclass(frozen=True, slots=True)
class Moves:
    """Conversions by where they happen.

    reduces, copies: where (`keys`). group_edges: (node index, value id) uses inside regions that are converted alone. grad_sums:
    parameters whose gradient is summed. partial: values that are still partial sums where they are used. hanging: (side of a
    conversion, slot) whose gradient is still a partial sum there.
    """

    reduces: frozenset[Key]
    partial: frozenset[int]
    copies: frozenset[Key]
    group_edges: frozenset[tuple[int, int]]
    grad_sums: frozenset[int]
    hanging: frozenset[tuple[Side, SlotKey]] = frozenset()


class Side(Enum):
    """The side of a possible conversion that a vertex is on: of a sum on its way, or of a gradient on its way back."""

    BEFORE = 0  # the value as it is made
    AFTER = 1  # the value as it is used
    BELOW = 2  # the gradient as the uses give it
    ABOVE = 3  # the gradient as it arrives at the node that made the value


@dataclass(frozen=True, slots=True)
class _Group:
    """The uses of a value inside of regions, converted at each use alone; `after`: behind the conversion."""

    value: int
    after: bool = False


@dataclass(frozen=True, slots=True)
class _Param:
    """The gradient of a parameter, summed where it is accumulated."""

    value: int


class _Vertices:
    """Vertices of values; values that one conversion would act on share theirs. Both keys and vertices are numbers here."""

    def __init__(self, space: GraphIndex, keys: Keys, places: bool) -> None:
        """`places`: calls from one place in the code share their vertices; otherwise each value outside slots is alone."""
        self.keys: list[Key] = []
        self.order: dict[int, int] = {}
        self.fixed: set[int] = set()  # of what no conversion reaches
        self._number: dict[int, int] = {}  # value → the number of its key
        shared: dict[int, int] = {}
        for node in space.graph.nodes:
            for o in node.outputs:
                key, number = keys.of[o.id], keys.numbers[o.id]
                if places or isinstance(key, AtSlot):
                    self._number[o.id] = shared[number] if number in shared else shared.setdefault(number, self._new(key))
                else:
                    self._number[o.id] = self._new(AtValue(o.id))
                if isinstance(key, AtValue):
                    self.fixed.add(self._number[o.id])
                self.order[o.id] = node.index

    def _new(self, key: Key) -> int:
        self.keys.append(key)
        return len(self.keys) - 1

    def of(self, value: Value | int) -> int:
        """Returns the number of the key of a value."""
        value = value if isinstance(value, int) else value.id
        number = self._number.get(value)
        if number is None:  # no node makes it
            number = self._number[value] = self._new(AtValue(value))
        return number

    def side(self, side: Side, number: int) -> int:
        """Returns the vertex of the tensor that a conversion acts on, on one side of the conversion."""
        return 4 * number + side.value

    def at(self, side: Side, value: Value | int) -> int:
        """Returns the vertex of a value on one side of its conversion."""
        return 4 * self.of(value) + side.value

    def hanging(self, vertices: Iterable[Vertex]) -> frozenset[tuple[Side, SlotKey]]:
        """Returns the boundaries among vertices, with the side that each is on."""
        found = ((Side(v % 4), self.keys[v // 4]) for v in vertices if isinstance(v, int))
        return frozenset((side, key.slot) for side, key in found if isinstance(key, AtSlot))


def _elements(value: Value) -> float:
    return float(prod(value.shape)) * TOKENS_SCALE


def _times(space: GraphIndex, key: Key, node: Node) -> int:
    """Counts the places in all blocks that are alike for which a key, of a result of `node`, stands."""
    return times(key.slot[1] if isinstance(key, AtSlot) else node.module, space.graph.repeats)


def _cost(key: Key, elements: float, order: int, late: bool = False) -> float:
    """Puts boundaries before places in the code, places where a value is made before `late` ones, and the model's own results last.

    Code may have branches that no traced call took, and assume a whole value there: the less of it stands before the conversion the
    better.
    """
    base = elements * (1 + 1e-7 * order)
    if not isinstance(key, AtSlot):
        return (1.5 if late else 1) * SITE + base
    return 2 * SITE + base if key.slot[:2] == (Pseudo.EXIT, "") else base


def place_reductions(space: GraphIndex, labels: Labels, vertices: _Vertices) -> tuple[frozenset[int], frozenset[int]]:
    """Returns (numbers of the keys where partial sums are reduced, values still partial after that)."""
    cut = MinCut()
    mixed = _mixed(space, vertices, lambda v: v.id in labels.partial, lambda v: True) | _sealed(space, vertices)
    stops, first = [result.stop for result in space.graph.results], dict[int, int]()
    summed = labels.partial - {key for key, number in space.graph.fills.items() if number == 0.0}  # zeros are whole and partial
    weights: dict[int, float] = {}
    for node in space.graph.nodes:
        partial_in = [v for v in dict.fromkeys(node.inputs()) if v.id in summed]
        for o in node.outputs:
            if o.id not in summed:
                continue
            key, born = vertices.of(o), o.id in labels.born
            weights[o.id] = _elements(o) * _times(space, vertices.keys[key], node)
            if not born and is_a(node, Is.SELECTION):  # the entries left out are no gain: they were a sum too
                weights[o.id] = max([weights[o.id], *(weights.get(v.id, 0.0) for v in partial_in)])
            if born:
                cut.born(vertices.side(Side.BEFORE, key))
            else:
                for v in partial_in:
                    cut.same(vertices.at(Side.AFTER, v), vertices.side(Side.BEFORE, key))
            path = bisect_right(stops, node.index)
            if first.setdefault(key, path) == path:  # a module that one path calls twice is no cheaper than two modules
                cut.convertible(
                    key,
                    vertices.side(Side.BEFORE, key),
                    vertices.side(Side.AFTER, key),
                    None if key in mixed else _cost(vertices.keys[key], weights[o.id], node.index, not born),
                )
    for value in space.graph.params.values():
        if value.id in labels.once:
            key = vertices.of(value)
            cut.born(vertices.side(Side.BEFORE, key))
            cut.same(vertices.side(Side.BEFORE, key), vertices.side(Side.AFTER, key))
    for _, number in labels.reduces:
        cut.needed(vertices.at(Side.AFTER, number))
    for node in space.graph.nodes:
        if node.op is Pseudo.EXIT and node.slot is not None and node.slot[0] in space.apart:
            for o in node.outputs:
                if o.id in labels.partial:
                    cut.needed(vertices.at(Side.AFTER, o))
        if node.op is Pseudo.REPEAT:
            for a, b in zip(node.args[0], node.args[1], strict=True):
                if a.id in labels.partial and b.id in labels.partial:
                    cut.same(vertices.at(Side.AFTER, a), vertices.at(Side.AFTER, b))
    for result in space.graph.results:
        for _, leaf in result.leaves:
            if isinstance(leaf, Value) and leaf.id in labels.partial:
                cut.needed(vertices.at(Side.AFTER, leaf))
    solved = cut.solve()
    if solved is None:
        raise Refusal(None, "a partial sum cannot be reduced on every path exactly once")
    chosen, unconverted = solved
    partial = frozenset(k for k in labels.partial if vertices.at(Side.AFTER, k) in unconverted)
    return frozenset(k for k in chosen if isinstance(k, int)), partial


def _mixed(space: GraphIndex, vertices: _Vertices, holds: Callable[[Value], bool], matters: Callable[[Value], bool]) -> set[int]:
    """Returns the keys that no conversion reaches, and slots and places in the code that get both kinds of values in different calls.

    `matters`: tells the values that a conversion at a place would change.
    """
    seen: dict[int, bool] = {}
    mixed = set(vertices.fixed)
    for node in space.graph.nodes:
        slot = slot_key(node) is not None
        for o in node.outputs:
            key = vertices.of(o)
            if not slot and not (isinstance(vertices.keys[key], AtPlace) and matters(o)):
                continue
            if space.graph.fills.get(o.id) == 0.0:
                continue  # zeros are whole and a partial sum (experts that no token chose)
            flag = holds(o)
            if seen.setdefault(key, flag) != flag:
                mixed.add(key)
    return mixed


def _sealed(space: GraphIndex, vertices: _Vertices) -> set[int]:
    """Returns the keys where no conversion can stand: results of operators inside of autograd functions, and outside of the model's
    forward.
    """
    return {vertices.of(o) for node in space.graph.nodes if space.graph.sealed(node) for o in node.outputs}


def _seen_whole(space: GraphIndex, node: Node) -> tuple[Value, ...]:
    """Returns the values of a node whose gradient has to be whole as soon as it arrives: it goes to code that need not be linear in it."""
    if node.op is Pseudo.HOOK:
        return tuple(node.inputs())
    if node.op is Pseudo.APPLY:
        return ()
    own = node.scope >= 0 and not space.graph.scopes[node.scope].shown
    foreign = not isinstance(node.op, Pseudo) and node.op.namespace not in _TORCH
    return node.outputs if own or foreign or outside(node) else ()


def place_copies(
    space: GraphIndex, labels: Labels, partial: frozenset[int], reduces: frozenset[int], vertices: _Vertices
) -> tuple[frozenset[Key], frozenset[tuple[int, int]], frozenset[int], frozenset[tuple[Side, SlotKey]]]:
    """Returns (where gradients are reduced, values whose uses in regions are converted, parameters whose gradients are summed,
    hanging slots).
    """
    cut = MinCut()
    flows = space.flows
    sharded = labels.shard

    def whole(v: Value) -> bool:
        return v.id in flows and v.id not in partial and not sharded.get(v.id)

    mixed = _mixed(space, vertices, whole, lambda v: v.id in flows) | _sealed(space, vertices)
    mixed |= {vertices.of(o) for n in space.graph.nodes for o in n.outputs if o.id in space.storage.changed}  # a copy would be changed
    groups: dict[int, Value] = {}
    edges: set[tuple[int, int]] = set()
    seen: dict[int, Value] = {}
    for node in space.graph.nodes:
        out_sharded = any(sharded.get(o.id) for o in node.outputs)
        at_once = any(o.id in labels.partial and vertices.of(o) in reduces for o in node.outputs) and slot_key(node) is None
        out_partial = at_once or any(o.id in partial for o in node.outputs)
        live = [o for o in node.outputs if o.id in flows]
        inputs = list(dict.fromkeys(node.inputs()))
        for o in live:
            if whole(o):
                seen[o.id] = o
                if at_once or (any(v.id in partial for v in inputs) and node.index not in labels.distributed):
                    cut.needed(vertices.at(Side.ABOVE, o))  # reduced here: its gradient goes on to every rank's part
                if node.index in labels.gathered or (
                    labels.distributed.get(node.index) is not None and not out_partial and not out_sharded
                ):
                    cut.needed(vertices.at(Side.ABOVE, o))
        if node.op is Pseudo.REPEAT:
            _repeat(cut, vertices, node, whole)
            continue
        if node.op is Pseudo.ENTER and node.slot is not None and node.slot[0] in space.apart:
            for o in live:
                if whole(o):
                    cut.needed(vertices.at(Side.ABOVE, o))
        for v in _seen_whole(space, node):
            if whole(v):
                seen[v.id] = v
                cut.needed(vertices.at(Side.BELOW, v))
        if not live:
            continue
        for v in inputs:
            if not whole(v):
                if (
                    v.id in flows
                    and sharded.get(v.id)
                    and not out_partial
                    and node.index not in labels.gathered
                    and node.index not in labels.distributed
                ):
                    for o in live:  # a repeated segment is taken out: its gradient stays a partial sum
                        if whole(o):
                            cut.born(vertices.at(Side.ABOVE, o))
                continue
            seen[v.id] = v
            below = vertices.at(Side.BELOW, v)
            partners = [u for u in inputs if u is not v and (u.id in partial or sharded.get(u.id))]
            region = out_sharded or (node.index, v.id) in labels.slices or (out_partial and bool(partners) and not _added(space, node, v))
            if region:
                groups[v.id] = v
                edges.add((node.index, v.id))
                cut.same(_Group(v.id, after=True), below)
            elif out_partial:
                cut.needed(below)  # added to a partial sum: its gradient is whole
            else:
                for o in live:
                    cut.same(vertices.at(Side.ABOVE, o), below)
    for key, v in groups.items():
        cut.born(_Group(key))
        sealed = any(space.graph.sealed(space.graph.nodes[index]) for index, number in edges if number == key)
        cut.convertible(_Group(key), _Group(key), _Group(key, after=True), None if sealed else SITE + _elements(v))
    _ends(space, cut, vertices, seen, flows, mixed)
    solved = cut.solve()
    if solved is None:
        raise Refusal(None, "the gradients of a region cannot be reduced on every path exactly once")
    chosen = solved[0]
    return (
        frozenset(vertices.keys[k] for k in chosen if isinstance(k, int)),
        frozenset(e for e in edges if _Group(e[1]) in chosen),
        frozenset(k.value for k in chosen if isinstance(k, _Param)),
        vertices.hanging(solved[1]),
    )


def _ends(space: GraphIndex, cut: MinCut, vertices: _Vertices, seen: dict[int, Value], flows: set[int], mixed: set[int]) -> None:
    done: set[int] = set()
    for v in seen.values():
        key = vertices.of(v)
        if key in done:
            continue
        done.add(key)
        before, after = vertices.side(Side.BELOW, key), vertices.side(Side.ABOVE, key)
        if v.origin is Origin.PARAM:
            cut.convertible(_Param(v.id), before, after, float(prod(v.shape)) * times(v.name, space.graph.repeats))
            cut.needed(after)
        elif v.origin is Origin.NODE:
            elements = _elements(v) * _times(space, vertices.keys[key], space.made[v.id])
            cut.convertible(key, before, after, None if key in mixed else _cost(vertices.keys[key], elements, -vertices.order[v.id]))
        else:
            cut.convertible(key, before, after, SITE + _elements(v))
            cut.needed(after)
    for result in space.graph.results:
        for _, leaf in result.leaves:
            if isinstance(leaf, Value) and leaf.id in seen:
                cut.needed(vertices.at(Side.BELOW, leaf))
    for values in space.graph.left.values():  # a loss may be made of whole values
        for v in values:
            if v.id in seen:
                cut.needed(vertices.at(Side.BELOW, v))


def _repeat(cut: MinCut, vertices: _Vertices, node: Node, whole: Callable[[Value], bool]) -> None:
    here, there = node.args
    for a, b in zip(here, there, strict=True):
        if whole(a):
            cut.same(vertices.at(Side.BELOW, a), vertices.at(Side.BELOW, b))


def _added(space: GraphIndex, node: Node, value: Value) -> bool:
    """True where the node adds `value` to its other operands instead of multiplying."""
    meaning = space.axes.meanings[node.index]
    return value.id in meaning.once or any(len(group) > 1 and value.id in group for group in meaning.linear)


def place(space: GraphIndex, labels: Labels, keys: Keys) -> Moves:
    """Places all reductions of a labelled graph; `keys` are the graph's.

    Raises:
        Refusal: no placement reduces every partial sum exactly once.
    """
    try:
        return _place(space, labels, keys, places=True)
    except Refusal:  # calls from one place may need different things: then each on its own, if the code allows it
        return _place(space, labels, keys, places=False)


def _place(space: GraphIndex, labels: Labels, keys: Keys, places: bool) -> Moves:
    vertices = _Vertices(space, keys, places)
    reduces, partial = place_reductions(space, labels, vertices)
    copies = place_copies(space, labels, partial, reduces, vertices)
    return Moves(frozenset(vertices.keys[k] for k in reduces), partial, *copies)
