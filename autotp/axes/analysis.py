"""Runs the rule of each node and collects what the rules say.

`Axes` is the result: the dims of every value in terms of atoms, and for every node a `Meaning`: what it sums over, which of its
arguments may be partial sums, which ints must follow which dims, and where an axis meets an operator that blocks it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from autotp.axes import atoms
from autotp.axes.atoms import Atom, Dim, Opaque
from autotp.plan.spec import DistributedForm
from autotp.trace.graph import Graph, Node, Origin, Pseudo, Value, outside
from autotp.trace.ints import SizeRef, leaves


@dataclass(frozen=True, slots=True)
class Blocked:
    """A place where a sharded `dim` of `value` would give a wrong answer."""

    value: int
    dim: tuple[Atom, ...]
    reason: str


@dataclass(frozen=True, slots=True)
class Contract:
    """The node sums over `dim` of `value`: sharded there, its result is a partial sum. `form`: only in this distributed form."""

    value: int
    dim: tuple[Atom, ...]
    form: DistributedForm | None = None
    whole: bool = False  # the form's result is whole (a norm), not a partial sum


@dataclass(frozen=True, slots=True)
class Demand:
    """The int at `position` of the ATen call's ints must be the sum of the local sizes of `dims` of value `value`."""

    number: int
    value: int
    dims: tuple[tuple[Atom, ...], ...]
    at: int = -1  # position in the argument's list, -1 for a bare int
    listed: int = 0  # length of that list


@dataclass(slots=True)
class Meaning:
    """Says what one node does; its rule fills it in."""

    contracts: list[Contract] = field(default_factory=list)
    linear: list[frozenset[int]] = field(default_factory=list)  # sets of values that may be partial sums together
    blocked: list[Blocked] = field(default_factory=list)
    demands: list[Demand] = field(default_factory=list)
    taken: list[Demand] = field(default_factory=list)  # numbers that take all of a dim, or nothing, where another call may not
    counted: list[Demand] = field(default_factory=list)  # numbers of chunks of a dim, of steps along it
    once: list[int] = field(default_factory=list)  # values added once to a partial sum (a bias)
    generates: bool = False  # the result's content does not depend on its position: it can be made sharded


Rule = Callable[["Context", Node], None]


class Context:
    """Rules work with this: it gives them the dims of values, and takes joins and marks."""

    def __init__(self, graph: Graph, ends: Mapping[str, int]) -> None:
        self.graph, self.ends = graph, ends
        self.dims: dict[int, list[Dim]] = {}
        self.made = {o.id: n for n in graph.nodes for o in n.outputs}
        self.meanings: list[Meaning] = []
        self.node: Node

    @property
    def meaning(self) -> Meaning:
        """Returns the meaning of the current node."""
        return self.meanings[-1]

    def of(self, value: Value) -> list[Dim]:
        """Returns the dims of a value, fresh ones at first sight."""
        if value.id not in self.dims:
            self.dims[value.id] = [atoms.new(n) for n in value.shape]
        return self.dims[value.id]

    def set(self, value: Value, dims: Sequence[Dim]) -> None:
        """Give the node's result its dims, joined with those that it already had.

        Raises ValueError where they are not those of its shape.
        """
        if tuple(atoms.dim_size(d) for d in dims) != value.shape:
            raise ValueError(f"its result of shape {list(value.shape)} would get other dims")
        if value.id in self.dims:
            for a, b in zip(self.dims[value.id], dims, strict=True):
                self.join(value, a, value, b)
        else:
            self.dims[value.id] = [list(d) for d in dims]

    def join(self, left: Value, a: Dim, right: Value, b: Dim) -> None:
        """Join a dim of `left` with one of `right`, or mark both opaque."""
        try:
            atoms.join(a, b)
        except Opaque as why:
            self.block(left, a, str(why))
            self.block(right, b, str(why))

    def block(self, value: Value, dim: Sequence[Atom], reason: str) -> None:
        """Forbids to shard `value` along `dim` here."""
        if dim:
            self.meaning.blocked.append(Blocked(value.id, tuple(dim), reason))

    def mix(self, value: Value, index: int) -> None:
        """Records that the operator mixes the elements along dim `index` of `value`."""
        self.block(value, self.of(value)[index], f"{self.node.opname} mixes the elements of the dim")

    def contract(self, value: Value, index: int, form: DistributedForm | None = None, whole: bool = False) -> None:
        """Records that the operator sums over dim `index` of `value`."""
        dim = self.of(value)[index]
        if dim:
            self.meaning.contracts.append(Contract(value.id, tuple(dim), form, whole))

    def linear(self, *groups: Sequence[Value]) -> None:
        """Lets each group of values be partial sums together, which gives a partial sum.

        A group of one stands for an operator that is linear in that operand; a tensor multiplied with itself is none.
        """
        inputs = [v.id for v in self.node.inputs()]
        for group in groups:
            if group and not (len(group) == 1 and inputs.count(group[0].id) > 1):
                self.meaning.linear.append(frozenset(v.id for v in group))

    def demand(self, number: Any, value: Value, dims: Sequence[Dim], at: int = -1, listed: int = 0) -> None:
        """Demands that the int `number` is the local size of `dims` (summed) of `value`; blocks them where it is not the whole size."""
        if isinstance(number, int) and not isinstance(number, bool) and number != -1:
            if number != sum(map(atoms.dim_size, dims)):
                for dim in dims:
                    self.block(value, dim, f"{self.node.opname} takes {int(number)}, which is not the size of the dim")
                return
            self.meaning.demands.append(Demand(int(number), value.id, tuple(tuple(d) for d in dims), at, listed))

    def takes(self, number: Any, value: Value, index: int) -> None:
        """Records that the int `number` takes all of dim `index` of `value`, or nothing, in this call."""
        if isinstance(number, int):
            self.meaning.taken.append(Demand(int(number), value.id, (tuple(self.of(value)[index]),)))

    def counts(self, number: Any, value: Value, index: int) -> None:
        """Records that the int `number` says how many pieces are made of dim `index` of `value`, or each how many-th index is taken."""
        if isinstance(number, int):
            self.meaning.counted.append(Demand(int(number), value.id, (tuple(self.of(value)[index]),)))

    def of_calls(self, constant: Value) -> bool:
        """True where a constant may be another one in another call: an argument, and what operators made of one, or of sizes."""
        node = self.made.get(constant.id)
        if node is None:
            return constant.origin is Origin.INPUT
        sized = any(isinstance(leaf, SizeRef) for expr in node.ints for leaf in leaves(expr))
        return sized or any(self.of_calls(v) for v in node.inputs())

    def opaque(self, reason: str | None = None) -> None:
        """Forbids to shard any dim of any argument; results are fresh."""
        why = reason or f"no rule for {self.node.opname}"
        for value in self.node.inputs():
            for dim in self.of(value):
                self.block(value, dim, why)
        for out in self.node.outputs:
            self.of(out)


@dataclass(frozen=True, slots=True)
class Axes:
    """Holds the graph with its axes: `dims[value id]` and `meanings[node index]`.

    `ends`: path of a module → the dim of its result, counted from the last, whose axis ends there: it is gathered if it is cut.
    """

    graph: Graph
    dims: Mapping[int, tuple[tuple[Atom, ...], ...]]
    meanings: tuple[Meaning, ...]
    ends: Mapping[str, int] = field(default_factory=dict)


def analyse(graph: Graph, rule_of: Callable[[Node], Rule], ends: Mapping[str, int] = MappingProxyType({})) -> Axes:
    """Run the rule of each node in order, twice: the second pass uses structure that later nodes gave to earlier dims."""
    context = Context(graph, ends)
    for value in (*graph.params.values(), *graph.buffers.values()):
        context.of(value)
    for _ in range(2):
        context.meanings.clear()
        inside: dict[int, set[int]] = {}
        for node in graph.nodes:
            context.node = node
            context.meanings.append(Meaning())
            try:
                if outside(node):
                    context.opaque(graph.sealed(node))
                else:
                    rule_of(node)(context, node)
            except (Opaque, AssertionError, IndexError, KeyError, TypeError, ValueError) as why:
                context.meanings[-1] = Meaning()
                context.opaque(f"{node.opname}: {why}" if str(why) else f"{node.opname} in a form without a rule")
            if node.scope >= 0:
                _enclose(context, node, inside.setdefault(node.scope, set()))
    dims = {key: tuple(tuple(d) for d in value) for key, value in context.dims.items()}
    return Axes(graph, dims, tuple(context.meanings), ends)


def _enclose(context: Context, node: Node, inside: set[int]) -> None:
    """Block values that come into an autograd function past its arguments; its backward says nothing of them."""
    if node.op is not Pseudo.APPLY:
        for value in node.inputs():
            if value.id not in inside:
                for dim in context.of(value):
                    context.block(value, dim, f"{context.graph.sealed(node)}, and it is no argument of it")
    else:
        inside.update(v.id for v in node.inputs())
    inside.update(o.id for o in node.outputs)


def is_pointwise(op: Any) -> bool:
    """True for operators that torch itself marks as elementwise."""
    return isinstance(op, torch._ops.OpOverload) and torch.Tag.pointwise in op.tags
