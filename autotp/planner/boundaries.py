"""Finds the values at module boundaries that code outside of the module does not get whole, and the code that computes on such values.

Between regions every value is whole on every rank, and so is its gradient. Inside of one, a value at a module's boundary may be a
rank's part, a summand, or whole with a gradient that is a summand. A hook of a user or another module put there would compute other
numbers. Conversions at a boundary happen inside of the module. So outside of it an argument is the value before them, and a result
the one after.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping

from autotp.axes.operators.elementwise import pointwise
from autotp.axes.operators.table import Is, entry, is_a
from autotp.plan.conversions import Conversion, Op
from autotp.plan.items import Path
from autotp.plan.spec import Boundary, Forms, Shown
from autotp.planner.items import sizes_of
from autotp.planner.joint_reductions import Joint
from autotp.planner.keys import AtSlot, slot_key
from autotp.planner.placements import GraphIndex, Labels, SlotKey
from autotp.planner.reductions import Moves, Side
from autotp.planner.repeats import with_copies
from autotp.trace.forms import of_any_dims
from autotp.trace.graph import Node, Pseudo, Value

_CROSSINGS = (Pseudo.ENTER, Pseudo.EXIT)
_ORDER = (Shown.HELD, Shown.SUM, Shown.PART, Shown.GRADIENT)  # the most informative first


def find_boundaries(
    space: GraphIndex,
    labels: Labels,
    moves: Moves,
    joints: Iterable[Joint],
    copied: Collection[SlotKey],
    repeats: Mapping[str, str],
    gather: Callable[[Value], Conversion | None],
    merged: Mapping[SlotKey, Path],
) -> dict[str, tuple[Boundary, ...]]:
    """Returns path of a module → its boundary values that are not whole; modules with none are left out.

    `copied`: the slots with a COPY. `repeats`: block → the block that was traced in its place. `gather`: what makes a part whole.
    `merged`: slot → the path that stands for it and its like.
    """
    held, later = _held(space, joints), _taken_over(space, moves, copied)
    found: dict[str, dict[tuple[bool, tuple[str | int, ...]], Shown]] = {}
    wholes: dict[tuple[str, Path], dict[Hashable, Conversion | None]] = {}
    for node in space.graph.nodes:
        key = slot_key(node)
        if key is None or not key[1]:
            continue
        shown = _shown(space, labels, moves, node, key, held, copied, later)
        if shown is None:
            continue
        _, path, where = key
        result = node.op is Pseudo.EXIT
        if result and shown in (Shown.PART, Shown.SUM):
            whole = Conversion(Op.REDUCE) if shown is Shown.SUM else gather(node.outputs[0])
            alike = whole and (whole.op, whole.dim, sizes_of(whole.expr))
            wholes.setdefault((path, merged.get(key, where)), {}).setdefault(alike, whole)
        members = (where,) if result else space.graph.members.get((path, where), (where,))
        for each in dict.fromkeys(merged.get((key[0], path, member), member) for member in members):
            before = found.setdefault(path, {}).setdefault((result, each), shown)
            found[path][result, each] = min(before, shown, key=_ORDER.index)
    made = {key: next(iter(conversions.values())) for key, conversions in wholes.items() if len(conversions) == 1}
    every = {
        path: tuple(Boundary(*place, shown, made.get((path, place[1])) if place[0] else None) for place, shown in slots.items())
        for path, slots in found.items()
    }
    return dict(with_copies(every.items(), repeats))


def find_copies(
    space: GraphIndex, converted: Collection[SlotKey], repeats: Mapping[str, str]
) -> dict[str, tuple[tuple[str | int, ...], ...]]:
    """Returns path of a module → its results that are gathered or summed for its caller while code inside goes on with the part.

    The gradient of such a result lacks that of the uses inside. `converted`: the slots where something is gathered or summed.
    """
    found: dict[str, dict[tuple[str | int, ...], None]] = {}
    copies: set[int] = set()
    for node in space.graph.nodes:
        key, value = slot_key(node), node.args[0] if node.args else None
        if key is None or not isinstance(value, Value):
            continue
        leaves = node.op is Pseudo.EXIT
        if value.id not in copies and not (leaves and key in converted and _goes_on(space, node)):
            continue
        copies.update(o.id for o in node.outputs)
        if leaves:
            found.setdefault(key[1], {})[key[2]] = None
    return dict(with_copies([(path, tuple(places)) for path, places in found.items()], repeats))


def _goes_on(space: GraphIndex, leaving: Node) -> bool:
    """True where the tensor that a result is made of has another use through which gradients come, in any module."""
    value = leaving.args[0]
    if value.id not in space.flows:
        return False
    while (made := space.made.get(value.id)) is not None and made.op in _CROSSINGS and isinstance(made.args[0], Value):
        value = made.args[0]
    todo = [value]
    while todo:
        for index in space.users.get(todo.pop().id, ()):
            user = space.graph.nodes[index]
            if user.op in _CROSSINGS and user is not leaving:
                todo += user.outputs
            elif user is not leaving and any(o.id in space.flows for o in user.outputs):
                return True
    return False


def find_inside(
    space: GraphIndex, labels: Labels, moves: Moves, boundaries: Collection[str], repeats: Mapping[str, str]
) -> dict[str, Forms]:
    """Returns the paths of the modules whose own code holds parts or summands, and how they were called.

    Such code runs operators on them, or calls a module with such a boundary. The trace does not tell what it would do for another
    argument.
    """
    graph = space.graph
    runs: dict[str, bool] = {}  # path → does all that it does work on any number of dims?
    for node in graph.nodes:
        if not isinstance(node.op, Pseudo) and any(labels.of(v) or v.id in moves.partial for v in (*node.inputs(), *node.outputs)):
            runs[node.module] = runs.get(node.module, True) and _takes_any_dims(node)
    calls = {graph.calls[caller][0] for path, caller in graph.calls.values() if path in boundaries and caller in graph.calls}
    found = {path: graph.forms.get(path, frozenset()) for path in (*runs, *calls)}
    for path in found:
        if runs.get(path, True) and path not in graph.asks_dims:
            found[path] = of_any_dims(found[path])
    return dict(with_copies(found.items(), repeats))


def _takes_any_dims(node: Node) -> bool:
    """True for operators that do the same for any number of dims."""
    found = entry(node)
    return is_a(node, Is.ON_LAST_DIM) or (found is not None and found.rule is pointwise)


def _shown(
    space: GraphIndex, labels: Labels, moves: Moves, node: Node, key: SlotKey, held: set[int], copied: Collection[SlotKey], later: set[int]
) -> Shown | None:
    enters = node.op is Pseudo.ENTER
    value = node.args[0] if enters else node.outputs[0]
    if not isinstance(value, Value):
        return None
    if node.index in held:
        return Shown.HELD
    if labels.of(value):
        return Shown.PART
    if value.id in moves.partial:
        return Shown.SUM
    whole = value.id in later or (enters and key in copied)
    hanging = (Side.ABOVE if enters else Side.BELOW, key) in moves.hanging
    return Shown.GRADIENT if hanging and not whole and value.id in space.flows else None


def _taken_over(space: GraphIndex, moves: Moves, copied: Collection[SlotKey]) -> set[int]:
    """Returns results whose gradients are reduced by the linears that take them, not at the result: the gradients are whole there."""
    found: set[int] = set()
    for node in space.graph.nodes:
        key = slot_key(node)
        if key is not None and node.op is Pseudo.EXIT and AtSlot(key) in moves.copies and key not in copied:
            found.add(node.outputs[0].id)
        elif key is not None and isinstance(node.args[0], Value) and node.args[0].id in found and key not in copied:
            found.update(o.id for o in node.outputs)
    return found


def _held(space: GraphIndex, joints: Iterable[Joint]) -> set[int]:
    """Returns crossings of summands that are reduced together, from the modules that hold and join them to the sum where all of
    them meet.
    """
    found: set[int] = set()
    for joint in joints:
        trails = [(n, _trail(space, n)) for n in space.graph.nodes if slot_key(n) in joint.slots]
        for node, trail in trails:
            others = {value for other, values in trails if slot_key(other) != slot_key(node) for value, _ in values}
            for value, at in trail:
                if value in others:
                    break
                if isinstance(space.graph.nodes[at].op, Pseudo):
                    found.add(at)
    return found


def _trail(space: GraphIndex, node: Node) -> list[tuple[int, int]]:
    """Returns (value, node that gave it) of a result and of the values made of it, as long as each has one use."""
    trail = [(node.outputs[0].id, node.index)]
    while len(users := space.users.get(trail[-1][0], [])) == 1 and len(outputs := space.graph.nodes[users[0]].outputs) == 1:
        trail.append((outputs[0].id, users[0]))
    return trail
