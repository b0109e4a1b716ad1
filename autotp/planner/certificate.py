"""Makes the replay certificate: a rewritten model must do on a shard exactly what its plan says.

The model is rewritten on fake tensors with the plan of one rank: ranks have equal shapes and differ in offsets only. It is run again
and compared with the trace node by node. The operators and their order, the constants and the results must be the same. Every
result must have the predicted local shape. Every number among the arguments must be what it was, or the local value that a rule
demands. This finds code that computes with the size of a shard (`x / x.shape[-1]`, `arange(x.shape[-1])`, a branch on a width).

One other path is allowed: code may leave out operators that do nothing on a shard. Where each rank has one query head for its
key/value head, `if groups > 1` repeats no keys, and attention is not told to group. The operators left out must keep every element
and its place; their result then stands for their argument.

Where all calls are run with numbers too, some need not be replayed: see `replayed`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import autotp.rewrite
from autotp.axes.find import keep
from autotp.errors import TraceError
from autotp.plan.layout import Layout
from autotp.plan.spec import ParamPlan
from autotp.planner.assemble import Draft
from autotp.planner.partition import local_size
from autotp.planner.placements import NONE
from autotp.planner.replayed import PLAIN, Replayed, every, fewest
from autotp.rewrite.apply import apply
from autotp.rewrite.collectives.comm import DryComm
from autotp.trace.example import Example
from autotp.trace.graph import Graph, Node, Origin, Pseudo, Random, Value
from autotp.trace.memo import Known
from autotp.trace.run import trace

_REWRITE = str(Path(autotp.rewrite.__file__).absolute().parent) + os.sep
_FUSED = tuple(str(Path(nn.__file__).parent / "modules" / name) for name in ("linear.py", "sparse.py"))


#: Operators that keep the order of a tensor's elements, all of them where they keep the number.
_KEEPING = frozenset(("unsqueeze", "squeeze", "expand", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "slice", "alias"))


@dataclass(frozen=True, slots=True)
class Difference:
    """The first node where the replay does not follow the plan."""

    node: Node
    reason: str


def traced(examples: Sequence[Example], graph: Graph) -> tuple[Example, ...]:
    """The examples that are in the trace, with the second calls that are."""
    names = {r.name for r in graph.results}
    drawn = {r.name for r in graph.results if r.drawn}
    operators: Counter[str] = Counter()
    for result, start in zip(graph.results, (0, *(r.stop for r in graph.results)), strict=False):
        operators[result.name.removesuffix("+decode")] += result.stop - start
    ran = (replace(e, optional=False, drawn=e.name in drawn, operators=operators[e.name]) for e in examples if e.name in names)
    return tuple(e if e.name + "+decode" in names else replace(e, decode=None) for e in ran)


def replay(
    model: nn.Module,
    examples: Sequence[Example],
    draft: Draft,
    params: dict[str, ParamPlan],
    tp: int,
    known: Known | None = None,
    *,
    few: bool = False,
) -> Difference | None:
    """Run the rewritten model on fake tensors.

    Return the first difference from the plan, or None when it follows it. `known`: see `trace`. `few`: calls are left out that do
    nothing but what others do, which is enough where all of them are run with numbers.
    """
    ran = traced(examples, draft.space.graph)
    calls = fewest(draft, ran) if few else every(draft, ran)
    found = _replay(model, calls, draft, params, tp, known)
    if found is None or calls.all:
        return found
    return _replay(model, every(draft, ran), draft, params, tp, known)  # it may be that a call differs for want of one before it


def _replay(
    model: nn.Module, calls: Replayed, draft: Draft, params: dict[str, ParamPlan], tp: int, known: Known | None
) -> Difference | None:
    expected = draft.space.graph

    def before(fake: FakeTensorMode) -> Callable[[], None]:
        def make(name: str, old: nn.Parameter, layout: Layout) -> nn.Parameter:
            if layout.dim is None or not isinstance(old, torch._subclasses.FakeTensor):
                return old
            with fake:
                return nn.Parameter(torch.empty(layout.local_shape, dtype=old.dtype), old.requires_grad)

        skipped = tuple(b + "." for b in expected.repeats)
        modules = [m for m in draft.plan.modules if not (skipped and (m.path + ".").startswith(skipped))]
        return apply(model, params, modules, comm=DryComm(tp), make_param=make, skip=skipped).undo

    early: list[Difference] = []

    def enough(first: Graph) -> bool:
        """Most differences are in the first call: the others then need not be run."""
        found = _compare(draft, calls, first, complete=False)
        if found is not None and found.node.op is not Pseudo.WRITE:  # which another call may read
            early.append(found)
        return bool(early)

    hidden = lambda f: f.startswith(_REWRITE)  # noqa: E731
    try:
        actual = trace(
            *(model, calls.examples, keep),
            tag=False,
            hidden=hidden,
            before=before,
            repeats=expected.repeats,
            fixed=True,
            known=known,
            enough=enough,
        )
    except TraceError as error:
        done = error.partial if isinstance(error.partial, Graph) else None
        found = _compare(draft, calls, done, complete=False) if done is not None else None
        if found is None:
            found = Difference(_where(draft, error.module), "")
        cause = error.__cause__ or error
        return Difference(found.node, f"the code fails on a shard ({type(cause).__name__}: {cause})")
    return early[0] if early else _compare(draft, calls, actual, complete=True)


def _where(draft: Draft, module: str) -> Node:
    """The first node of a module that a sharded value reaches; its first node, or the graph's, where there is none."""
    nodes = draft.space.graph.nodes
    inside = [n for n in nodes if n.module == module] or [n for n in nodes if n.module.startswith(module)] or list(nodes)
    labels = draft.choice.labels
    reached = (n for n in inside if any(labels.of(v) for v in (*n.inputs(), *n.outputs)))
    return next(reached, inside[0])


def _visible(draft: Draft, nodes: Iterable[Node]) -> Iterable[Node]:
    calls = {draft.space.graph.nodes[i].call for i in draft.choice.labels.distributed}
    for node in nodes:
        if (node.call in calls and node.call >= 0) or (node.place is not None and node.place.file in _FUSED):
            continue
        yield node


def _actual(nodes: Iterable[Node]) -> Iterable[Node]:
    return (n for n in nodes if n.place is None or n.place.file not in _FUSED)


def _compare(draft: Draft, calls: Replayed, actual: Graph, complete: bool) -> Difference | None:
    twins = _Twins({}, {}, {})
    want = _without_copies(_visible(draft, calls.nodes), twins.stands)
    got = _without_copies(_actual(actual.nodes), twins.copies)
    at = left_out = 0
    for b in got:
        first: Difference | None = None
        while at < len(want) and (reason := _differs(draft, want[at], b, twins, draft.space.graph, actual)):
            first = first or Difference(want[at], reason)
            length = _idle(draft, want[at:], twins)
            if not length:
                return first
            twins.stands[want[at + length - 1].outputs[0].id] = twins.root(next(want[at].inputs()).id)
            at, left_out = at + length, left_out + length
        if at == len(want):
            break
        twins.of.update((y.id, x.id) for x, y in zip(want[at].outputs, b.outputs, strict=True))
        at += 1
    if complete and len(want) - left_out != len(got):
        last = want[min(at, len(want) - 1)]
        return Difference(last, f"the code takes another path on a shard ({len(got)} operators instead of {len(want) - left_out})")
    if complete:
        return _results(calls, actual, want)
    return None


@dataclass(frozen=True, slots=True)
class _Twins:
    """`of`: value of the replay → value of the trace.

    `stands`, `copies`: values of the trace and of the replay that others stand for (results of operators that do nothing → arguments).
    """

    of: dict[int, int]
    stands: dict[int, int]
    copies: dict[int, int]

    def root(self, value: int) -> int:
        while value in self.stands:
            value = self.stands[value]
        return value

    def known(self, value: int) -> int | None:
        return self.of.get(self.copies.get(value, value))


def _without_copies(nodes: Iterable[Node], stands: dict[int, int]) -> list[Node]:
    kept: list[Node] = []
    for node in nodes:
        if node.opname == "contiguous":
            x = next(node.inputs()).id
            stands[node.outputs[0].id] = stands.get(x, x)
        else:
            kept.append(node)
    return kept


def _idle(draft: Draft, nodes: Sequence[Node], twins: _Twins) -> int:
    """Counts how many of `nodes`, from the first, together return their one argument as it is on a shard; 0 where they do not."""
    acting = {(s.file, s.function, s.line, s.offset) for m in draft.plan.modules for s in m.sites if s.inputs or s.outputs or s.kernel}
    chain: list[Value] = []
    for n, node in enumerate(nodes, 1):
        inputs, place = list(node.inputs()), node.place
        if node.opname not in _KEEPING or len(inputs) != 1 or len(node.outputs) != 1:
            return 0
        if place is None or (place.file, place.function, place.line, place.offset) in acting:
            return 0
        chain = chain or inputs
        if twins.root(inputs[0].id) != twins.root(chain[-1].id):
            return 0
        chain.append(node.outputs[0])
        before, after = _local_shape(draft, chain[0]), _local_shape(draft, chain[-1])
        if prod(before) != prod(after):
            return 0
        if before == after:
            return n
    return 0


def _local_shape(draft: Draft, value: Value) -> tuple[int, ...]:
    on = draft.choice.labels.shard.get(value.id, NONE)
    return tuple(local_size(d, on, draft.choice.cuts) for d in draft.space.axes.dims[value.id])


def _kwargs(node: Node, on_shard: Node) -> dict[str, Any]:
    """Keyword arguments without `enable_gqa` where it says nothing: on a shard with as many query as key/value heads."""
    kwargs = dict(node.kwargs)
    if node.opname == "scaled_dot_product_attention":
        query, key = (v.shape for v in on_shard.args[:2])
        if len(query) > 2 and len(key) > 2 and query[-3] == key[-3]:
            kwargs.pop("enable_gqa", None)
    return kwargs


def _differs(draft: Draft, a: Node, b: Node, twins: _Twins, expected: Graph, actual: Graph) -> str:
    if a.op is not b.op or a.module != b.module:
        return f"the code takes another path on a shard ({b.opname} in {b.module or '<root>'} instead of {a.opname})"
    if len(a.outputs) != len(b.outputs):
        return f"{a.opname} gives {len(b.outputs)} results on a shard instead of {len(a.outputs)}"
    for x, y in zip(a.outputs, b.outputs, strict=True):
        shape = _local_shape(draft, x)
        if shape != y.shape:
            return f"the result has shape {list(y.shape)} on a shard where {list(shape)} was planned"
    if isinstance(a.op, Pseudo):
        return _wiring(a.inputs(), b.inputs(), twins, expected, actual)
    cuts, demands = draft.choice.cuts, draft.space.axes.meanings[a.index].demands
    wanted = {(d.number, d.at): sum(local_size(x, _on(draft, a, d.value), cuts) for x in d.dims) for d in demands}
    return _arguments((a.args, _kwargs(a, b)), (b.args, _kwargs(b, b)), wanted, -1) or _wiring(
        a.inputs(), b.inputs(), twins, expected, actual
    )


def _on(draft: Draft, node: Node, value: int) -> Any:
    labels = draft.choice.labels
    return labels.shard.get(value, NONE) | labels.slices.get((node.index, value), NONE)


def _arguments(a: Any, b: Any, wanted: dict[tuple[int, int], int], at: int) -> str:
    if isinstance(a, Value) or isinstance(b, Value):
        return "" if isinstance(a, Value) and isinstance(b, Value) else "a number stands where a tensor was"
    if isinstance(a, (tuple, list)):
        if not isinstance(b, (tuple, list)) or len(a) != len(b):
            return f"the arguments {a} became {b} on a shard"
        inside = [_arguments(x, y, wanted, i if isinstance(x, int) else -1) for i, (x, y) in enumerate(zip(a, b, strict=True))]
        return next((r for r in inside if r), "")
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return f"the arguments {sorted(a)} became {sorted(b)} on a shard"
        return next((r for k in a if (r := _arguments(a[k], b[k], wanted, -1))), "")
    if _same(a, b):
        return ""
    if isinstance(a, Random) and isinstance(b, Random):
        return "a random generator draws other numbers when the code runs again or on a shard: seed it with one number (manual_seed(0))"
    numbers = isinstance(a, int) and isinstance(b, int) and not isinstance(a, bool)
    if numbers and (b in (wanted.get((a, at)), wanted.get((a, -1))) or (at >= 0 and b == -1 and (a, at) in wanted)):
        return ""
    return f"the number {a} becomes {b} on a shard"


def _same(a: Any, b: Any) -> bool:
    """True for equal things. NaN counts as equal to itself, and a handle of torch's own (a range of the profiler) as any of its kind."""
    if isinstance(a, torch.ScriptObject):  # made anew in each call, and without an `==`
        return isinstance(b, torch.ScriptObject) and a._type() == b._type()
    return bool(a == b or (isinstance(a, (float, complex)) and isinstance(b, (float, complex)) and a != a and b != b))


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    """True for tensors of equal numbers, NaN among them."""
    return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())


def _wiring(a: Iterable[Value], b: Iterable[Value], twins: _Twins, expected: Graph, actual: Graph) -> str:
    for x, y in zip(a, b, strict=False):
        known = twins.known(y.id)
        if known is not None and known != twins.root(x.id) and x.origin is Origin.NODE:
            return "an argument comes from another operator on a shard"
        if x.id in expected.constants and y.id in actual.constants:
            p, q = expected.constants[x.id], actual.constants[y.id]
            if not _same_numbers(p, q):
                return f"a constant is {_short(q)} on a shard where it is {_short(p)}"
    return ""


def _short(tensor: Tensor) -> str:
    return str(tensor.flatten()[:4].tolist())


def _results(calls: Replayed, actual: Graph, want: list[Node]) -> Difference | None:
    for x, y in zip(calls.results, actual.results, strict=False):
        before = [(path, leaf) for path, leaf in x.leaves if isinstance(leaf, PLAIN)]
        after = [(path, leaf) for path, leaf in y.leaves if isinstance(leaf, PLAIN)]
        if len(before) != len(after) or not all(p == q and _same(x, y) for (p, x), (q, y) in zip(before, after, strict=True)):
            return Difference(want[-1], f"the model returns {after} on a shard where it returns {before}")
        shapes = [tuple(v.shape) for _, v in x.leaves if isinstance(v, Value)]
        if shapes != [tuple(v.shape) for _, v in y.leaves if isinstance(v, Value)]:
            return Difference(want[-1], "the model returns tensors of other shapes on a shard")
    return None
