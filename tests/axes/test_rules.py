"""Every rule's claim against the operator itself.

A module of one operator on random shapes is traced, with the operands as its parameters. Each leaf atom (and some pairs) that
the labels accept without a conflict is a claim: give each of T = 2 ranks its part of what carries the atom, and each rank's result
is its part of the full result, or the ranks' results add up to it. `claims` runs every node on the ranks in lockstep with ATen
operators, the ints replaced as the rule demands, and compares every value. `linear` groups are claims too: f(Σ parts) = Σ f(part).

`split` and `chunk` into pieces of one size leave unequal local pieces to the replay, which compares shapes: there a wrong shape
or a failing call counts as refused (`LOUD`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from autotp.axes.analysis import Context, Meaning, Rule
from autotp.axes.find import find_axes, keep
from autotp.axes.operators.elementwise import pointwise
from autotp.axes.operators.table import OPERATORS
from autotp.plan.expressions import size
from autotp.plan.layout import Layout
from autotp.plan.spec import DistributedForm
from autotp.planner.labelling import label
from autotp.planner.naming import Namer
from autotp.planner.padding import padding_conflict
from autotp.planner.partition import Atoms, Partition, Partitions, in_order, local_size, neighbours
from autotp.planner.placements import NONE, GraphIndex, Labels
from autotp.testing import assert_equivalent
from autotp.trace.example import Example
from autotp.trace.graph import Node, Pseudo, Value
from autotp.trace.run import trace
from tests.support.rules import give_rule
from tests.support.slow import halved

TP = 2
_NAMES_OF_DIMS = {"dim", "dims", "dim0", "dim1", "start_dim", "end_dim", "ord", "p", "step"}


class Operator(nn.Module):
    """One expression over parameters (these may be sharded) and buffers (always whole)."""

    def __init__(self, function: Callable[..., Any], params: Iterable[Tensor], buffers: Iterable[Tensor]) -> None:
        super().__init__()
        self.function = function
        self.p = nn.ParameterList([nn.Parameter(t, requires_grad=False) for t in params])
        for i, t in enumerate(buffers):
            self.register_buffer(f"b{i}", t)
        self.number = len(list(self.buffers()))

    def forward(self) -> Any:
        return self.function(*self.p, *(getattr(self, f"b{i}") for i in range(self.number)))


class Draw:
    """Random even sizes and tensors."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99), label="seed"))

    def n(self, *choices: int) -> int:
        return self.data.draw(st.sampled_from(choices or (2, 3, 4, 6)))

    def yes(self) -> bool:
        return self.data.draw(st.booleans())

    def x(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def ids(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def mask(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) > 0.4

    def lead(self) -> tuple[int, ...]:
        """Batch dims: none, one or two."""
        return tuple(self.n() for _ in range(self.n(0, 1, 2)))


class Refused(Exception):
    """The claim cannot be run: an int would have to be two things at once, or a form crosses the ranks."""


def _ints(node: Node, meaning: Meaning, labels: Labels) -> dict[tuple[int, int], int]:
    wanted: dict[tuple[int, int], int] = {}
    for d in meaning.demands:
        on = labels.shard.get(d.value, NONE) | labels.slices.get((node.index, d.value), NONE)
        local = sum(local_size(dim, on, labels.cuts) for dim in d.dims)
        if wanted.setdefault((d.number, d.at), local if d.number >= 0 else -local) != (local if d.number >= 0 else -local):
            raise Refused
    return wanted


def _replaced(node: Node, wanted: dict[tuple[int, int], int], tensor: Callable[[Value], Tensor]) -> tuple[list[Any], dict[str, Any]]:
    assert not isinstance(node.op, Pseudo)
    names = [a.name for a in node.op._schema.arguments]

    def convert(tree: Any, name: str, at: int = -1) -> Any:
        if isinstance(tree, Value):
            return tensor(tree)
        if isinstance(tree, (list, tuple)):
            return [convert(item, name, i) for i, item in enumerate(tree)]
        if isinstance(tree, int) and not isinstance(tree, bool) and name not in _NAMES_OF_DIMS:
            return wanted.get((tree, at), tree)
        return tree

    args = [convert(a, names[i]) for i, a in enumerate(node.args)]
    return args, {k: convert(v, k) for k, v in node.kwargs.items()}


def _run(node: Node, wanted: dict[tuple[int, int], int], tensor: Callable[[Value], Tensor]) -> list[Tensor]:
    if node.op in (Pseudo.ENTER, Pseudo.EXIT):
        return [tensor(node.args[0])]
    mutable = node.op._schema.is_mutable  # type: ignore[union-attr]  # values stay as they were: each change makes a new one
    args, kwargs = _replaced(node, wanted, (lambda v: tensor(v).clone()) if mutable else tensor)
    out = node.op(*args, **kwargs)  # type: ignore[operator]
    return [out] if isinstance(out, Tensor) else [t for t in out if isinstance(t, Tensor)]


@dataclass
class Subject:
    """A traced operator and its true values."""

    space: GraphIndex
    full: dict[int, Tensor]
    loud: bool = False

    @staticmethod
    def of(module: nn.Module, loud: bool = False) -> Subject:
        graph = trace(module, [Example("user", dict)], keep)
        space = GraphIndex(find_axes(graph))
        full = {v.id: dict(module.named_parameters())[n].detach() for n, v in graph.params.items()}
        full |= {v.id: dict(module.named_buffers())[n] for n, v in graph.buffers.items()}
        full |= dict(graph.constants)
        for node in graph.nodes:
            full.update(zip((o.id for o in node.outputs), _run(node, {}, lambda v: full[v.id]), strict=True))
        return Subject(space, full, loud)

    def layout(self, value: int, on: Atoms, cuts: Partitions) -> Layout:
        """The layout of a value; dims that carry factors of one cut are taken as one, `flattened`."""
        dims, leaves = self.space.axes.dims[value], self.space.leaves[value]
        hit = [i for i, atoms in enumerate(leaves) if atoms & on] or [0]
        merged = [*dims[: hit[0]], tuple(a for d in dims[hit[0] : hit[-1] + 1] for a in d), *dims[hit[-1] + 1 :]] if dims else []
        if not all(in_order(d, on, cuts) for d in merged):
            raise Refused
        namer = Namer({}, cuts)
        exprs = tuple(namer.expr(d, on) for d in merged)
        return Layout(tuple(size(e) for e in exprs), exprs, TP)

    def check(self, *chosen: Partition) -> bool:
        """Run a claim; False where the labels or the padding refuse it.

        Raises:
            AssertionError: some value is not what the labels say.
        """
        cuts = {atom: cut for cut in chosen for atom in cut.atoms}
        labels = label(self.space, cuts, {})
        if labels.conflicts or any(cut.padded and padding_conflict(self.space, labels, cut) for cut in chosen):
            return False
        held: dict[int, list[Tensor]] = {}
        for key, full in self.full.items():
            if self.space.made.get(key) is None:
                parts = [self.layout(key, labels.shard.get(key, NONE), cuts).shard(full, r) for r in range(TP)]
                held[key] = [p if r == 0 else torch.zeros_like(p) for r, p in enumerate(parts)] if key in labels.once else parts
        try:
            for node in self.space.graph.nodes:
                self._step(node, labels, held)
        except Refused:
            return False
        return True

    def _step(self, node: Node, labels: Labels, held: dict[int, list[Tensor]]) -> None:
        wanted = _ints(node, self.space.axes.meanings[node.index], labels)
        form = labels.distributed.get(node.index)
        uneven = any(cut.padded or cut.pieces > 1 for cut in labels.cuts.values())
        if form not in (None, DistributedForm.MEAN, DistributedForm.LOOKUP) or (form is not None and uneven):
            raise Refused
        results = []
        for rank in range(TP):

            def tensor(v: Value, rank: int = rank) -> Tensor:
                if (node.index, v.id) in labels.reduces:
                    return sum(held[v.id][1:], held[v.id][0])
                cut = labels.slices.get((node.index, v.id), NONE)
                return _slice(held[v.id][rank], self.layout(v.id, cut, labels.cuts), rank) if cut else held[v.id][rank]

            if form is DistributedForm.LOOKUP:
                results.append([_lookup(tensor(node.args[0]), tensor(node.args[1]), rank)])
            else:
                try:
                    out = _run(node, wanted, tensor)
                except (RuntimeError, IndexError, ValueError) as error:
                    raise (Refused if self.loud else error) from error
                if self.loud and len(out) != len(node.outputs):
                    raise Refused
                results.append([t / TP for t in out] if form is DistributedForm.MEAN else out)
        for i, o in enumerate(node.outputs):
            got, full = held.setdefault(o.id, [r[i] for r in results]), self.full[o.id]
            if o.id in labels.partial:
                assert all(t.shape == full.shape for t in got)
                assert torch.allclose(sum(got[1:], got[0]), full), f"the parts of {o} do not add up: {node}"
            else:
                layout = self.layout(o.id, labels.of(o), labels.cuts)
                for rank, t in enumerate(got):
                    local = tuple(local_size(d, labels.of(o), labels.cuts) for d in self.space.axes.dims[o.id])
                    if self.loud and tuple(t.shape) != local:
                        raise Refused
                    assert tuple(t.shape) == local, f"{o} has shape {tuple(t.shape)}, not {local}: {node}"
                    t = t.reshape(layout.local_shape)
                    want = _slice(t, layout, rank, full.reshape(layout.shape))
                    assert torch.allclose(t, want, equal_nan=True), f"{o} is not {layout} on rank {rank}: {node}"

    def check_linear(self, generator: torch.Generator) -> None:
        """Run the claims that partial sums pass."""
        for node, meaning in zip(self.space.graph.nodes, self.space.axes.meanings, strict=True):
            for group in () if isinstance(node.op, Pseudo) else meaning.linear:
                parts: list[dict[int, Tensor]] = [{}, {}]
                for key in group:
                    if not self.full[key].is_floating_point():
                        break
                    parts[0][key] = torch.randn(self.full[key].shape, generator=generator, dtype=torch.float64)
                    parts[1][key] = self.full[key] - parts[0][key]
                else:
                    a, b = (_run(node, {}, lambda v, p=p: p.get(v.id, self.full[v.id])) for p in parts)
                    for x, y, o in zip(a, b, node.outputs, strict=True):
                        assert torch.allclose(x + y, self.full[o.id]), f"{node} is not linear in {[*group]}"

    def candidates(self) -> tuple[list[Partition], list[Partition]]:
        """Partitions of single atoms, and of neighbours dealt in pieces."""
        values = self.space.graph.params.values()
        every = sorted({a for v in values for a in self.space.carried[v.id] if a.size > 1}, key=lambda a: a.id)
        pairs = {pair: None for v in values for dim in self.space.axes.dims[v.id] for pair in neighbours(dim) if pair[1].size > 1}
        return [Partition(a, TP) for a in every], [
            Partition(a, TP, b, n) for a, b in pairs for n in (2, 3) if n <= b.size and -(-b.size // -(-b.size // n)) == n
        ]

    def claims(self) -> int:
        """Check every single cut and some pairs; how many were accepted."""
        singles, pieces = self.candidates()
        accepted = sum(self.check(cut) for cut in (*singles, *pieces))
        return accepted + sum(self.check(*pair) for pair in islice(combinations(singles, 2), 12))


def _slice(x: Tensor, layout: Layout, rank: int, full: Tensor | None = None) -> Tensor:
    """A rank's part of `x`, padded with its last entry as at run time.

    Given `full`, `x` itself, its real entries replaced by the true ones.
    """
    if layout.dim is None:
        return x if full is None else full
    pieces, at = [], 0
    for a, b in layout.runs(rank):
        if full is not None:
            pieces.append(full.narrow(layout.dim, a, b - a) if a >= 0 else x.narrow(layout.dim, at, b - a))
        elif a >= 0:
            pieces.append(x.narrow(layout.dim, a, b - a))
        else:
            pieces += [x.narrow(layout.dim, x.shape[layout.dim] - 1, 1)] * (b - a)
        at += b - a
    return torch.cat(pieces, layout.dim)


def _lookup(table: Tensor, ids: Tensor, rank: int) -> Tensor:
    local = ids - rank * table.shape[0]
    inside = (local >= 0) & (local < table.shape[0])
    return F.embedding(local.clamp(0, table.shape[0] - 1), table) * inside[..., None]


Case = Callable[[Draw], tuple[Callable[..., Any], list[Tensor], list[Tensor]]]
CASES: dict[str, Case] = {}
LOUD = {"split", "chunk"}


def case(function: Case) -> Case:
    CASES[function.__name__.removesuffix("_")] = function
    return function


# products -----------------------------------------------------------------------------------------------------------------------


@case
def linear(d: Draw) -> Any:
    i, o = d.n(), d.n()
    w = [d.x(o, i), *([d.x(o)] if d.yes() else [])]
    return F.linear, [d.x(*d.lead(), 4, i), *w], []


@case
def addmm(d: Draw) -> Any:
    m, k, n = d.n(), d.n(), d.n()
    return torch.addmm, [d.x(n) if d.yes() else d.x(m, n), d.x(m, k), d.x(k, n)], []


@case
def matmul(d: Draw) -> Any:
    lead, m, k, n = d.lead(), d.n(), d.n(), d.n()
    other = (1,) * len(lead) if d.yes() else lead if d.yes() else ()
    return torch.matmul, [d.x(*lead, m, k), d.x(*other, k, n)], []


@case
def bmm(d: Draw) -> Any:
    b, m, k, n = d.n(), d.n(), d.n(), d.n()
    return torch.bmm, [d.x(b, m, k), d.x(b, k, n)], []


@case
def baddbmm(d: Draw) -> Any:
    b, m, k, n = d.n(), d.n(), d.n(), d.n()
    return torch.baddbmm, [d.x(b, m, n), d.x(b, m, k), d.x(b, k, n)], []


@case
def einsum(d: Draw) -> Any:
    size = {c: d.n() for c in "abcde"}
    text = d.data.draw(
        st.sampled_from(["abc,dc->abd", "abcd,aecd->acbe", "ab,ab->a", "abc,bc->ac", "...ab,bc->...ac", "ab,cd->abcd", "a,a"])
    )
    left = text.split("->")[0].replace("...", "e").split(",")
    return (lambda *t: torch.einsum(text, *t)), [d.x(*(size[c] for c in term)) for term in left], []


@case
def conv1d(d: Draw) -> Any:
    b, c, o, t, k = d.n(), d.n(), d.n(), d.n(4, 6), d.n(1, 2, 3)
    if d.yes():
        m = d.n(1, 2)
        return (
            (lambda x, w, *b: F.conv1d(x, w, *b, padding=k - 1, groups=c)),
            [d.x(b, c, t), d.x(c * m, 1, k), *([d.x(c * m)] if d.yes() else [])],
            [],
        )
    return (lambda x, w, *b: F.conv1d(x, w, *b)), [d.x(b, c, t), d.x(o, c, k), *([d.x(o)] if d.yes() else [])], []


@case
def bilinear(d: Draw) -> Any:
    b, i, j, o = d.n(), d.n(), d.n(), d.n()
    lead = [b] if d.yes() else [b, d.n()]
    return F.bilinear, [d.x(*lead, i), d.x(*lead, j), d.x(o, i, j), *([d.x(o)] if d.yes() else [])], []


@case
def grouped_convolution(d: Draw) -> Any:
    groups, each, more, k = d.n(2, 4), d.n(2, 3), d.n(1, 2, 3), d.n(1, 2)
    tensors = [d.x(2, groups * each, 4), d.x(groups * more, each, k), *([d.x(groups * more)] if d.yes() else [])]
    return (lambda x, w, *b: F.conv1d(x, w, *b, groups=groups)), tensors, []


@case
def conv_transpose(d: Draw) -> Any:
    b, i, o, k = d.n(), d.n(), d.n(), d.n(1, 2, 3)
    tensors = [d.x(b, i, 4), d.x(i, o, k), *([d.x(o)] if d.yes() else [])]
    return (lambda x, w, *c: F.conv_transpose1d(x, w, *c, stride=2)), tensors, []


@case
def grouped_conv_transpose(d: Draw) -> Any:
    groups, each, more = d.n(2, 4), d.n(1, 2, 3), d.n(1, 2, 3)
    tensors = [d.x(2, groups * each, 3, 3), d.x(groups * each, more, 2, 2), *([d.x(groups * more)] if d.yes() else [])]
    return (lambda x, w, *c: F.conv_transpose2d(x, w, *c, groups=groups)), tensors, []


@case
def conv2d(d: Draw) -> Any:
    return F.conv2d, [d.x(2, d.n(2, 4), 4, 4)[:, :2], d.x(d.n(), 2, 2, 2)], []


@case
def attention(d: Draw) -> Any:
    b, kv, g, t, s, w, u = d.n(), d.n(), d.n(1, 2), d.n(), d.n(), d.n(), d.n()
    extra = [d.x(*(n if d.yes() else 1 for n in (b, kv * g)), t, s)] if d.yes() else []
    gqa = g > 1
    return (
        (lambda q, k, v, *m: F.scaled_dot_product_attention(q, k, v, *m, enable_gqa=gqa)),
        [d.x(b, kv * g, t, w), d.x(b, kv, s, w), d.x(b, kv, s, u), *(extra if d.yes() else [])],
        [],
    )


# elementwise --------------------------------------------------------------------------------------------------------------------


@case
def add(d: Draw) -> Any:
    lead, n = d.lead(), d.n()
    return (lambda a, b: a + b if n > 2 else a - 2 * b), [d.x(*lead, n), d.x(n) if d.yes() else d.x(*lead, 1)], []


@case
def add_number(d: Draw) -> Any:
    return (lambda a: (a + 1.5) * 2), [d.x(*d.lead(), d.n())], []


@case
def alpha(d: Draw) -> Any:
    n = d.n()
    return (lambda a, b: torch.add(torch.rsub(a, b, alpha=3), b, alpha=2)), [d.x(n, n), d.x(n, n)], []


@case
def mul(d: Draw) -> Any:
    lead, n = d.lead(), d.n()
    return (lambda a, b: a * b / (2 + b.square())), [d.x(*lead, n), d.x(*lead, n) if d.yes() else d.x(n)], []


@case
def same_twice(d: Draw) -> Any:
    """A product of a tensor with itself is not linear in it."""
    n = d.n()
    f = d.data.draw(
        st.sampled_from(
            [lambda x: x * x, lambda x: torch.einsum("ab,ab->ab", x, x), lambda x: x @ x, lambda x: F.linear(x, x), torch.square]
        )
    )
    return (lambda x: f(x + x)), [d.x(n, n)], []


@case
def activation(d: Draw) -> Any:
    f = d.data.draw(st.sampled_from([F.silu, F.gelu, F.relu, torch.tanh, F.softplus, torch.exp, torch.abs, torch.rsqrt]))
    return (lambda x: f(x.square() + 0.1)), [d.x(*d.lead(), d.n())], []


@case
def prelu(d: Draw) -> Any:
    """One slope a channel, or one for all; dims behind the channels or none."""
    m, n = d.n(), d.n()
    return F.prelu, [d.x(m, n, *d.lead()), d.x(n if d.yes() else 1)], []


@case
def where(d: Draw) -> Any:
    m, n = d.n(), d.n()
    mask = d.mask(m, n) if d.yes() else d.mask(n)
    b = d.x(m, n) if d.yes() else d.x(n)
    return (lambda x, y, c: torch.where(c, x, y)), [d.x(m, n), b], [mask]


@case
def where_number(d: Draw) -> Any:
    m, n = d.n(), d.n()
    value = float(d.n(0, 1))
    return (lambda x, c: torch.where(c, x, value)), [d.x(m, n), d.mask(m, n)], []


@case
def masked_fill(d: Draw) -> Any:
    m, n = d.n(), d.n()
    value = d.n(0, -3)
    mask = [d.mask(m, n) if d.yes() else d.mask(1, n)]
    whole = d.yes()
    return (lambda x, c: x.masked_fill(c, value)), [d.x(m, n), *([] if whole else mask)], mask if whole else []


@case
def maximum(d: Draw) -> Any:
    m, n = d.n(), d.n()
    return (lambda a, b: torch.maximum(a, b).clamp(-1, 1)), [d.x(m, n), d.x(n)], []


# views --------------------------------------------------------------------------------------------------------------------------


@case
def view(d: Draw) -> Any:
    a, b, c, e = d.n(), d.n(), d.n(), d.n()
    to = d.data.draw(st.sampled_from([(a, b, c * e), (a * b, c, e), (a, b * c, e), (a * b * c * e,), (a, b * c, -1), (b, a, c, e)]))
    return (lambda x: x.view(to) if c > 2 else x.reshape(to)), [d.x(a, b, c, e)], []


@case
def view_back(d: Draw) -> Any:
    """A width viewed as heads, moved and flattened."""
    n, t, h, w = d.n(), d.n(), d.n(), d.n()
    return (lambda x: x.view(n, t, h, w).transpose(1, 2).contiguous().view(n, h, t * w)), [d.x(n, t, h * w)], []


@case
def flatten(d: Draw) -> Any:
    return (lambda x: x.flatten(1, 2).unflatten(0, (2, -1))), [d.x(2 * d.n(), d.n(), d.n(), d.n())], []


@case
def transpose(d: Draw) -> Any:
    return (lambda x: x.transpose(0, -1).permute(2, 0, 1).mT), [d.x(d.n(), d.n(), d.n())], []


@case
def squeeze(d: Draw) -> Any:
    return (lambda x: x.unsqueeze(-2).squeeze(0).unsqueeze(1)), [d.x(1, d.n(), d.n())], []


@case
def expand(d: Draw) -> Any:
    a, b, c = d.n(), d.n(), d.n()
    return (
        (lambda x: x.expand(a, b, -1) if b > 2 else x[:, None].expand(a, c, b, c).reshape(a, c * b, c)),
        [d.x(a, 1 if b > 2 else b, c)],
        [],
    )


@case
def repeat(d: Draw) -> Any:
    r = d.n(1, 2, 3)
    return (lambda x: x.repeat(2, 1, r) if d else x), [d.x(d.n(), d.n())], []


@case
def repeat_interleave(d: Draw) -> Any:
    r, at = d.n(2, 3), d.n(0, 1, -1)
    return (lambda x: x.repeat_interleave(r, dim=at)), [d.x(d.n(), d.n())], []


@case
def complex_view(d: Draw) -> Any:
    return (
        (lambda x, y: torch.view_as_real(torch.view_as_complex(x) * torch.view_as_complex(y)).flatten(-2)),
        [d.x(d.n(), d.n(), 2), d.x(d.n(1), 1, 2)],
        [],
    )


# cuts and joins -----------------------------------------------------------------------------------------------------------------


@case
def split(d: Draw) -> Any:
    a, b, c = d.n(), d.n(), d.n()
    at = d.n(0, 1)
    sizes = [a, b, c] if d.yes() else a
    total = a + b + c if isinstance(sizes, list) else a * b
    return (lambda x: torch.split(x, sizes, at)), [d.x(total, 4) if at == 0 else d.x(4, total)], []


@case
def chunk(d: Draw) -> Any:
    k = d.n(2, 3)
    return (lambda x: [t * i for i, t in enumerate(x.chunk(k, -1))]), [d.x(d.n(), k * d.n())], []


@case
def slice_(d: Draw) -> Any:
    n = d.n(6, 8)
    a, b = d.n(0, 2), d.n(4, 6, -2)
    return (lambda x: x[..., a:b] + 0 if d else x), [d.x(d.n(), n)], []


@case
def strided_slice(d: Draw) -> Any:
    n, k = d.n(), d.n(2, 3)
    return (lambda x: x[..., ::k] + x[..., 1::k]), [d.x(d.n(), n * k)], []


@case
def narrow(d: Draw) -> Any:
    a, b, c = d.n(), d.n(), d.n()
    return (lambda x: x.narrow(0, a, b)), [d.x(a + b + c, 4)], []


@case
def cat(d: Draw) -> Any:
    m, a, b, at = d.n(), d.n(), d.n(), d.n(0, -1)
    return (lambda x, y: torch.cat([x, y, x], at)), [d.x(m, a) if at else d.x(a, m), d.x(m, b) if at else d.x(b, m)], []


@case
def rotate_half(d: Draw) -> Any:
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin

    t, w = d.n(), 2 * d.n()
    return rotate, [d.x(d.n(), t, w)], [d.x(t, w), d.x(t, w)]


@case
def split_heads(d: Draw) -> Any:
    """A fused q, k, v weight, cut and viewed as heads."""
    n, h, w = d.n(), d.n(), d.n()
    return (lambda x: [t.view(n, h, w) for t in x.split([h * w] * 3, -1)]), [d.x(n, 3 * h * w)], []


@case
def stack(d: Draw) -> Any:
    a, b = d.n(), d.n()
    at = d.n(0, 1, -1)
    return (lambda x, y: torch.stack([x, y], at)), [d.x(a, b), d.x(a, b)], []


@case
def unbind(d: Draw) -> Any:
    return (lambda x: x.unbind(0)[1] + x[:, 0].sum()), [d.x(2, d.n(), d.n())], []


@case
def pad(d: Draw) -> Any:
    value = d.n(0, 1)
    return (lambda x: F.pad(x, (1, 2), value=float(value))), [d.x(d.n(), d.n())], []


# along a dim --------------------------------------------------------------------------------------------------------------------


@case
def softmax(d: Draw) -> Any:
    at = d.n(0, 1, -1)
    f = d.data.draw(st.sampled_from([F.softmax, F.log_softmax]))
    return (lambda x: f(x, at)), [d.x(d.n(), d.n(), d.n())], []


@case
def cumsum(d: Draw) -> Any:
    at, plus = d.n(0, 1), d.yes()
    return (lambda x: x.cumsum(at) if plus else x.cumprod(at)), [d.x(d.n(), d.n())], []


@case
def flip(d: Draw) -> Any:
    at = d.n(0, 1)
    return (lambda x: x.flip(at)), [d.x(d.n(), d.n())], []


@case
def roll(d: Draw) -> Any:
    at = d.n(0, 1)
    return (lambda x: x.roll(1, at)), [d.x(d.n(), d.n())], []


@case
def topk(d: Draw) -> Any:
    at = d.n(0, -1)
    return (lambda x: x.topk(2, at)), [d.x(d.n(4, 6), d.n(4, 6))], []


@case
def sort(d: Draw) -> Any:
    at, values = d.n(0, -1), d.yes()
    return (lambda x: x.sort(dim=at).values if values else x.argsort(dim=at)), [d.x(d.n(), d.n())], []


@case
def triangle(d: Draw) -> Any:
    return torch.tril, [d.x(d.n(), d.n(), d.n())], []


@case
def solve_triangular(d: Draw) -> Any:
    b, n, k = d.n(), d.n(), d.n()

    def run(a: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(a.tril(-1), y, upper=False, unitriangular=True)

    return run, [d.x(b, n, n), d.x(b, n, k)], []


@case
def glu(d: Draw) -> Any:
    return (lambda x: F.glu(x, -1)), [d.x(d.n(), 2 * d.n())], []


# reductions ---------------------------------------------------------------------------------------------------------------------


@case
def sum_(d: Draw) -> Any:
    at = d.data.draw(st.sampled_from([0, -1, (0, 1), None]))
    keepdim = d.yes()
    return (lambda x: x.sum() if at is None else x.sum(at, keepdim=keepdim)), [d.x(d.n(), d.n(), d.n())], []


@case
def mean(d: Draw) -> Any:
    at = d.data.draw(st.sampled_from([0, -1, (0, 1)]))
    keepdim = d.yes()
    return (lambda x: x.mean(at, keepdim=keepdim)), [d.x(d.n(), d.n(), d.n())], []


@case
def statistic(d: Draw) -> Any:
    at = d.n(0, 1)
    f = d.data.draw(st.sampled_from([torch.var, torch.std, torch.norm]))
    return (lambda x: f(x, dim=at)), [d.x(d.n(), d.n())], []


@case
def extreme(d: Draw) -> Any:
    at = d.n(0, 1)
    return (lambda x: (x.amax(at), x.max(at).values, x.argmin(at), torch.logsumexp(x, at))), [d.x(d.n(), d.n())], []


@case
def own_rms(d: Draw) -> Any:
    """A hand-written norm: shardable across tokens, a partial statistic across the width."""
    return (lambda x, w: w * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)), [d.x(d.n(), 4, (n := d.n())), d.x(n)], []


@case
def layer_norm(d: Draw) -> Any:
    n = d.n()
    return (lambda x, w, b: F.layer_norm(x, (n,), w, b)), [d.x(d.n(), d.n(), n), d.x(n), d.x(n)], []


@case
def rms_norm(d: Draw) -> Any:
    n = d.n()
    return (lambda x, w: F.rms_norm(x, (n,), w)), [d.x(d.n(), d.n(), n), d.x(n)], []


@case
def weight_norm(d: Draw) -> Any:
    """Rows (or columns) are parallel, what the norm is over crosses the ranks."""
    dim, shape = d.n(-1, 0, 1, 2), (d.n(), d.n(), d.n())
    return (lambda v, g: torch._weight_norm(v, g, dim)), [d.x(*shape), torch.norm_except_dim(d.x(*shape), 2, dim)], []


@case
def group_norm(d: Draw) -> Any:
    g, n = d.n(), d.n(1, 2, 4)
    return (lambda x, w, b: F.group_norm(x, g, w, b)), [d.x(2, g * n, d.n()), d.x(g * n), d.x(g * n)], []


# lookups ------------------------------------------------------------------------------------------------------------------------


@case
def embedding(d: Draw) -> Any:
    v = d.n(4, 8)
    ids = [d.ids(v, d.n(), d.n())]
    whole = d.yes()
    return (lambda w, i: F.embedding(i, w)), [d.x(v, d.n()), *([] if whole else ids)], ids if whole else []


@case
def index_select(d: Draw) -> Any:
    n, at = d.n(4, 6), d.n(0, 1)
    ids = [d.ids(n, 4)]
    whole = d.yes()
    return (lambda x, i: x.index_select(at, i)), [d.x(n, n), *([] if whole else ids)], ids if whole else []


@case
def index(d: Draw) -> Any:
    n = d.n(4, 6)
    form = d.n(0, 1, 2, 3)
    forms = (lambda x, i: x[i], lambda x, i: x[:, i], lambda x, i: x[i, :, i], lambda x, i: x[:, i, i])
    return forms[form], [d.x(n, n, n)], [d.ids(n, 2, d.n()) if d.yes() else d.ids(n, 2)]


@case
def gather(d: Draw) -> Any:
    m, n, k, at = d.n(), d.n(), d.n(), d.n(0, 1)
    ids = [d.ids(m, k, n) if at == 0 else d.ids(n, m, k)]
    whole = d.yes()
    return (lambda x, i: x.gather(at, i)), [d.x(m, n), *([] if whole else ids)], ids if whole else []


@case
def index_add(d: Draw) -> Any:
    m, n, k = d.n(), d.n(), d.n()
    return (lambda x, y, i: x.index_add(0, i, y)), [d.x(m, n), d.x(k, n)], [d.ids(m, k)]


@case
def scatter(d: Draw) -> Any:
    m, n = d.n(), d.n()
    add = d.yes()
    return (
        (lambda x, y, i: x.scatter_add(0, i, y) if add else x.scatter(0, i, y)),
        [d.x(m, n), d.x(2, n)],
        [torch.stack([torch.arange(2)] * n, 1)],
    )


@case
def one_hot(d: Draw) -> Any:
    return (lambda i: F.one_hot(i, 5)), [d.ids(5, d.n(), d.n())], []


@case
def constants(d: Draw) -> Any:
    m, n = d.n(), d.n()
    return (lambda x: x * torch.full((m, n), 2.0) + torch.zeros_like(x) + x.new_ones(n)), [d.x(m, n)], []


@case
def moe(d: Draw) -> Any:
    """Experts as one batched product, weighted and summed."""
    e, t, h, i = d.n(), d.n(), d.n(), d.n()
    return (
        (lambda x, up, down, r: torch.einsum("te,eth->th", r, torch.bmm(F.relu(torch.bmm(x.expand(e, t, h), up)), down))),
        [d.x(1, t, h), d.x(e, h, i), d.x(e, i, h), d.x(t, e)],
        [],
    )


@pytest.mark.parametrize("name", halved(CASES))
def test_claims(name: str) -> None:
    accepted = 0

    @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        nonlocal accepted
        draw = Draw(data)
        subject = Subject.of(Operator(*CASES[name](draw)), name in LOUD)
        accepted += subject.claims()
        subject.check_linear(draw.generator)

    examples()
    assert accepted, "no claim was ever accepted: the test would pass for any rule"


# negative controls --------------------------------------------------------------------------------------------------------------


def no_demands(rule: Rule) -> Rule:
    def lie(context: Context, node: Node) -> None:
        rule(context, node)
        context.meaning.demands.clear()

    return lie


def no_sites(rule: Rule) -> Rule:
    def lie(context: Context, node: Node) -> None:
        rule(context, node)
        context.meaning.blocked.clear()

    return lie


def no_contracts(rule: Rule) -> Rule:
    def lie(context: Context, node: Node) -> None:
        rule(context, node)
        context.meaning.contracts.clear()

    return lie


def too_linear(rule: Rule) -> Rule:
    def lie(context: Context, node: Node) -> None:
        rule(context, node)
        context.linear([next(node.inputs())])

    return lie


LIES: list[tuple[str, str, Callable[[Rule], Rule]]] = [
    ("linear", "linear", no_contracts),
    ("bilinear", "bilinear", no_contracts),
    ("conv_transpose", "conv_transpose1d", no_contracts),
    ("grouped_convolution", "conv1d", no_sites),
    ("grouped_conv_transpose", "conv_transpose2d", no_sites),
    ("softmax", "softmax", no_sites),
    ("cumsum", "cumsum", no_sites),
    ("flip", "flip", no_sites),
    ("sort", "sort", no_sites),
    ("roll", "roll", no_sites),
    ("view", "view", no_demands),
    ("expand", "expand", no_demands),
    ("split", "split_with_sizes", no_demands),
    ("group_norm", "group_norm", no_sites),
    ("attention", "scaled_dot_product_attention", no_sites),
    ("embedding", "embedding", no_contracts),
    ("index_select", "index_select", no_sites),
    ("layer_norm", "layer_norm", no_contracts),
    ("weight_norm", "_weight_norm", no_contracts),
    ("mean", "mean", no_contracts),
    ("softmax", "softmax", too_linear),
    ("maximum", "maximum", too_linear),
    ("add_number", "add", too_linear),
    ("glu", "glu", lambda rule: pointwise),
    ("triangle", "tril", lambda rule: pointwise),
    ("prelu", "prelu", lambda rule: pointwise),
]


@pytest.mark.parametrize(("name", "operator", "lie"), LIES, ids=[f"{n}-{lie.__name__.strip('<>')}" for n, _, lie in LIES])
def test_a_wrong_rule_is_caught(name: str, operator: str, lie: Callable[[Rule], Rule], monkeypatch: pytest.MonkeyPatch) -> None:
    entered = OPERATORS.get(operator)
    give_rule(monkeypatch, operator, lie(entered.rule if entered else pointwise))

    @settings(
        max_examples=30,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def examples(data: st.DataObject) -> None:
        draw = Draw(data)
        subject = Subject.of(Operator(*CASES[name](draw)))
        subject.claims()
        subject.check_linear(draw.generator)

    with pytest.raises((AssertionError, RuntimeError, ValueError, IndexError)):
        examples()


def test_an_operator_without_a_rule_is_opaque() -> None:
    subject = Subject.of(Operator(torch.linalg.det, [torch.randn(4, 4, dtype=torch.float64)], []))
    assert subject.candidates()[0]
    assert subject.claims() == 0


def test_atoms_are_told_apart() -> None:
    """The checker sees two dims as two atoms: heads and width of a viewed tensor."""
    subject = Subject.of(Operator(lambda x: tree_map(torch.relu, x.view(4, 2, 6)), [torch.randn(4, 12, dtype=torch.float64)], []))
    singles, _ = subject.candidates()
    assert len(singles) == 3
    assert all(subject.check(cut) for cut in singles)


@pytest.mark.parametrize(
    ("function", "harmless"),
    [
        (lambda x, w: torch.relu(x) @ w, True),
        (lambda x, w: torch.sigmoid(x) @ w, True),  # zero rows of w
        (lambda x, w: torch.sigmoid(x).sum(-1), False),
        (lambda x, w: (x * x).sum(-1), True),
        (lambda x, w: x.exp().sum(-1), False),
        (lambda x, w: (x - x.exp()).sum(-1), False),
        (lambda x, w: x.log() @ w, False),  # -inf times zero
        (lambda x, w: (x / x.abs()) @ w, False),
        (lambda x, w: x.sort(0).indices[-1].to(x.dtype).sum(-1), False),  # where zeros came from is not zero
        (lambda x, w: x.sqrt() @ w, False),  # finite, but its derivative is not
        (lambda x, w: F.prelu(x, w[:, 0]).sum(-1), True),
        (lambda x, w: F.prelu(x.exp(), w[:, 0]).sum(-1), False),
    ],
)
def test_padding_that_would_be_summed_is_refused(function: Callable[..., Tensor], harmless: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.rand(4, 3, dtype=torch.float64) + 0.5, torch.rand(3, 4, dtype=torch.float64)
    subject = Subject.of(Operator(function, [x, w], []))
    width = Partition(next(iter(subject.space.leaves[next(iter(subject.space.graph.params.values())).id][-1])), TP)
    assert width.size == 3
    assert subject.check(width) == harmless
    wrong = torch.isnan(function(torch.zeros(2, 1), torch.zeros(1, 1))).any() or function(torch.zeros(2, 1), torch.zeros(1, 1)).any()
    if wrong and not harmless:  # the refusal is no caution: without it the sum is wrong
        monkeypatch.setattr(sys.modules[__name__], "padding_conflict", lambda *_: None)
        with pytest.raises(AssertionError):
            subject.check(width)


# end to end ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tp", [2, 3, 4])
@pytest.mark.parametrize("slopes", [1, 6])
def test_prelu_between_products(tp: int, slopes: int) -> None:
    """Equal on two ranks, on three, and on four, where two channels of eight are padding."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Conv1d(4, 6, 3), nn.PReLU(slopes), nn.Conv1d(6, 4, 3))

    found = assert_equivalent(model, tp=tp, inputs=torch.randn(2, 4, 9), steps=2)
    assert set(found.plan.replicated) == {"2.bias", *(["1.weight"] if slopes == 1 else [])}
