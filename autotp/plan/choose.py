"""Which atoms to shard.

Each leaf atom that a parameter carries and tp divides is a candidate. A candidate's worth is the number of parameter elements
it shards over the elements that its collectives move; candidates are taken greedily from the best, each kept if the labels of
all that are taken have no conflict. So heads beat head widths, and both beat the residual stream, whose every product would
be a partial sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice, product
from math import prod

from autotp.axes.atoms import Atom, dim_size, flat
from autotp.plan.labels import NONE, Atoms, Conflict, Labels, SlotKey, Space, label, leaf_atoms
from autotp.trace.graph import Origin, Pseudo, Value

#: A head's result leaves its module at once; later boundaries are not worth a pass each.
GATHER_TRIES = 4


@dataclass(frozen=True, slots=True)
class Choice:
    """The atoms taken, where results are gathered, the labels they give, and why the other candidates were refused."""

    on: Atoms
    gathers: Mapping[SlotKey, Atoms]
    whole: frozenset[int]
    labels: Labels
    refused: Mapping[Atom, str]


def choose(space: Space, tp: int, banned: Mapping[Atom, str], forced: frozenset[int] = frozenset()) -> Choice:
    """Take the candidates greedily; `banned` ones are refused with the reason given, results of `forced` nodes stay whole."""
    refused: dict[Atom, str] = {}
    weights: dict[Atom, list[Value]] = {}
    for value in dict.fromkeys(space.graph.params.values()):
        for atom in space.carried[value.id]:
            weights.setdefault(atom, []).append(value)
    ranked: list[tuple[float, int, Atom]] = []
    for atom, carriers in weights.items():
        if atom in banned:
            refused[atom] = banned[atom]
        elif atom.size % tp:
            refused[atom] = f"{atom.size} is not divisible by tp={tp}"
        else:
            ranked.append((-_worth(space, atom, carriers), atom.id, atom))
    for atom in head_widths(space):
        refused.setdefault(atom, "it is the width of one attention head, which is not cut")
    ranked = [r for r in ranked if r[2] not in refused]
    on: Atoms = NONE
    gathers: dict[SlotKey, Atoms] = {}
    whole = forced
    labels = label(space, on, gathers, whole)
    for _, _, atom in sorted(ranked, key=lambda t: t[:2]):
        if atom in on:
            continue
        tried = _try(space, frozenset({atom}), on, gathers, whole, weights, tp, labels.generated)
        if isinstance(tried, Conflict) and tried.uncovered:
            free = {a for _, _, a in ranked}
            for companions in islice(product(*([a for a in leaf_atoms(s) if a in free] for s in tried.uncovered)), 32):
                joint = _try(space, frozenset({atom, *companions}), on, gathers, whole, weights, tp, labels.generated)
                if not isinstance(joint, Conflict):
                    tried = joint
                    break
        if isinstance(tried, Conflict):
            others = [a for a in tried.atoms if a is not atom]
            clash = bool(others) and any(a in on for a in others)
            refused[atom] = "another axis of the same tensors is sharded" if clash else str(tried)
        else:
            on, gathers, whole, labels = tried
    refused = {a: r for a, r in refused.items() if a not in on}
    return Choice(on, gathers, whole, labels, refused)


def head_widths(space: Space) -> set[Atom]:
    """Atoms of the last dim of what attention probabilities are multiplied with: inside a head."""
    made = space.made
    through = {
        "dropout",
        "to",
        "_to_copy",
        "view",
        "reshape",
        "enter",
        "exit",
        "slice",
        "clone",
        "contiguous",
        "mul",
        "masked_fill",
        "expand",
        "nan_to_num",
    }

    def softmaxed(value: Value) -> bool:
        for _ in range(16):
            node = made.get(value.id)
            if node is None:
                return False
            if node.opname in ("softmax", "_softmax"):
                return True
            if node.opname not in through:
                return False
            value = next(node.inputs())
        return False

    found: set[Atom] = set()
    for node in space.graph.nodes:
        if node.opname == "scaled_dot_product_attention":
            found |= space.leaves[node.args[2].id][-1]
        elif node.opname in ("matmul", "bmm") and len(node.args[0].shape) >= 3 and softmaxed(node.args[0]):
            found |= space.leaves[node.args[1].id][-1]
    return found


def _elements(value: Value) -> int:
    return prod(value.shape)


def _worth(space: Space, atom: Atom, carriers: list[Value]) -> float:
    """Parameter elements sharded over elements reduced (once for each contraction over the atom) or gathered."""
    sharded = sum(_elements(v) * max(share(d, atom) for d in space.axes.dims[v.id]) for v in carriers)
    moved = 1
    for index in space.summing.get(atom, ()):
        moved += max((_elements(o) for o in space.graph.nodes[index].outputs), default=1)
    for result in space.graph.results:
        for _, leaf in result.leaves:
            if isinstance(leaf, Value) and atom in space.carried.get(leaf.id, NONE):
                moved += _elements(leaf)
    return sharded / moved


def share(dim: Iterable[Atom], atom: Atom) -> float:
    """The part of a dim's indices that pass through `atom`."""
    for part in flat(list(dim)):
        if part is atom:
            return 1.0
        if part.segments is not None:
            inside = sum(dim_size(s) * share(s, atom) for s in part.segments)
            if inside:
                return inside / part.size
    return 0.0


def _try(
    space: Space, atoms: Atoms, on: Atoms, gathers: dict[SlotKey, Atoms], whole: frozenset[int], weights: Mapping[Atom, list[Value]],
    tp: int, settled: set[int],
) -> tuple[Atoms, dict[SlotKey, Atoms], frozenset[int], Labels] | Conflict:  # fmt: skip
    """The state with `atoms` taken too, or what forbids it."""
    if on:  # what fails alone fails together, and a pass over one axis is short
        alone = _try(space, atoms, NONE, {}, frozenset(w for w in whole), weights, tp, set())
        if isinstance(alone, Conflict):
            return alone
    wanted = on | atoms
    labels = label(space, wanted, gathers, whole)
    fresh = labels.generated - settled
    if labels.conflicts and fresh:
        relaxed = whole | fresh
        again = label(space, wanted, gathers, relaxed)
        if not again.conflicts:
            whole, labels = relaxed, again
    if labels.conflicts:
        first = labels.conflicts[0]
        for atom in sorted(atoms, key=lambda a: a.id):
            for slot in _gather_slots(space, atom, labels, weights[atom])[:GATHER_TRIES]:
                trial = {**gathers, slot: gathers.get(slot, NONE) | {atom}}
                again = label(space, wanted, trial, whole)
                if not again.conflicts:
                    gathers, labels = trial, again
                    break
        if labels.conflicts:
            return first
    for atom in sorted(atoms, key=lambda a: a.id):
        final = _result_gathers(space, labels, atom, gathers)
        if final is None:
            return Conflict(frozenset({atom}), None, "the sharded value is returned in a form that cannot be gathered")
        if final != gathers:
            gathers = final
            labels = label(space, wanted, gathers, whole)
            if labels.conflicts:
                return labels.conflicts[0]
        if _small_table(space, atom, tp):
            return Conflict(frozenset({atom}), None, "a lookup table this short costs more to reduce than it saves")
        if labels.gathered and not _pays(space, atom, labels, weights[atom]):
            return Conflict(frozenset({atom}), None, "sharding it would only move work to a gather of the result")
    return wanted, gathers, whole, labels


def _small_table(space: Space, atom: Atom, tp: int) -> bool:
    """True for an axis that is only looked up, in a table of few rows (token types) or of positions.

    Positions are told from tokens by their ids: the tokens' come from an argument of the model unchanged.
    """
    nodes = [space.graph.nodes[i] for i in space.summing.get(atom, ())]
    if not nodes or any(n.opname != "embedding" for n in nodes):
        return False
    return atom.size < 8 * tp or not any(_is_argument(space, n.args[1]) for n in nodes)


#: Operators that pass an argument of the model on.
# fmt: off
_PASSING = frozenset((
    "enter", "exit", "view", "reshape", "slice", "to", "_to_copy", "clone", "squeeze", "unsqueeze", "masked_fill", "where",
    "long", "contiguous", "pad", "constant_pad_nd", "cat", "copy_", "write",
))
# fmt: on


def _is_argument(space: Space, value: Value) -> bool:
    made = space.made
    seen: set[int] = set()
    queue = [value]
    while queue:
        item = queue.pop()
        if item.origin is Origin.INPUT:
            return True
        node = made.get(item.id)
        if node is not None and node.opname in _PASSING and item.id not in seen:
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


def _result_gathers(space: Space, labels: Labels, atom: Atom, gathers: dict[SlotKey, Atoms]) -> dict[SlotKey, Atoms] | None:
    """`gathers` extended so that no result of the model is sharded on `atom`; None where that cannot be said."""
    made = space.made
    out = dict(gathers)
    for result in space.graph.results:
        for _, leaf in result.leaves:
            if isinstance(leaf, Value) and atom in labels.of(leaf):
                node = made.get(leaf.id)
                if node is None or node.op is not Pseudo.EXIT or node.slot is None:
                    return None
                key = (Pseudo.EXIT, *node.slot)
                out[key] = out.get(key, NONE) | {atom}
    return out


def _pays(space: Space, atom: Atom, labels: Labels, carriers: list[Value]) -> bool:
    """An axis that no product sums over is worth a gather when it is the wide side (a vocabulary), not a bottleneck."""
    if not any(atom in atoms for atoms in labels.gathered.values()):
        return True
    for index in space.summing.get(atom, ()):
        if any(atom in atoms and not contract.whole for contract, atoms in space.contracts[index]):
            return True
    rows = {node.args[0].shape[0] for node in space.graph.nodes if node.opname == "embedding"}
    inner = max(_elements(v) // atom.size for v in carriers)
    return atom.size >= 4 * inner or atom.size in rows
