"""Picks the calls of a trace that are replayed, where each call is also run with numbers.

Most of what two calls do is the same: the same operators at the same places, with arguments of the same forms and placements. One
replay shows what code does with those. So a call is left out where every *step* of it is a step of another call too. A step is an
operator at its place in the code, what its arguments are and which operators made them, or a leaf of the call's result.

That holds for calls alone that the check of numbers makes as the trace did. So these are always replayed: a call whose code takes
another path with or without gradients or the other answer to a condition, one along drawn numbers, one in a setting of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from autotp.planner.assemble import Draft
from autotp.planner.placements import NONE
from autotp.trace.example import Example
from autotp.trace.graph import Node, Origin, Result, Value

#: Leaves of results that are compared by value.
PLAIN = (int, float, str, bool)


@dataclass(frozen=True, slots=True)
class Replayed:
    """The calls that are replayed, with their nodes and results in the trace. `all`: no call is left out."""

    examples: tuple[Example, ...]
    nodes: Sequence[Node]
    results: Sequence[Result]
    all: bool = True


@dataclass(frozen=True, slots=True)
class _Span:
    """What the trace holds of one example: its call, with the second one that it decodes to."""

    example: Example
    nodes: Sequence[Node]
    results: Sequence[Result]

    @property
    def alone(self) -> bool:
        """True where the check of numbers does not make the call as it was traced."""
        named = {self.example.name, self.example.name + "+decode"}
        return self.example.setting is not None or any(r.drawn or r.name not in named for r in self.results)


def every(draft: Draft, examples: tuple[Example, ...]) -> Replayed:
    """Returns all calls that were traced."""
    graph = draft.space.graph
    return Replayed(examples, graph.nodes, graph.results)


def fewest(draft: Draft, examples: tuple[Example, ...]) -> Replayed:
    """Returns calls among `examples`, those that were traced, whose steps are the steps of all."""
    spans = _spans(draft, examples)
    if spans is None:
        return every(draft, examples)
    step = _steps(draft)
    steps = [set(step(span)) for span in spans]
    counts = Counter(each for found in steps for each in found)
    kept = [True] * len(spans)
    for at in sorted(range(len(spans)), key=lambda i: -len(spans[i].nodes)):
        if not spans[at].alone and all(counts[each] > 1 for each in steps[at]):
            kept[at] = False
            counts.subtract(steps[at])
    chosen = [span for span, keep in zip(spans, kept, strict=True) if keep]
    made = {o.id for span, keep in zip(spans, kept, strict=True) if not keep for n in span.nodes for o in n.outputs}
    nodes = [n for span in chosen for n in span.nodes]
    if not made or any(v.id in made for n in nodes for v in n.inputs()):  # a call that is left out left something for another one
        return every(draft, examples)
    return Replayed(tuple(s.example for s in chosen), nodes, [r for s in chosen for r in s.results], all=False)


def _spans(draft: Draft, examples: tuple[Example, ...]) -> list[_Span] | None:
    """Returns the span of each example, in order; None where it is not clear whose a result is."""
    graph = draft.space.graph
    names = [r.name for r in graph.results]
    firsts = [names.index(e.name) for e in examples if names.count(e.name) == 1]
    if len(firsts) < len(examples) or firsts[:1] != [0] or firsts != sorted(firsts):
        return None
    spans: list[_Span] = []
    start = 0
    for example, first, following in zip(examples, firsts, [*firsts[1:], len(names)], strict=True):
        results = graph.results[first:following]
        spans.append(_Span(example, graph.nodes[start : results[-1].stop], results))
        start = results[-1].stop
    return spans if start == len(graph.nodes) else None


def _steps(draft: Draft) -> Callable[[_Span], Iterator[Hashable]]:
    """Returns the function that gives the steps of a span."""
    space, labels = draft.space, draft.choice.labels
    graph = space.graph
    numbers: dict[Hashable, int] = {}
    known: dict[int, int] = {}

    def facts(v: Value, made: Node | None) -> Hashable:
        on = labels.shard.get(v.id, NONE)
        constant = graph.constants.get(v.id)
        return (
            *(v.shape, v.dtype, v.origin, v.name, on and tuple([dim & on for dim in space.leaves[v.id]]), v.id in labels.partial),
            *(graph.fills.get(v.id), None if constant is None else str(constant.tolist())),
            None if made is None else (made.op, made.module, made.place, made.outputs.index(v)),
        )

    def value(v: Value) -> int:
        """A number, equal for values that are alike and made alike."""
        if v.id not in known:
            known[v.id] = numbers.setdefault(facts(v, space.made.get(v.id) if v.origin is Origin.NODE else None), len(numbers))
        return known[v.id]

    def form(tree: Any) -> Hashable:
        if isinstance(tree, Value):
            return Value, value(tree)
        if isinstance(tree, (tuple, list)):
            return type(tree), tuple([form(x) for x in tree])
        if isinstance(tree, dict):
            return dict, tuple([(k, form(x)) for k, x in tree.items()])
        return type(tree), tree if isinstance(tree, Hashable) else object()

    def steps(span: _Span) -> Iterator[Hashable]:
        training = span.example.training
        for n in span.nodes:
            yield training, n.op, n.module, n.place, n.slot, n.scope >= 0, n.apart, form(n.args), form(n.kwargs), form(n.outputs)
        for result in span.results:
            for path, leaf in result.leaves:
                yield training, path, form(leaf) if isinstance(leaf, (Value, *PLAIN)) else type(leaf)

    return steps
