"""Finds where hidden states may stay in token parts between regions: what sequence parallelism can scatter and gather.

No number rests on this: at run time, an operator that does not treat tokens one by one gets all of them (`autotp.rewrite.sequence`). It
says where that is worthwhile. One thing is proven here: a module is *by token* if each operator of its forward treats tokens one by one,
so that it may run on a part of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from autotp.plan.conversions import Op
from autotp.plan.spec import ModulePlan, SlotKey, Tokens, Traffic
from autotp.planner.between import traffic_between
from autotp.planner.repeats import Rename, with_copies
from autotp.trace.graph import Graph, Node, Origin, Pseudo, Value
from autotp.trace.ints import SizeRef, leaves

_RESULTS = frozenset((Op.REDUCE, Op.JOIN))
_CASTS = frozenset(("to", "_to_copy", "clone", "contiguous", "detach", "alias", "type_as"))
_LAST_DIM = frozenset(("mean", "sum", "var", "std", "amax", "amin", "linalg_vector_norm", "softmax", "log_softmax", "_softmax"))
_NORMS = frozenset(("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm"))
_VIEWS = frozenset(("view", "reshape", "_unsafe_view", "flatten"))


def find_tokens(graph: Graph, modules: Sequence[ModulePlan], linears: frozenset[str]) -> Tokens:
    """Returns what is known of tokens in the model whose traced modules have these plans. `linears`: paths of Linear modules."""
    found = _Flow(graph, modules)
    repeats = graph.repeats
    treated = frozenset(m for m in _by_token(graph) if m in found.met)
    by_token = _named(treated, repeats)
    again = _named((slot[0] for slot, node in found.entered.items() if slot[0] in linears or found.is_read_by(linears, node)), repeats)
    between = with_copies(((t.module, t) for t in found.between(treated)), repeats, _renamed)
    return Tokens(by_token, _lifted(found.left, repeats), _lifted(found.entered, repeats), again, tuple(t for _, t in between))


def _renamed(traffic: Traffic, rename: Rename) -> Traffic:
    return replace(traffic, module=rename(traffic.module))


def _named(paths: Iterable[str], repeats: Mapping[str, str]) -> frozenset[str]:
    return frozenset(name for name, _ in with_copies(((path, None) for path in paths), repeats))


def _lifted(slots: Iterable[SlotKey], repeats: Mapping[str, str]) -> frozenset[SlotKey]:
    def moved(slot: SlotKey, rename: Rename) -> SlotKey:
        return rename(slot[0]), slot[1]

    return frozenset(slot for _, slot in with_copies(((s[0], s) for s in slots), repeats, moved))


def treats_each(node: Node, tokens: frozenset[int] | set[int]) -> bool:
    """True where an operator on values that are cut along tokens gives such a value: element by element, or along the last dim."""
    if isinstance(node.op, Pseudo) or len(node.outputs) != 1:
        return False
    out, given = node.outputs[0], [v for v in node.inputs() if v.id in tokens]
    if not given or len(out.shape) < 2:
        return False
    if any(isinstance(leaf, SizeRef) and leaf.value_id in tokens for e in node.ints for leaf in leaves(e)) and node.opname not in _VIEWS:
        return False
    x = given[0]
    rows = x.shape[:-1]
    if node.opname == "linear":
        return x is node.args[0] and len(given) == 1
    if node.opname in _NORMS:
        return x is node.args[0] and len(node.args[1]) == 1
    if node.opname == "dropout":
        return True
    if node.opname in _VIEWS:
        return out.shape[-1:] == x.shape[-1:]
    if node.opname in _LAST_DIM:
        dims = _dims(node)
        return dims is not None and all(d in (-1, len(x.shape) - 1) for d in dims) and out.shape[:-1] == rows
    if node.opname in _CASTS or (isinstance(node.op, torch._ops.OpOverload) and torch.Tag.pointwise in node.op.tags):
        return out.shape[:-1] == rows and all(v.shape[:-1] == rows for v in given)
    return False


def _dims(node: Node) -> Sequence[int] | None:
    dims = node.kwargs.get("dim", node.args[2 if node.opname == "linalg_vector_norm" else 1] if len(node.args) > 1 else None)
    if isinstance(dims, int):
        return (dims,)
    return dims if isinstance(dims, (tuple, list)) and dims and all(isinstance(d, int) for d in dims) else None


class _Flow:
    """Follows the results of regions: `left` are those whose readers treat tokens one by one, `entered` the arguments that get such."""

    def __init__(self, graph: Graph, modules: Sequence[ModulePlan]) -> None:
        self.graph = graph
        slots = {(True, m.path, s.path): s.conversions for m in modules for s in m.outputs}
        slots |= {(False, m.path, s.path): s.conversions for m in modules for s in m.inputs}
        self.slots = slots
        self.readers: dict[int, list[Node]] = {}
        for node in graph.nodes:
            for v in node.inputs():
                self.readers.setdefault(v.id, []).append(node)
        self.tokens: set[int] = set()
        self.left: set[SlotKey] = set()
        self.entered: dict[SlotKey, Node] = {}
        self.met: set[str] = set()
        for _ in range(2):  # what the first of alike blocks gets is known once those that stand behind it were seen
            for node in graph.nodes:
                self._follow(node)

    def between(self, by_token: frozenset[str]) -> Iterator[Traffic]:
        """What operators outside of regions send."""
        held = {
            node.outputs[0].id
            for node in self.graph.nodes
            if node.op is Pseudo.EXIT and any(c.op is Op.HOLD for c in self.slots.get((True, *(node.slot or ())), ()))
        }
        return traffic_between(self.graph, frozenset(self.tokens), frozenset(held), by_token)

    def _follow(self, node: Node) -> None:
        if node.op in (Pseudo.ENTER, Pseudo.EXIT) and node.slot is not None:
            self._cross(node, node.op is Pseudo.EXIT, node.slot)
        elif node.op is Pseudo.REPEAT:
            self.tokens.update(b.id for a, b in zip(*node.args, strict=True) if _id(a) in self.tokens and isinstance(b, Value))
        elif treats_each(node, self.tokens):
            self.tokens.update(v.id for v in node.outputs)

    def _cross(self, node: Node, out: bool, slot: tuple[str, tuple[str | int, ...]]) -> None:
        conversions = self.slots.get((out, *slot), ())
        leaves = out and any(c.op in _RESULTS for c in conversions) and len(node.outputs[0].shape) >= 2
        if leaves and self._is_read_by_token(node.outputs[0]):
            self.left.add(slot)
            self.tokens.add(node.outputs[0].id)
        elif node.args and isinstance(node.args[0], Value) and node.args[0].id in self.tokens:
            if not conversions:
                self.tokens.add(node.outputs[0].id)
                self.met.add(slot[0])
            elif conversions[0].op is Op.COPY:
                self.entered[slot] = node

    def is_read_by(self, modules: frozenset[str], node: Node) -> bool:
        """True where what crosses a boundary goes on into one of `modules`."""
        crossings = (r for r in self.readers.get(node.outputs[0].id, ()) if r.op in (Pseudo.ENTER, Pseudo.EXIT) and r.slot is not None)
        return any((r.op is Pseudo.ENTER and r.slot[0] in modules) or self.is_read_by(modules, r) for r in crossings if r.slot)

    def _is_read_by_token(self, value: Value) -> bool:
        for node in self.readers.get(value.id, ()):
            if node.op in (Pseudo.ENTER, Pseudo.EXIT) and node.slot is not None:
                if (node.op is Pseudo.EXIT, *node.slot) not in self.slots and self._is_read_by_token(node.outputs[0]):
                    return True
            elif treats_each(node, {value.id}):
                return True
        return False


def _id(value: Any) -> int:
    return value.id if isinstance(value, Value) else -1


def _by_token(graph: Graph) -> Iterator[str]:
    """Yields the modules with parameters whose whole forward treats tokens one by one, in every traced call."""
    inside: dict[str, list[Node]] = {}
    entering: dict[str, list[Node]] = {}
    for node in graph.nodes:
        if node.op is Pseudo.ENTER and node.slot is not None:
            entering.setdefault(node.slot[0], []).append(node)
        elif node.op is Pseudo.EXIT and node.slot is not None:
            inside.setdefault(node.slot[0], []).append(node)
        inside.setdefault(node.module, []).append(node)
    own = {name.rpartition(".")[0] for name in graph.params}
    kept = {v.id for values in graph.left.values() for v in values}
    kept |= {v.id for result in graph.results for _, v in result.leaves if isinstance(v, Value)}
    readers: dict[int, set[str]] = {}
    for path, nodes in inside.items():
        for node in nodes:
            if node.op is not Pseudo.EXIT or node.slot is None or node.slot[0] == path:
                for v in node.inputs():
                    readers.setdefault(v.id, set()).add(path)
    for path in sorted(own & entering.keys()):
        if _is_by_token(path, graph, inside.get(path, []), entering[path], readers, kept):
            yield path


def _is_by_token(
    path: str, graph: Graph, nodes: Sequence[Node], entering: Sequence[Node], readers: Mapping[int, set[str]], kept: set[int]
) -> bool:
    """`readers`: the modules that read a value; `kept`: values that stay after a call, in an attribute or a result."""
    if len({n.slot for n in entering}) != 1:
        return False
    tokens = {n.outputs[0].id for n in entering}
    exits = 0
    for node in nodes:
        if node.op is Pseudo.EXIT and node.slot is not None and node.slot[0] == path:
            if node.slot[1] or not isinstance(node.args[0], Value) or node.args[0].id not in tokens:
                return False
            exits += 1
        elif (
            isinstance(node.op, Pseudo)
            or node.op._schema.is_mutable
            or graph.sealed(node)
            or not treats_each(node, tokens)
            or not all(v.id in tokens or _is_beside(v, node) for v in node.inputs())
            or _draws(node)
        ):
            return False
        else:
            tokens.add(node.outputs[0].id)
    made = tokens - {n.outputs[0].id for n in entering}
    # what it makes leaves it as its result alone: anybody else would see a rank's rows
    escapes = not made.isdisjoint(kept) or any(readers.get(v, set()) - {path} for v in made)
    return exits == len(entering) and graph.sized.isdisjoint(tokens) and not escapes


def _is_beside(value: Value, node: Node) -> bool:
    """True for a weight that is the same for every token."""
    return value.origin is Origin.PARAM and (len(value.shape) <= 1 or node.opname == "linear")


def _draws(node: Node) -> bool:
    op: Any = node.op
    return node.opname == "dropout" or node.opname in _VIEWS or torch.Tag.nondeterministic_seeded in op.tags
