"""Follows the padding of a cut through the graph: padding must not reach a result, a gradient or a statistic.

Padded parameter entries are zero, and stay zero because their gradients are set to zero. The analysis derives what each operator
makes of them: a known constant, some finite numbers, or anything (an infinity, a NaN, or an operator whose derivative is not finite
there). Where an axis is summed over, the padding adds zero if one factor of the product is zero and the others are finite. The
gradients that come back are then zero times something finite as well. Statistics leave the padding out by themselves, and a
gathered value drops it; for both it need only be finite.

`ANY` relies on one assumption: the model's own entries are finite.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from autotp.axes.analysis import is_pointwise
from autotp.axes.operators.elementwise import pointwise
from autotp.axes.operators.table import OPERATORS, Is, Operator, Padded, arg, entry
from autotp.planner.partition import Partition
from autotp.planner.placements import NONE, GraphIndex, Labels
from autotp.planner.refusals import Conflict
from autotp.trace.graph import Node, Pseudo, Value, values_in


@dataclass(frozen=True, slots=True)
class Known:
    """Every padded entry holds this number."""

    number: float


class _State:
    """Padded entries hold finite numbers (ANY) or there is no telling (WILD)."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __repr__(self) -> str:
        return self.name


ANY, WILD = _State("any"), _State("wild")
Padding = Known | _State
ZERO = Known(0.0)
#: Operators of these kinds are elementwise, whatever torch says of them.
_ELEMENTWISE = (Padded.TOTAL, Padded.MULTIPLIED, Padded.CHOSEN)
_WITHOUT_RULE = Operator(pointwise)


def padding_conflict(space: GraphIndex, labels: Labels, cut: Partition) -> Conflict | None:
    """Says where the padding of `cut` would change a result, None where it cannot."""
    held: dict[int, Padding] = {v.id: ZERO for v in space.graph.params.values() if labels.of(v) & cut.atoms}
    lost: Node | None = None  # where it was first not known to be finite
    for node in space.graph.nodes:
        if node.op is Pseudo.REPEAT:
            continue
        sliced = {v.id for v in space.inputs[node.index] if labels.slices.get((node.index, v.id), NONE) & cut.atoms}
        states: dict[int, Padding] = {}
        for v in space.inputs[node.index]:
            if v.id in sliced:
                states[v.id] = _filled(space, v)
            elif labels.of(v) & cut.atoms:
                states[v.id] = held.get(v.id, ANY)
        reason = _met(space, labels, node, cut, states)
        if reason:
            return Conflict(cut.atoms, node, reason)
        if WILD in states.values() and _ends(labels, node, cut):
            return Conflict(cut.atoms, lost, "the padding would not be finite")
        if any(labels.of(o) & cut.atoms for o in node.outputs):
            state = _result(space, node, states)
            lost = node if state is WILD and WILD not in states.values() and lost is None else lost
            for o in node.outputs:  # beside its result an operator may return where it came from
                held[o.id] = ANY if isinstance(state, Known) and len(node.outputs) > 1 and not o.dtype.is_floating_point else state
    return None


def _filled(space: GraphIndex, value: Value) -> Padding:
    """Constants of one value have it in their padding too; a slice of anything else repeats an entry of its own."""
    number = space.graph.fills.get(value.id)
    return ANY if number is None else Known(float(number)) if isfinite(number) else WILD


def _ends(labels: Labels, node: Node, cut: Partition) -> bool:
    """True where padding leaves the sharded region: summed away, or dropped by a gather; its gradient comes from there."""
    return not any(labels.of(o) & cut.atoms for o in node.outputs)


def _met(space: GraphIndex, labels: Labels, node: Node, cut: Partition, states: dict[int, Padding]) -> str:
    """Says why the node must not sum this padding; empty where it may."""
    summed = [states[c.value] for c, atoms in space.contracts[node.index] if atoms & cut.atoms and c.value in states]
    if not summed or node.index in labels.distributed or ZERO in summed or WILD in summed:
        return ""  # distributed statistics leave padding out
    return "the padding would be summed"


def _result(space: GraphIndex, node: Node, states: dict[int, Padding]) -> Padding:
    have = list(states.values())
    if WILD in have:
        return WILD
    if not have:
        return _made(space, node)
    operator = _operator(node)
    first = states.get(node.args[0].id) if isinstance(node.args[0], Value) else None
    bias = arg(node, operator.at, "bias") if operator.at is not None else None
    clean = not isinstance(bias, Value) or states.get(bias.id) == ZERO
    if operator.padded is Padded.PRODUCT:
        factors = [s for key, s in states.items() if not (isinstance(bias, Value) and key == bias.id)]
        return ZERO if ZERO in factors and clean else ANY
    if operator.padded is Padded.SOLVED and node.kwargs.get("unitriangular"):  # else it divides by the diagonal
        return ZERO if states.get(node.args[1].id) == ZERO else ANY
    if operator.padded is Padded.ATTENDED:
        return ZERO if states.get(node.args[2].id) == ZERO else ANY
    if operator.padded is Padded.NORMED:
        return WILD if node.args[1].id in states else first or ANY
    if operator.padded is Padded.AS_FIRST:
        return ZERO if first == ZERO and clean else ANY
    if operator.padded is Padded.MOVED:
        return _joined(node, operator, states)
    if operator.padded is Padded.ZERO:
        return ZERO if all(s == ZERO for s in have) else ANY
    if operator.padded is Padded.FINITE:
        return ANY
    if is_pointwise(node.op) or operator.padded in _ELEMENTWISE:
        return _elementwise(space, node, operator, states)
    return WILD


def _operator(node: Node) -> Operator:
    """The entry of a node's operator; one that writes into its argument (`exp_`) is like the one that does not."""
    if (found := entry(node)) is not None and found.padded is not Padded.UNKNOWN:
        return found
    return OPERATORS.get(node.opname.rstrip("_")) or found or _WITHOUT_RULE


def _made(space: GraphIndex, node: Node) -> Padding:
    """A value made sharded from whole ones (an expansion, a filled constant) repeats their entries."""
    number = space.graph.fills.get(node.outputs[0].id)
    return ANY if number is None else Known(float(number)) if isfinite(number) else WILD


def _joined(node: Node, operator: Operator, states: dict[int, Padding]) -> Padding:
    """Constants that elements are filled up with or that are scattered among them keep a known number only if it is the same."""
    have = set(states.values())
    if len(have) > 1:
        return ANY
    (state,) = have
    if operator.traits & Is.FILLS and (state != ZERO or _fills_with(node, operator) != 0):
        return ANY
    whole = [v for v in values_in(node.args) if v.id not in states and v.dtype.is_floating_point]
    return ANY if operator.traits & Is.MIXES and whole else state


def _fills_with(node: Node, operator: Operator) -> float:
    """The number that a node puts beside elements."""
    given = arg(node, operator.at, "value") if operator.at is not None else None
    return float(given) if isinstance(given, (int, float)) else 0.0


def _elementwise(space: GraphIndex, node: Node, operator: Operator, states: dict[int, Padding]) -> Padding:
    known: dict[int, float] = {key: s.number for key, s in states.items() if isinstance(s, Known)}
    known |= {v.id: space.graph.fills[v.id] for v in space.inputs[node.index] if v.id not in states and v.id in space.graph.fills}
    tensors = space.inputs[node.index]
    if all(v.id in known for v in tensors):
        return _computed(node, known)
    if operator.padded is Padded.MULTIPLIED:
        return ZERO if ZERO in states.values() else ANY
    if operator.padded is Padded.CHOSEN:
        branches = {_branch(a, states, known) for i, a in enumerate(node.args) if i != operator.at}
        return branches.pop() if len(branches) == 1 else ANY
    if operator.padded is Padded.DIVIDED:
        below = node.args[1]
        if isinstance(below, Value) and below.id in states and not known.get(below.id):
            return WILD
        above = node.args[0]
        return ZERO if isinstance(above, Value) and states.get(above.id) == ZERO else ANY
    if operator.padded is Padded.POWER:
        return ANY if isinstance(node.args[1], int) and node.args[1] >= 1 else WILD
    return ANY if operator.padded is Padded.TOTAL else WILD


def _branch(item: Any, states: dict[int, Padding], known: dict[int, float]) -> Padding:
    if not isinstance(item, Value):
        return Known(float(item)) if isinstance(item, (int, float)) else ANY
    return Known(known[item.id]) if item.id in known else states.get(item.id, ANY)


def _computed(node: Node, known: dict[int, float]) -> Padding:
    """Runs the operator itself on the numbers; WILD where the result or its derivative is not finite."""
    leaves: list[Tensor] = []

    def tensor(value: Value) -> Tensor:
        if not value.dtype.is_floating_point:
            return torch.tensor(known[value.id]).to(value.dtype)
        leaf = torch.tensor(known[value.id], dtype=torch.float64, requires_grad=True)
        leaves.append(leaf)
        return leaf.clone()

    try:
        with torch.enable_grad():
            out = node.op(*_map(node.args, tensor), **{k: _map(v, tensor) for k, v in node.kwargs.items() if k != "dtype"})  # type: ignore[operator]
            if isinstance(out, Tensor) and out.requires_grad:
                slopes = torch.autograd.grad(out, leaves, allow_unused=True)
                if not all(s is None or bool(torch.isfinite(s)) for s in slopes):
                    return WILD
    except (RuntimeError, TypeError, ValueError):
        return WILD
    if not isinstance(out, Tensor) or out.is_complex():
        return ANY if isinstance(out, Tensor) else WILD
    number = float(out.detach())
    return Known(number) if isfinite(number) else WILD


def _map(tree: Any, tensor: Callable[[Value], Tensor]) -> Any:
    if isinstance(tree, Value):
        return tensor(tree)
    if isinstance(tree, (list, tuple)):
        return [_map(item, tensor) for item in tree]
    return tree
