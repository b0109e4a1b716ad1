"""Chooses which axes to shard, and how.

Each leaf atom that a parameter carries is a candidate, and each pair of neighbouring ones of which tp does not divide the first (kv
heads and the query heads of each). A candidate's worth is the number of parameter elements that a rank saves over the elements that
its collectives move. Candidates are taken greedily from the best. Each is kept if the placements of all that are taken have no
conflict. So heads beat head widths. Both beat the residual stream, whose every product would be a partial sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, product
from math import gcd, prod

from autotp.axes.atoms import Atom, leaf_atoms
from autotp.axes.operators.table import Is, is_a
from autotp.planner.gathers import GATHER_TRIES, gather_slots, head_gather, whole_results
from autotp.planner.heads import head_widths
from autotp.planner.labelling import label
from autotp.planner.padding import padding_conflict
from autotp.planner.partition import Atoms, Partition, Partitions, last_atoms, local_size, neighbours
from autotp.planner.placements import NONE, GraphIndex, Labels, SlotKey
from autotp.planner.refusals import Conflict
from autotp.planner.requested import Reason, Wanted, claimed, granules, ruled_out
from autotp.trace.graph import Origin, Value

UNREAD = "no traced call reads it"
#: Rows from which on a table is cut that is no vocabulary. Positions have 512 or 1024 in most models, where they are less than 0.01 of
#: the parameters; those of LED (16,384) and Longformer (4098) are 0.08 and 0.02 of them, and the hashes of CANINE (16,384 each) 0.1.
LONG = 4096
HEAD_WIDTH = "it is the width of one attention head, which is not cut"
BY_LENGTH = "the code sizes the dim by a length, which the next call may have otherwise"


@dataclass(frozen=True, slots=True)
class Taken:
    """The state so far: where results are gathered, which nodes' results stay whole, and the labels, which hold the cuts."""

    gathers: Mapping[SlotKey, Atoms]
    whole: frozenset[int]
    labels: Labels

    @property
    def cuts(self) -> Partitions:
        """Returns the cuts taken."""
        return self.labels.cuts


@dataclass(frozen=True, slots=True)
class Choice(Taken):
    """The candidates taken in the end, and why the other ones were refused."""

    refused: Mapping[Atom, Reason]

    @property
    def on(self) -> Atoms:
        """Returns the atoms that are sharded."""
        return frozenset(self.cuts)


def choose(
    space: GraphIndex,
    tp: int,
    banned: Mapping[Partition, str],
    forced: frozenset[int] = frozenset(),
    wanted: Wanted | None = None,
    nothing: str = "",
) -> Choice:
    """Take the candidates greedily; `banned` ones are refused with the reason given, results of `forced` nodes stay whole.

    `nothing`: why no candidate is taken at all.

    Partitions that `wanted` layouts ask for are taken first, those that they rule out never.
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
        refused.setdefault(atom, Reason(HEAD_WIDTH))
    unread = {atom for value in space.graph.params.values() if value.id not in space.users for atom in space.carried[value.id]}
    refused.update(dict.fromkeys(unread, Reason(UNREAD)))
    by_length = {atom: space.varying[atom] for atom in carriers if atom in space.varying}
    refused.update((atom, Reason(f"{BY_LENGTH}: {node}")) for atom, node in by_length.items())
    if nothing:
        refused.update((atom, Reason(nothing)) for atom in carriers if atom not in refused)
    free = {atom for atom in carriers if not nothing and atom not in widths and atom not in unread and atom not in by_length}
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
                both = tuple(sorted({cut, *companions}, key=ranked.index))  # the same ones are found from each of them
                joint = _try(space, both, state, carriers)
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


def _candidates(space: GraphIndex, carriers: Mapping[Atom, list[Value]], free: set[Atom], tp: int, wanted: Wanted) -> Iterable[Partition]:
    """Partitions that leave a rank less than the whole axis."""
    aligned = _granules(space)
    for atom in sorted(free, key=lambda a: a.id):
        if atom.size > 1:
            own = aligned.get(atom, 1)
            yield Partition(atom, tp, granule=own)
            yield from (Partition(atom, tp, granule=g) for g in sorted(granules(wanted, atom.size)) if g > own and g % own == 0)
    pairs = {pair: None for v in space.graph.params.values() for dim in space.axes.dims[v.id] for pair in neighbours(dim)}
    for major, minor in pairs:
        if major in free and minor in free and major.size > 1 and minor.size > 1 and major.size % tp and _within(major, minor, carriers):
            both = [Partition(major, tp, minor, n) for n in _pieces(minor.size)]
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


def _granules(space: GraphIndex) -> dict[Atom, int]:
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


def _held(space: GraphIndex, cut: Partition, carriers: Mapping[Atom, list[Value]]) -> float:
    """Counts the elements on a rank of the parameters that carry the axis."""
    values = {v.id: v for atom in cut.atoms for v in carriers[atom]}
    cuts = dict.fromkeys(cut.atoms, cut)
    return sum(prod(local_size(d, space.carried[v.id] & cut.atoms, cuts) for d in space.axes.dims[v.id]) for v in values.values())


def _elements(value: Value) -> int:
    return prod(value.shape)


def _worth(space: GraphIndex, cut: Partition, carriers: Mapping[Atom, list[Value]]) -> float:
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


def _try(space: GraphIndex, cuts: tuple[Partition, ...], state: Taken, carriers: Mapping[Atom, list[Value]]) -> Taken | Conflict:
    """Returns the state with `cuts` taken too, or the conflict that forbids it.

    Each draft of a plan tries most of what the one before it tried, so what was found is remembered.
    """
    key = cuts, tuple(state.cuts.items()), frozenset(state.gathers.items()), state.whole, frozenset(state.labels.generated)
    found: Taken | Conflict | None = space.tried.get(key)
    if found is None:
        found = space.tried[key] = _tried(space, cuts, state, carriers)
    return found


def _tried(space: GraphIndex, cuts: tuple[Partition, ...], state: Taken, carriers: Mapping[Atom, list[Value]]) -> Taken | Conflict:
    fresh = {atom: cut for cut in cuts for atom in cut.atoms}
    if state.cuts:  # cuts that fail alone fail together, and a pass over one axis is short
        alone = _try(space, cuts, Taken({}, state.whole, Labels()), carriers)
        if isinstance(alone, Conflict):
            return alone
    wanted, gathers, whole = {**state.cuts, **fresh}, state.gathers, state.whole
    labels = label(space, wanted, gathers, whole, state.labels)
    made = labels.generated - state.labels.generated
    if labels.conflicts and made:
        again = label(space, wanted, gathers, whole | made, state.labels, trial=True)
        if not again.conflicts:
            whole, labels = whole | made, again
    if labels.conflicts:
        first = labels.conflicts[0]
        for cut in cuts:
            for slot in gather_slots(space, cut.major, labels, carriers[cut.major])[:GATHER_TRIES]:
                trial = {**gathers, slot: gathers.get(slot, NONE) | cut.atoms}
                again = label(space, wanted, trial, whole, state.labels, trial=True)
                if not again.conflicts:
                    gathers, labels = trial, again
                    break
        if labels.conflicts:
            return first
    for cut in cuts:
        head = head_gather(space, cut, wanted, gathers, whole, labels, carriers[cut.major])
        if isinstance(head, Conflict):
            return head
        gathers, labels = head
        found = whole_results(space, wanted, gathers, whole, labels, cut)
        if isinstance(found, Conflict):
            return found
        gathers, labels = found
        if _small_table(space, cut):
            return Conflict(cut.atoms, None, "a lookup table this short costs more to reduce than it saves")
        if labels.gathered and not _pays(space, cut, labels, carriers[cut.major]):
            return Conflict(cut.atoms, None, "sharding it would only move work to a gather of the result")
        if cut.padded and (conflict := padding_conflict(space, labels, cut)) is not None:
            return conflict
    return Taken(gathers, whole, labels)


def _small_table(space: GraphIndex, cut: Partition) -> bool:
    """True for an axis that is only looked up, in a table of few rows (token types) or of positions up to `LONG`.

    Positions are told from tokens by their ids: the tokens' come from an argument of the model unchanged.
    """
    nodes = [space.graph.nodes[i] for i in space.summing.get(cut.major, ())]
    if not nodes or not all(is_a(n, Is.LOOKUP) for n in nodes):
        return False
    return cut.size < 8 * cut.tp or (cut.size < LONG and not any(_is_argument(space, n.args[1]) for n in nodes))


def _is_argument(space: GraphIndex, value: Value) -> bool:
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


def _pays(space: GraphIndex, cut: Partition, labels: Labels, carriers: list[Value]) -> bool:
    """True where an axis that no product sums over is worth a gather: it is the wide side (a vocabulary), not a bottleneck."""
    atom = cut.major
    gathering = [space.graph.nodes[index].slot for index, atoms in labels.gathered.items() if atom in atoms]
    if all(slot is not None and slot[0] in space.axes.ends for slot in gathering):
        return True
    for index in space.summing.get(atom, ()):
        if any(atom in atoms and not contract.whole for contract, atoms in space.contracts[index]):
            return True
    rows = {node.args[0].shape[0] for node in space.graph.nodes if is_a(node, Is.LOOKUP)}
    inner = max(_elements(v) // cut.size for v in carriers)
    return cut.size >= 4 * inner or cut.size in rows
