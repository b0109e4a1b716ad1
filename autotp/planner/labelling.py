"""Finds the placement of every value, given which atoms are sharded.

    label(space, cuts, gathers)  →  Labels

Placements flow forward from the sharded parameters. A value that no parameter shards stays whole, and is sliced where it meets a
sharded one. An impossible choice is a `Conflict`; a conversion that is needed is noted on its edge.

What a node does depends on the labels of its arguments and the cuts of their atoms alone, and for a partial sum on how that was made.
So labels of a few more cuts are found from those before: only the nodes that a change reaches are visited.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from heapq import heappop, heappush
from operator import itemgetter

from autotp.axes.analysis import Meaning
from autotp.plan.spec import DistributedForm
from autotp.planner.faults import Faults, faults_of
from autotp.planner.partition import Atoms, Partitions, covers, in_order, uncovered
from autotp.planner.placements import NONE, GraphIndex, Labels, Pass, SlotKey
from autotp.planner.refusals import Conflict
from autotp.trace.graph import Node, Origin, Pseudo, Value


def label(
    space: GraphIndex,
    cuts: Partitions,
    gathers: Mapping[SlotKey, Atoms],
    whole: frozenset[int] = frozenset(),
    before: Labels | None = None,
    *,
    trial: bool = False,
) -> Labels:
    """Label every value with its placement, with the atoms of `cuts` sharded.

    `gathers`: results gathered at a module's EXIT; `whole`: nodes whose result is not made sharded. `before`: labels of some of the
    cuts, from which these are found. `trial`: labels in conflict are of no use, so the first conflict may end the search for them.

    Passes are repeated until it is known which parameters are added to partial sums. The result is remembered, and not to be changed.
    """
    decided = whole.intersection(i for atom in cuts for i in space.generators.get(atom, ()))  # the others make nothing of these axes
    key = tuple(cuts.items()), frozenset(gathers.items()), decided
    known = space.labelled.get(key)
    if known is None and trial:
        known = space.failed.get(key)
    if known is not None:
        return known
    once: set[int] = set()
    passes: list[Pass] = []
    earlier = before.passes if before is not None else ()
    while True:
        start = earlier[min(len(passes), len(earlier) - 1)] if earlier else None
        out = _pass(space, cuts, gathers, whole, once, start if start is not None and _within(start, cuts) else None, trial)
        if trial and out.conflicts:
            space.failed[key] = out
            return out
        passes.append(Pass(gathers, whole, frozenset(once), out))
        out.once = set().union(*out.adding.values())
        if out.once <= once:
            out.once = once
            out.passes = tuple(passes)
            space.labelled[key] = out
            return out
        once = once | out.once


def _within(start: Pass, cuts: Partitions) -> bool:
    """True where labels of `cuts` can be found from those of a pass: its own cuts are among them, and none is in conflict."""
    return not start.labels.conflicts and all(cuts.get(atom) == cut for atom, cut in start.labels.cuts.items())


def _pass(
    space: GraphIndex, cuts: Partitions, gathers: Mapping[SlotKey, Atoms], whole: frozenset[int], once: set[int], start: Pass | None,
    trial: bool,
) -> Labels:  # fmt: skip
    """Visit, in order, the nodes that a sharded or partial value reaches, or those that a change since `start` does. A `trial` ends at the
    first conflict.
    """
    out, on = Labels(cuts), frozenset(cuts)
    seen: set[int] = set()
    if start is not None:
        old = start.labels
        out.shard, out.slices, out.distributed, out.gathered = dict(old.shard), dict(old.slices), dict(old.distributed), dict(old.gathered)
        out.partial, out.born, out.reduces, out.generated = set(old.partial), set(old.born), set(old.reduces), set(old.generated)
        out.adding = dict(old.adding)
        out.partial -= start.once
        turned = start.whole ^ whole
        seen.update(i for atom in on for i in space.generators.get(atom, ()) if i in turned)
        slots = (slot for slot in {**start.gathers, **gathers} if start.gathers.get(slot) != gathers.get(slot))
        seen.update(i for slot in slots for i in space.exits.get(slot, ()))
    out.partial |= once
    fresh = on if start is None else on.difference(start.labels.cuts)
    moved = once if start is None else once ^ start.once
    seen.update(i for atom in fresh for i in space.generators.get(atom, ()) if i not in whole)
    changed: set[int] = set()
    for value in space.graph.params.values():
        hit = space.carried[value.id] & on
        if hit and hit & fresh:
            out.shard[value.id] = hit
            changed.add(value.id)
        if hit & fresh or value.id in moved:
            seen.update(space.users.get(value.id, ()))
    queue = sorted(seen)
    while queue:
        index = heappop(queue)
        node, inputs = space.graph.nodes[index], space.inputs[index]
        had = _forget(space, node, inputs, out) if start is not None else ()
        if node.op is Pseudo.REPEAT:
            _repeat(space, node, out)
        else:
            active = NONE
            for v in inputs:
                active |= out.shard.get(v.id, NONE)
            partial = [v for v in inputs if v.id in out.partial]
            _node(space, node, space.axes.meanings[index], inputs, active, partial, on, gathers, whole, out)
        if trial and out.conflicts:
            return out
        for at, o in enumerate(node.outputs):
            if start is None:
                goes_on = o.id in out.shard or o.id in out.partial
            else:
                has = out.shard.get(o.id, NONE), o.id in out.partial, o.id in out.born
                if has[0] != had[at][0]:
                    changed.add(o.id)
                # how a partial sum was made, and what a part of a parameter is one of, is asked further on too
                goes_on = has != had[at] or has[1] or space.parameter_of(o.id) is not None
            if goes_on:
                for user in space.users.get(o.id, ()):
                    if user not in seen:
                        seen.add(user)
                        heappush(queue, user)
    if start is None:
        _check_values(space, out, out.shard, out.slices)
        return out
    out.distributed, out.gathered = (
        dict(sorted(out.distributed.items(), key=itemgetter(0))),
        dict(sorted(out.gathered.items(), key=itemgetter(0))),
    )
    out.slices = dict(sorted(out.slices.items(), key=lambda item: item[0][0]))
    made = space.made
    values = sorted((key for key in changed if key in out.shard), key=lambda key: (made[key].index if key in made else -1, key))
    _check_values(space, out, values, [edge for edge in out.slices if edge[0] in seen])
    return out


def _forget(space: GraphIndex, node: Node, inputs: Sequence[Value], out: Labels) -> Sequence[tuple[Atoms, bool, bool]]:
    """Takes out what is known of a node and its results; returns what was known of those."""
    index = node.index
    for v in inputs:
        out.slices.pop((index, v.id), None)
        out.reduces.discard((index, v.id))
    for table in (out.distributed, out.gathered, out.adding):
        table.pop(index, None)
    out.generated.discard(index)
    had = [(out.shard.pop(o.id, NONE), o.id in out.partial, o.id in out.born) for o in node.outputs]
    for o in node.outputs:
        out.partial.discard(o.id)
        out.born.discard(o.id)
    return had


def _repeat(space: GraphIndex, node: Node, out: Labels) -> None:
    here, there = node.args
    for a, b in zip(here, there, strict=True):
        if out.of(a) != out.of(b):
            out.conflicts.append(Conflict(out.of(a) | out.of(b), node, "a repeated block gets its argument in another placement"))
        if (a.id in out.partial) != (b.id in out.partial):  # whole for one block is whole for all that are alike
            out.reduces.add((node.index, a.id if a.id in out.partial else b.id))


def _node(
    space: GraphIndex, node: Node, meaning: Meaning, inputs: Sequence[Value], active: Atoms, partial: list[Value], on: Atoms,
    gathers: Mapping[SlotKey, Atoms], whole: frozenset[int], out: Labels,
) -> None:  # fmt: skip
    index = node.index
    # whole arguments that carry an active atom are sliced
    have: dict[int, Atoms] = {}
    for v in inputs:
        own = out.shard.get(v.id, NONE)
        missing = (space.carried.get(v.id, NONE) & active) - own
        if missing and v.id not in out.partial:
            if v.id in space.graph.fills and v.origin is Origin.NODE and not v.shape:
                missing = NONE
            out.slices[index, v.id] = missing
            if missing and v.id in space.flows and not space.free(v.id) and not _given(space, index, v, missing, out):
                out.conflicts.append(Conflict(missing, node, "no parameter makes this activation sharded: it would only be sliced"))
        have[v.id] = own | missing
    for site, atoms in space.blocked[index]:
        hit = have.get(site.value, out.shard.get(site.value, NONE)) & atoms
        if hit:
            out.conflicts.append(Conflict(hit, node, site.reason))
    # partial arguments pass where the operator commutes with the sum
    ids = frozenset(v.id for v in partial)
    passes = bool(partial) and any(
        ids <= group and all(g in ids or space.graph.fills.get(g) == 0.0 for g in group) for group in meaning.linear
    )
    # contractions over a sharded dim make partial sums
    summed = NONE
    crossed: dict[int, Atoms] = {}
    for contract, atoms in space.contracts[index]:
        crossed[contract.value] = crossed.get(contract.value, NONE) | atoms
    for contract, atoms in space.contracts[index]:
        hit = have.get(contract.value, NONE) & atoms
        if not hit:
            continue
        statistic = contract.form is not None and contract.form is not DistributedForm.LOOKUP  # it tells copies and padding apart
        if not statistic and not covers(contract.dim, have[contract.value], out.cuts):
            segments = tuple(uncovered(contract.dim, have[contract.value], out.cuts))
            out.conflicts.append(Conflict(hit, node, "some of what is summed is held by several ranks", segments))
        if statistic and (parted := _parted(hit, have[contract.value], crossed[contract.value], out.cuts)):
            out.conflicts.append(Conflict(parted, node, "the cut goes through the groups that a statistic is taken of"))
        if contract.form is not None:
            out.distributed[index] = contract.form
            if not space.calls.stands_for(node, contract.form):
                call = space.graph.python.get(node.call)
                function = call.function if call is not None else "a function"
                why = space.graph.sealed(node) or f"it is part of {function}, which has no distributed form"
                out.conflicts.append(Conflict(hit, node, why))
        if not contract.whole:
            summed |= hit
    generated = NONE
    if meaning.generates and index not in whole:
        fresh = frozenset().union(*(space.carried[o.id] for o in node.outputs)) & on
        generated = fresh - frozenset().union(*(space.carried.get(v.id, NONE) for v in inputs)) if inputs else fresh
        if generated:
            out.generated.add(index)
    if passes and (summed or generated or any(have[v.id] for v in inputs if v.id not in ids)):
        passes = False  # the sum would meet a sharded operand: take it before
    if partial and not passes and not summed:
        passes = _add_once(space, node, meaning, ids, out)
    if partial and not passes:
        partial = [v for v in partial if not (summed and v.id in meaning.once)]
        out.reduces.update((index, v.id) for v in partial)
    if summed:
        for key in meaning.once:
            if key not in out.partial and not _mark_once(space, node, key, out):
                out.conflicts.append(Conflict(summed, node, "what is added to the partial sum is no parameter"))
    available = active | generated
    for o in node.outputs:
        hit = space.carried.get(o.id, NONE) & available & _flowing(have, generated)
        if node.op is Pseudo.EXIT and node.slot is not None and node.slot[0] in space.axes.ends:
            ending = have[node.args[0].id] - hit
            if ending:
                out.gathered[index] = ending
        elif node.op is Pseudo.EXIT and hit and node.slot is not None:
            wanted = gathers.get((Pseudo.EXIT, *node.slot), NONE) & hit
            wanted = hit & NONE.union(*(out.cuts[a].atoms for a in wanted))  # an axis is gathered as a whole
            if wanted:
                out.gathered[index] = wanted
                hit -= wanted
        if hit:
            out.shard[o.id] = hit
        if (summed or passes) and not o.dtype.is_floating_point and not o.dtype.is_complex:
            out.conflicts.append(Conflict(summed, node, "a sum of integers"))
        if summed or passes:
            out.partial.add(o.id)
            if summed:
                out.born.add(o.id)
            if hit:
                out.conflicts.append(Conflict(hit | summed, node, "a partial sum would also be sharded"))


def _given(space: GraphIndex, index: int, value: Value, missing: Atoms, out: Labels) -> bool:
    """True for an argument of the model (a mask of each head) that meets a sharded activation and is not what the node sums over.

    Only a caller who asks for its gradient pays for the slice.
    """
    if value.id not in space.given or any(contract.value == value.id for contract, _ in space.contracts[index]):
        return False
    return any(missing & out.shard.get(v.id, NONE) for v in space.inputs[index] if v.id in space.activations)


def _parted(hit: Atoms, have: Atoms, crossed: Atoms, cuts: Partitions) -> Atoms:
    """Returns the atoms of the cuts where a value has both factors and its statistic crosses only one.

    Pieces of the groups are dealt. So an index of the remaining factor is another group, or another part of one, on each rank.
    """
    found = (cuts[atom].atoms & have for atom in hit)
    return NONE.union(*(both for both in found if len(both) > 1 and not both <= crossed))


def _add_once(space: GraphIndex, node: Node, meaning: Meaning, ids: frozenset[int], out: Labels) -> bool:
    """True where all whole operands of a sum with partial ones are parameters: those are then added on one rank."""
    if any(_crossed(space, key, out) for key in ids):
        return False  # it can be reduced at the boundary that it crossed
    for group in meaning.linear:
        whole = [g for g in group if g not in ids and space.graph.fills.get(g) != 0.0]
        if ids <= group and whole and all(space.parameter_of(g) is not None and not out.shard.get(g) for g in whole):
            return all(_mark_once(space, node, g, out) for g in whole)
    return False


def _crossed(space: GraphIndex, key: int, out: Labels) -> bool:
    """True for a partial sum that left a module since it was made."""
    while key not in out.born:
        node = space.made.get(key)
        if node is None or node.op is Pseudo.EXIT:
            return node is not None
        key = next((v.id for v in node.inputs() if v.id in out.partial), -1)
    return False


def _mark_once(space: GraphIndex, node: Node, key: int, out: Labels) -> bool:
    parameter = space.parameter_of(key)
    if parameter is None or out.shard.get(parameter):
        return False
    out.adding.setdefault(node.index, set()).add(parameter)
    return True


def _flowing(have: Mapping[int, Atoms], generated: Atoms) -> Atoms:
    return frozenset().union(*have.values(), generated) if have else generated


def _check_values(space: GraphIndex, out: Labels, values: Iterable[int], slices: Iterable[tuple[int, int]]) -> None:
    """Notes what is wrong with the dims of the values and slices that are new."""
    cuts = out.cuts
    found: dict[tuple[int, Atoms], Faults] = {}
    values = list(values)
    for key in values:
        faults = _faults(space, key, out.shard[key], cuts, found)
        out.conflicts += [Conflict(atoms, None, text) for atoms, text in faults.cuts]
        if faults.twice is not None:
            out.conflicts.append(Conflict(frozenset({faults.twice}), None, "both dims of one tensor are the same axis"))
    for index, key in slices:
        missing, own = out.slices[index, key], out.shard.get(key, NONE)
        node = space.graph.nodes[index]
        out.conflicts += [Conflict(atoms, node, text) for atoms, text in _faults(space, key, own | missing, cuts, found).cuts]
        if any(cuts[a].atoms & own for a in missing):
            out.conflicts.append(Conflict(missing, node, "one factor of the axis would be sliced after the other"))
        elif len([d for d in space.leaves[key] if d & missing]) > 1:
            out.conflicts.append(Conflict(missing, node, "a tensor would be sliced along two dims"))
    fresh = set(values)
    for value in space.graph.params.values():
        on = out.shard.get(value.id, NONE)
        if on and value.id in fresh and not all(in_order(d, on, cuts) for d in space.axes.dims[value.id]):
            out.conflicts.append(Conflict(on, None, f"{value.name} does not have the factors of the axis next to each other"))


def _faults(space: GraphIndex, key: int, on: Atoms, cuts: Partitions, found: dict[tuple[int, Atoms], Faults]) -> Faults:
    """The faults of a value, looked up in those `found` in this pass, then in those of all passes."""
    here = space.form[key], on
    faults = found.get(here)
    if faults is None:
        known = (*here, frozenset(cuts[a] for a in on))
        faults = space.faults.get(known)
        if faults is None:
            faults = space.faults[known] = faults_of(space.axes.dims[key], space.leaves[key], on, cuts)
        found[here] = faults
    return faults
