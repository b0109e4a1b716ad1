"""Lists the collectives of a plan, with the elements that each moves."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from math import prod

from autotp.axes.operators.table import Is, is_a
from autotp.plan.conversions import CollectiveKind, Conversion, When
from autotp.plan.cost import summed
from autotp.plan.items import Path, is_at
from autotp.plan.spec import EVERY, ModulePlan, ParamPlan, Traffic
from autotp.planner.placements import SlotKey
from autotp.planner.repeats import block_of, traced
from autotp.rewrite.operators.distributed import FORMS
from autotp.trace.graph import Graph, Node, Origin, Pseudo, Value, outside


def traffic(graph: Graph, modules: Sequence[ModulePlan], params: Mapping[str, ParamPlan]) -> tuple[Traffic, ...]:
    """Lists the collectives of the first path's forward and of its backward.

    Gradients that enter regions from one tensor are reduced once.
    """
    return tuple(chain(_Counted(graph, modules).run(), _gradients(graph, modules, params)))


def _gradients(graph: Graph, modules: Sequence[ModulePlan], params: Mapping[str, ParamPlan]) -> Iterator[Traffic]:
    """Gradients of parameters that are summed over the ranks."""
    for m in modules:
        for use in m.uses:
            name = f"{use.owner}.{use.name}" if use.owner else use.name
            if elements := summed(use.grad, params.get(traced(name, graph.repeats))):
                yield Traffic(m.path, CollectiveKind.ALL_REDUCE, When.BACKWARD, 0, elements)


class _Counted:
    """Counts the collectives of activations: those of the conversions and distributed forms that the plan runs in the first path."""

    def __init__(self, graph: Graph, modules: Sequence[ModulePlan]) -> None:
        self.graph, self.modules, self.sources = graph, modules, Sources(graph, modules)
        self.nodes = graph.nodes[: graph.results[0].stop if graph.results else len(graph.nodes)]
        self.again = {(at, p) for (at, where), members in graph.members.items() for p in members if p != where}
        self.channels = _channels(graph)
        self.width: dict[SlotKey, int] = {}
        self.crossed: dict[tuple[Pseudo, str], dict[Path, None]] = {}
        self.calls: dict[int, list[Node]] = {}
        for node in self.nodes:
            self.calls.setdefault(node.call, []).append(node)
            if node.op in (Pseudo.ENTER, Pseudo.EXIT) and node.slot is not None:
                key = _crossing(node)
                self.width.setdefault(key, self._per_token(node))
                self.crossed.setdefault(key[:2], {})[key[2]] = None

    def _per_token(self, crossing: Node) -> int:
        """Elements a token that cross a boundary; the tokens of an image are its positions."""
        inside = crossing.outputs[0] if crossing.op is Pseudo.ENTER else crossing.args[0]
        return self.channels.get(inside.id) or _per_token(crossing.outputs[0])

    def run(self) -> Iterator[Traffic]:
        """By module, in the order of the plan."""
        inside: dict[str, list[_Found]] = {}
        for found in self._at_sites():
            inside.setdefault(found.traffic.module, []).append(found)
        shared: set[tuple[str, int]] = set()
        for m in self.modules:
            path, instance = traced(m.path, self.graph.repeats), block_of(m.path, self.graph.repeats) or ""
            for found in chain(self._at_boundaries(m, path), inside.get(path, ())):
                if found.source is not None:
                    if (instance, found.source) in shared:
                        continue
                    shared.add((instance, found.source))
                yield replace(found.traffic, module=m.path)

    def _at_boundaries(self, m: ModulePlan, path: str) -> Iterator[_Found]:
        for kind, slots in ((Pseudo.ENTER, m.inputs), (Pseudo.EXIT, m.outputs)):
            for slot in slots:
                if kind is Pseudo.ENTER and (path, slot.path) in self.again:
                    continue  # the same tensor as another argument
                argument = ".".join(map(str, slot.path)) if kind is Pseudo.ENTER else ""
                for crossed in self.crossed.get((kind, path), ()):  # only other calls ask for the others (attention weights)
                    if is_at(crossed, slot.path):
                        key = (kind, path, crossed)
                        yield from _run(path, slot.conversions, self.width[key], self.sources.entering.get(key), argument)

    def _at_sites(self) -> Iterator[_Found]:
        sites = {(m.path, s.file, s.function, s.line, s.offset): s for m in self.modules for s in m.sites}
        seen: set[int] = set()
        for node in self.nodes:
            p = node.place
            site = None if p is None or outside(node) else sites.get((node.module, p.file, p.function, p.line, p.offset))
            if site is None or node.call in seen:
                continue
            seen.add(node.call)
            call = self.calls[node.call]
            made = {o.id: o for n in call for o in n.outputs}
            given = {v.id: v for n in call for v in n.inputs()}
            python, arguments = self.graph.python.get(node.call), node.tensors
            results = python.results if python is not None else ()
            for value, conversions in _met(site.outputs, results, made):
                yield from _run(node.module, conversions, _per_token(value), None)
            for value, conversions in _met(site.inputs, arguments, given):
                yield from _run(node.module, conversions, _per_token(value), self.sources.of(value))
            if site.kernel is not None:
                form = FORMS[site.kernel]
                for when in (When.FORWARD,) * form.forward + (When.BACKWARD,) * form.backward:
                    yield _Found(Traffic(node.module, CollectiveKind.ALL_REDUCE, when, 1))


@dataclass(frozen=True, slots=True)
class _Found:
    """A collective; `source`: the tensor whose gradient it sums, once for all who ask for it."""

    traffic: Traffic
    source: int | None = None


def _met(
    wanted: Sequence[tuple[int, tuple[Conversion, ...]]], keys: Sequence[int], values: Mapping[int, Value]
) -> Iterator[tuple[Value, tuple[Conversion, ...]]]:
    """The values at the positions that a site converts; a value at several positions once."""
    every = {i: conversions for at, conversions in wanted for i in (range(len(keys)) if at == EVERY else (at,))}
    found = {keys[i]: conversions for i, conversions in every.items() if i < len(keys) and keys[i] in values}
    return ((values[key], conversions) for key, conversions in found.items())


def _run(module: str, conversions: Iterable[Conversion], width: int, source: int | None, argument: str = "") -> Iterator[_Found]:
    for c in conversions:
        for kind, when in c.row.collectives:
            yield _Found(Traffic(module, kind, when, width, argument=argument), source if when is When.BACKWARD else None)


def _crossing(node: Node) -> SlotKey:
    assert node.slot is not None and isinstance(node.op, Pseudo)
    return node.op, *node.slot


class Sources:
    """Tells which tensor a value is at run time: module boundaries without a conversion hand the same object on.

    Copies of one tensor are one copy (`autotp.rewrite.collectives.copy_cache`), but for arguments of the model, which are leaves.
    """

    def __init__(self, graph: Graph, modules: Sequence[ModulePlan]) -> None:
        self._made = {o.id: n for n in graph.nodes for o in n.outputs}
        self._converted: dict[tuple[Pseudo, str], list[Path]] = {}
        for m in modules:
            self._converted[Pseudo.ENTER, m.path] = [s.path for s in m.inputs]
            self._converted[Pseudo.EXIT, m.path] = [s.path for s in m.outputs]
        self.entering: dict[SlotKey, int | None] = {}
        for node in graph.nodes:
            if node.op is Pseudo.ENTER and node.slot is not None and isinstance(node.args[0], Value):
                self.entering.setdefault(_crossing(node), self.of(node.args[0]))

    def of(self, value: Value) -> int | None:
        """Returns the id of the first value made among those that are one tensor; None for a tensor that is not shared."""
        while (node := self._made.get(value.id)) is not None and node.op in (Pseudo.ENTER, Pseudo.EXIT) and node.slot is not None:
            key = _crossing(node)
            if any(is_at(key[2], path) for path in self._converted.get(key[:2], ())) or not isinstance(node.args[0], Value):
                break
            value = node.args[0]
        return None if value.origin is Origin.INPUT else value.id


def _channels(graph: Graph) -> dict[int, int]:
    """Value id → channels of what convolutions take and give: these stand before the positions."""
    found: dict[int, int] = {}
    for node in graph.nodes:
        if is_a(node, Is.CONVOLUTION):
            dim = 1 - len(node.args[1].shape)
            found |= {v.id: v.shape[dim] for v in (node.args[0], *node.outputs) if len(v.shape) >= -dim}
    return found


def _per_token(value: Value) -> int:
    return prod(value.shape[2:]) if len(value.shape) > 2 else (value.shape[-1] if value.shape else 1)
