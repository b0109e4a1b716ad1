"""Which axes to cut, and how.

Each leaf atom that a parameter carries is a candidate, and each pair of neighbouring ones of which tp does not divide the first
(kv heads and the query heads of each). A candidate's worth is the number of parameter elements that a rank saves over the
elements that its collectives move; candidates are taken greedily from the best, each kept if the labels of all that are taken
have no conflict. So heads beat head widths, and both beat the residual stream, whose every product would be a partial sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from math import gcd, prod

from autotp.axes.atoms import Atom
from autotp.axes.operators.table import Is, is_a
from autotp.planner.padding import padding_conflict
from autotp.planner.partition import Atoms, Cut, Cuts, last_atoms, local_size, neighbours
from autotp.planner.placements import NONE, Labels, SlotKey, Space, label, leaf_atoms
from autotp.planner.refusals import Conflict
from autotp.planner.requested import Reason, Wanted, claimed, granules, ruled_out
from autotp.trace.graph import Node, Origin, Pseudo, Value

#: A head's result leaves its module at once; later boundaries are not worth a pass each.
GATHER_TRIES = 4
UNREAD = "no traced call reads it"


@dataclass(frozen=True, slots=True)
class Taken:
    """What is taken so far: where results are gathered, which nodes' results stay whole, and the labels, which hold the cuts."""

    gathers: Mapping[SlotKey, Atoms]
    whole: frozenset[int]
    labels: Labels

    @property
    def cuts(self) -> Cuts:
        """The cuts taken."""
        return self.labels.cuts


@dataclass(frozen=True, slots=True)
class Choice(Taken):
    """What is taken in the end, and why the other candidates were refused."""

    refused: Mapping[Atom, Reason]

    @property
    def on(self) -> Atoms:
        """The atoms that are sharded."""
        return frozenset(self.cuts)


def choose(
    space: Space,
    tp: int,
    banned: Mapping[Cut, str],
    forced: frozenset[int] = frozenset(),
    wanted: Wanted | None = None,
    nothing: str = "",
) -> Choice:
    """Take the candidates greedily; `banned` ones are refused with the reason given, results of `forced` nodes stay whole.

    `nothing`: why no candidate is taken at all.

    Cuts that `wanted` layouts ask for are taken first, those that they rule out never.
    """
    wanted = wanted or {}
    refused: dict[Atom, Reason] = {}
    for cut, text in banned.items():
        refused.update(dict.fromkeys(cut.atoms, Reason(text)))
    carriers: dict[Atom, list[Value]] = {}
    for value in dict.fromkeys(space.graph.params.values()):
        for atom in space.carried[value.id]:
            carriers.setdefault(atom, []).append(value)
    widths = head_widths(space)
    for atom in widths:
        refused.setdefault(atom, Reason("it is the width of one attention head, which is not cut"))
    unread = {atom for value in space.graph.params.values() if value.id not in space.users for atom in space.carried[value.id]}
    refused.update(dict.fromkeys(unread, Reason(UNREAD)))
    if nothing:
        refused.update((atom, Reason(nothing)) for atom in carriers if atom not in refused)
    free = {atom for atom in carriers if atom not in widths and atom not in unread and not nothing}
    candidates = [c for c in _candidates(space, carriers, free, tp, wanted) if c not in banned]
    against = {c: ruled_out(space, c, carriers, wanted) for c in candidates}
    for cut, reason in against.items():
        if reason:
            refused.update((atom, reason) for atom in cut.atoms if atom not in refused)
    ranked = sorted(
        (c for c in candidates if not against[c]),
        key=lambda c: (not claimed(c, carriers, wanted), -_worth(space, c, carriers), c.local_size, c.major.id),
    )
    state = Taken({}, forced, label(space, {}, {}, forced))
    for cut in ranked:
        if cut.atoms & frozenset(state.cuts):
            continue
        tried = _try(space, (cut,), state, carriers)
        if isinstance(tried, Conflict) and tried.uncovered:
            segments = [[c for c in ranked if c.minor is None and c.major in set(leaf_atoms(s))] for s in tried.uncovered]
            for companions in islice(product(*segments), 32):
                joint = _try(space, (cut, *companions), state, carriers)
                if not isinstance(joint, Conflict):
                    tried = joint
                    break
        if isinstance(tried, Conflict):
            clash = any(a in state.cuts for a in tried.atoms if a not in cut.atoms)
            text = "another axis of the same tensors is sharded" if clash else str(tried)
            for atom in cut.atoms:
                if atom is cut.major or atom not in refused:
                    refused[atom] = Reason(text)
        else:
            state = tried
    refused = {a: r for a, r in refused.items() if a not in state.cuts}
    return Choice(state.gathers, state.whole, state.labels, refused)


def _candidates(space: Space, carriers: Mapping[Atom, list[Value]], free: set[Atom], tp: int, wanted: Wanted) -> Iterable[Cut]:
    """Cuts that leave a rank less than the whole axis."""
    aligned = _granules(space)
    for atom in sorted(free, key=lambda a: a.id):
        if atom.size > 1:
            own = aligned.get(atom, 1)
            yield Cut(atom, tp, granule=own)
            yield from (Cut(atom, tp, granule=g) for g in sorted(granules(wanted, atom.size)) if g > own and g % own == 0)
    pairs = {pair: None for v in space.graph.params.values() for dim in space.axes.dims[v.id] for pair in neighbours(dim)}
    for major, minor in pairs:
        if major in free and minor in free and major.size > 1 and minor.size > 1 and major.size % tp and _within(major, minor, carriers):
            both = [Cut(major, tp, minor, n) for n in _pieces(minor.size)]
            if any(v.id in wanted for atom in (major, minor) for v in carriers[atom]):
                yield from both
            else:
                yield min(both, key=lambda c: (_held(space, c, carriers), c.local_size, c.pieces))


def _pieces(size: int) -> Iterator[int]:
    """The numbers of pieces to cut `size` indices into, in order: for each size of a piece the fewest."""
    n = 2
    while n <= size:
        width = -(-size // n)
        yield -(-size // width)
        if width == 1:
            return
        n = -(-size // (width - 1))


def _granules(space: Space) -> dict[Atom, int]:
    """Widths whose parts must stay aligned: the strides of a grouped product are multiples of 16 bytes, 8 numbers of 16 bits."""
    found: dict[Atom, int] = {}
    for node in space.graph.nodes:
        if is_a(node, Is.ALIGNED):
            for value in node.args[:2]:
                for dim in space.axes.dims[value.id][1:]:
                    found |= {atom: gcd(8, atom.size) for atom in last_atoms(dim)}
    return found


def _within(major: Atom, minor: Atom, carriers: Mapping[Atom, list[Value]]) -> bool:
    return all(any(v is u for u in carriers[major]) for v in carriers[minor])


def _held(space: Space, cut: Cut, carriers: Mapping[Atom, list[Value]]) -> float:
    """Parameter elements on a rank of what carries the axis."""
    values = {v.id: v for atom in cut.atoms for v in carriers[atom]}
    cuts = dict.fromkeys(cut.atoms, cut)
    return sum(prod(local_size(d, space.carried[v.id] & cut.atoms, cuts) for d in space.axes.dims[v.id]) for v in values.values())


def head_widths(space: Space) -> set[Atom]:
    """Atoms inside of one attention head: what queries and keys are multiplied over, and the last dim of the values."""
    found: set[Atom] = set()
    for node in space.graph.nodes:
        if is_a(node, Is.ATTENTION):
            found |= space.leaves[node.args[2].id][-1] | space.leaves[node.args[0].id][-1]
        elif is_a(node, Is.SOFTMAX):
            scores = _source(space, node.args[0])
            if scores is not None and len(scores.outputs[0].shape) >= 3:
                found |= frozenset().union(*(atoms for _, atoms in space.contracts[scores.index]), NONE)
        elif is_a(node, Is.MATRIX_PRODUCT) and len(node.args[0].shape) >= 3:
            source = _source(space, node.args[0], Is.SOFTMAX)
            if source is not None:
                found |= space.leaves[node.args[1].id][-1]
    return found


def _source(space: Space, value: Value, traits: Is = Is.MAKES_SCORES) -> Node | None:
    """The operator with one of `traits` that a value comes from through what scores pass; None for a product with a parameter."""
    for _ in range(24):
        node = space.made.get(value.id)
        if node is None:
            return None
        if is_a(node, traits):
            return None if any(space.parameter_of(v.id) is not None for v in node.inputs()) else node
        if not is_a(node, Is.PASSES_SCORES):
            return None
        value = next(node.inputs())
    return None


def _elements(value: Value) -> int:
    return prod(value.shape)


def _worth(space: Space, cut: Cut, carriers: Mapping[Atom, list[Value]]) -> float:
    """Parameter elements that a rank saves over elements reduced (once for each contraction over the axis) or gathered."""
    values = {v.id: v for atom in cut.atoms for v in carriers[atom]}
    saved = sum(map(_elements, values.values())) - _held(space, cut, carriers)
    moved = 1
    for index in space.summing.get(cut.major, ()):
        moved += max((_elements(o) for o in space.graph.nodes[index].outputs), default=1)
    for result in space.graph.results:
        for _, leaf in result.leaves:
            if isinstance(leaf, Value) and cut.major in space.carried.get(leaf.id, NONE):
                moved += _elements(leaf)
    return saved / moved


def _try(space: Space, cuts: tuple[Cut, ...], state: Taken, carriers: Mapping[Atom, list[Value]]) -> Taken | Conflict:
    """The state with `cuts` taken too, or what forbids it."""
    fresh = {atom: cut for cut in cuts for atom in cut.atoms}
    if state.cuts:  # what fails alone fails together, and a pass over one axis is short
        alone = _try(space, cuts, Taken({}, state.whole, Labels()), carriers)
        if isinstance(alone, Conflict):
            return alone
    wanted, gathers, whole = {**state.cuts, **fresh}, state.gathers, state.whole
    labels = label(space, wanted, gathers, whole)
    made = labels.generated - state.labels.generated
    if labels.conflicts and made:
        again = label(space, wanted, gathers, whole | made)
        if not again.conflicts:
            whole, labels = whole | made, again
    if labels.conflicts:
        first = labels.conflicts[0]
        for cut in cuts:
            for slot in _gather_slots(space, cut.major, labels, carriers[cut.major])[:GATHER_TRIES]:
                trial = {**gathers, slot: gathers.get(slot, NONE) | cut.atoms}
                again = label(space, wanted, trial, whole)
                if not again.conflicts:
                    gathers, labels = trial, again
                    break
        if labels.conflicts:
            return first
    for cut in cuts:
        head = _head_gather(space, cut, wanted, gathers, whole, labels, carriers[cut.major])
        if isinstance(head, Conflict):
            return head
        gathers, labels = head
        whole_results = _whole_results(space, wanted, gathers, whole, labels, cut)
        if isinstance(whole_results, Conflict):
            return whole_results
        gathers, labels = whole_results
        if _small_table(space, cut):
            return Conflict(cut.atoms, None, "a lookup table this short costs more to reduce than it saves")
        if labels.gathered and not _pays(space, cut, labels, carriers[cut.major]):
            return Conflict(cut.atoms, None, "sharding it would only move work to a gather of the result")
        if cut.padded and (conflict := padding_conflict(space, labels, cut)) is not None:
            return conflict
    return Taken(gathers, whole, labels)


def _small_table(space: Space, cut: Cut) -> bool:
    """True for an axis that is only looked up, in a table of few rows (token types) or of positions.

    Positions are told from tokens by their ids: the tokens' come from an argument of the model unchanged.
    """
    nodes = [space.graph.nodes[i] for i in space.summing.get(cut.major, ())]
    if not nodes or not all(is_a(n, Is.LOOKUP) for n in nodes):
        return False
    return cut.size < 8 * cut.tp or not any(_is_argument(space, n.args[1]) for n in nodes)


def _is_argument(space: Space, value: Value) -> bool:
    made = space.made
    seen: set[int] = set()
    queue = [value]
    while queue:
        item = queue.pop()
        if item.origin is Origin.INPUT:
            return True
        node = made.get(item.id)
        if node is not None and is_a(node, Is.PASSES_ARGUMENTS) and item.id not in seen:
            seen.add(item.id)
            queue += list(node.inputs())
    return False


def _gather_slots(space: Space, atom: Atom, labels: Labels, carriers: list[Value]) -> list[SlotKey]:
    """EXITs that a value sharded on `atom` leaves through on its way to a result of the model, in order."""
    reaching: set[int] = set()
    for result in space.graph.results:
        reaching |= {v.id for _, v in result.leaves if isinstance(v, Value) and atom in space.carried.get(v.id, NONE)}
    for node in reversed(space.graph.nodes):
        if any(o.id in reaching for o in node.outputs):
            reaching |= {v.id for v in node.inputs() if atom in labels.of(v)}
    weights = {v.id for v in carriers}
    slots: dict[SlotKey, None] = {}
    for node in space.graph.nodes:
        if node.op is Pseudo.EXIT and node.slot is not None and node.outputs[0].id in reaching:
            (value,) = node.args
            if atom in labels.of(value) and value.id not in weights:
                slots[(Pseudo.EXIT, *node.slot)] = None
    return list(slots)


def _head_gather(
    space: Space, cut: Cut, wanted: Cuts, gathers: Mapping[SlotKey, Atoms], whole: frozenset[int], labels: Labels, carriers: list[Value]
) -> tuple[Mapping[SlotKey, Atoms], Labels] | Conflict:
    """Results on an axis that nothing but a lookup sums over (a vocabulary) are gathered where their head returns.

    At the end of the model would do for what was traced. But losses are often computed behind a condition that no traced call
    met, and take logits for whole. So the head has to be a module that calls no other: nothing follows the product there.
    """
    if not all(is_a(space.graph.nodes[i], Is.LOOKUP) for i in space.summing.get(cut.major, ())) or not _returned(space, labels, cut):
        return gathers, labels
    callers = {space.graph.calls.get(caller, ("", 0))[0] for _, caller in space.graph.calls.values()}
    for slot in _gather_slots(space, cut.major, labels, carriers):
        if slot[1] and slot[1] not in callers:
            trial = {**gathers, slot: gathers.get(slot, NONE) | cut.atoms}
            again = label(space, wanted, trial, whole)
            if not again.conflicts and not _returned(space, again, cut):
                return trial, again
    return Conflict(cut.atoms, None, "no module of its own makes this result, and code that was not traced could take a part of it for all")


def _returned(space: Space, labels: Labels, cut: Cut) -> bool:
    """True where a result of the model is sharded on `cut`."""
    return any(isinstance(v, Value) and cut.atoms & labels.of(v) for result in space.graph.results for _, v in result.leaves)


def _whole_results(
    space: Space, wanted: Cuts, gathers: Mapping[SlotKey, Atoms], whole: frozenset[int], labels: Labels, cut: Cut
) -> tuple[Mapping[SlotKey, Atoms], Labels] | Conflict:
    """`gathers` extended so that no result of the model is sharded on `cut`, and the labels then.

    Results are gathered as near as can be to where they are made: the code between there and the model's end may have branches that
    no traced call took (a loss behind a flag), and methods of the model may be called without it.
    """
    if not _returned(space, labels, cut):
        return gathers, labels
    conflict = Conflict(cut.atoms, None, "the sharded value is returned in a form that cannot be gathered")
    for nodes in _exits_to_results(space, labels, cut):
        trial = dict(gathers)
        for node in nodes:
            assert node.slot is not None
            key: SlotKey = (Pseudo.EXIT, *node.slot)
            trial[key] = trial.get(key, NONE) | cut.atoms
        again = label(space, wanted, trial, whole)
        if not again.conflicts and not _returned(space, again, cut):
            return trial, again
        conflict = again.conflicts[0] if again.conflicts else conflict
    return conflict


def _exits_to_results(space: Space, labels: Labels, cut: Cut) -> list[list[Node]]:
    """Sets of EXITs that everything sharded on `cut` passes on its way to a result of the model, the innermost set first.

    A set with an EXIT whose value nothing uses in some call (attention weights, most of the time) is left out: that call would
    gather in vain.
    """
    leaves = {v.id: v for result in space.graph.results for _, v in result.leaves if isinstance(v, Value) and cut.atoms & labels.of(v)}
    results = {v.id for result in space.graph.results for _, v in result.leaves if isinstance(v, Value)}
    unused = {
        node.slot
        for node in space.graph.nodes
        if node.op is Pseudo.EXIT
        and labels.of(node.outputs[0])
        and node.outputs[0].id not in results
        and not space.users.get(node.outputs[0].id)
    }
    level = [space.made[key] for key in leaves if key in space.made]
    if len(level) < len(leaves):
        return []
    sets: list[list[Node]] = []
    while True:
        if all(node.op is Pseudo.EXIT for node in level) and not any(node.slot in unused for node in level):
            sets.append(level)
        inner = {n.index: n for node in level for n in (_exits_before(space, labels, cut, node) or [node])}
        if set(inner) == {node.index for node in level}:
            return sets[::-1][:GATHER_TRIES]
        level = list(inner.values())


def _exits_before(space: Space, labels: Labels, cut: Cut, node: Node) -> list[Node]:
    """The EXITs that what is sharded on `cut` passed last on its way to `node`; none where some of it passed none."""
    found: dict[int, Node] = {}
    seen: set[int] = set()
    queue = [node]
    while queue:
        item = queue.pop()
        sharded = [v for v in item.inputs() if cut.atoms & labels.of(v) and space.parameter_of(v.id) is None]
        if not sharded:
            return []
        for value in sharded:
            made = space.made[value.id]
            if made.op is Pseudo.EXIT:
                found[made.index] = made
            elif made.index not in seen:
                seen.add(made.index)
                queue.append(made)
    return list(found.values())


def _pays(space: Space, cut: Cut, labels: Labels, carriers: list[Value]) -> bool:
    """An axis that no product sums over is worth a gather when it is the wide side (a vocabulary), not a bottleneck."""
    atom = cut.major
    if not any(atom in atoms for atoms in labels.gathered.values()):
        return True
    for index in space.summing.get(atom, ()):
        if any(atom in atoms and not contract.whole for contract, atoms in space.contracts[index]):
            return True
    rows = {node.args[0].shape[0] for node in space.graph.nodes if is_a(node, Is.LOOKUP)}
    inner = max(_elements(v) // cut.size for v in carriers)
    return cut.size >= 4 * inner or cut.size in rows
