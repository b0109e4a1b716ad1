"""Turns axes into a plan: choose, make ints local, place the reductions, realise. An axis that cannot be realised is un-sharded
with its reason.
"""

from __future__ import annotations

from dataclasses import replace

from autotp.errors import PlanError
from autotp.plan.conversions import Op
from autotp.planner.assemble import Draft, assemble, param_dims
from autotp.planner.bans import Bans
from autotp.planner.boundaries import find_boundaries, find_copies, find_inside
from autotp.planner.choice import Choice, choose
from autotp.planner.joint_reductions import find_joints
from autotp.planner.keys import Keys
from autotp.planner.labelling import label
from autotp.planner.local_ints import Hints, localise
from autotp.planner.naming import Namer, pattern_of
from autotp.planner.ones import find_ones
from autotp.planner.placements import GraphIndex
from autotp.planner.realise import Builder
from autotp.planner.reductions import place
from autotp.planner.refusals import Refusal
from autotp.planner.requested import Wanted
from autotp.planner.together import find_together
from autotp.planner.tokens import find_tokens

#: How many drafts are tried before everything stays whole.
MAX_ATTEMPTS = 128


def solve(
    space: GraphIndex, tp: int, bans: Bans, model: str, linears: frozenset[str], wanted: Wanted | None = None, hints: Hints | None = None
) -> Draft:
    """Finds the best plan that avoids `bans`, with as many `wanted` layouts as possible. Adds impossible choices to `bans`.

    Each attempt that fails bans something more. After `MAX_ATTEMPTS`, and where nothing more was found to ban, everything is banned.
    `hints`: see `autotp.planner.local_ints`.

    Raises:
        PlanError: a fault that stays where nothing is sharded.
    """
    keys = Keys(space)
    for attempt in range(MAX_ATTEMPTS + 1):
        before = bans.size
        choice = choose(space, tp, bans.cuts, bans.whole, wanted, bans.all)
        try:
            local = localise(space, choice.labels, hints)
            moves = place(space, choice.labels, keys)
            namer = Namer({a: pattern_of(space, choice.gathers, a) for a in choice.on}, choice.cuts, param_dims(space))
            joints, notes = find_joints(space, moves)
            builder = Builder(space, choice, moves, local, namer, linears, tp, joints, keys)
            modules = builder.run()
        except Refusal as error:
            reason = str(error)
            if not choice.on:
                raise PlanError(f"{model}: {reason}, and nothing is sharded") from error
            if error.node is None:
                _blame_alone(space, choice, bans, keys, reason)
            else:
                bans.blame(space, choice, error.node, error.reason)
        else:
            plan = assemble(space, choice, modules, namer, tp, model)
            copied = {slot for slot, conversions in builder.slots.items() if any(c.op is Op.COPY for c in conversions)}
            boundaries = find_boundaries(space, choice.labels, moves, joints, copied, space.graph.repeats, builder.gather, builder.merged)
            inside = find_inside(space, choice.labels, moves, boundaries, space.graph.repeats)
            graph = space.graph
            plan = replace(
                plan,
                notes=(*plan.notes, *notes),
                boundaries=boundaries,
                inside=inside,
                swapped=graph.swapped,
                ones=find_ones(space, choice.labels),
            )
            whole = {slot for slot, conversions in builder.slots.items() if any(c.op in (Op.GATHER, Op.REDUCE) for c in conversions)}
            copies = find_copies(space, whole, graph.repeats)
            plan = replace(plan, untrained=graph.untrained if plan.local_share < 1 else "", copies=copies)
            plan = replace(plan, tokens=find_tokens(graph, plan.modules, linears), together=find_together(graph, plan.modules, linears))
            return Draft(plan, space, choice, moves, local)
        if bans.size == before or attempt == MAX_ATTEMPTS - 1:
            bans.all = reason
    raise AssertionError("an axis was taken where none may be")


def _blame_alone(space: GraphIndex, choice: Choice, bans: Bans, keys: Keys, reason: str) -> None:
    """Find the axis whose reductions cannot be placed by trying each without the others."""
    found = False
    every = dict.fromkeys(choice.cuts.values())
    for cut in every:
        gathers = {slot: atoms & cut.atoms for slot, atoms in choice.gathers.items()}
        try:
            place(space, label(space, dict.fromkeys(cut.atoms, cut), gathers, choice.whole), keys)
        except Refusal:
            bans.cuts[cut] = reason
            found = True
    if not found:
        bans.cuts.update(dict.fromkeys(every, reason))
