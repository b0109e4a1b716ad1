"""Finds views that put axes of parameters together with lengths otherwise in other calls than in the traced ones.

``q.view(b, heads, t, d)`` of a q of [b, t, heads · d] makes heads for a t of 1 and mixes tokens and heads for any other. A view keeps
the order of elements. So it treats an axis alike for all lengths where the factors of both shapes, with the lengths, are the same ones
in the same order. The sizes of the result are known for other lengths by the expressions that the code made them of. What is behind a
size of 1 is followed from the arguments of the model (`Length`), as no axis does that.

Where the origin of a size is not known, it is taken to be what the other sizes leave of the elements, and so are several sizes together
that stand side by side. Where this says nothing, the view is taken to be as it was traced.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from autotp.axes.analysis import Axes
from autotp.axes.atoms import Atom, flat, leaf_atoms
from autotp.axes.operators.table import arg, dim_of, dims_of
from autotp.planner.dims_of_one import Leaves, ones_before
from autotp.planner.partition import Atoms
from autotp.planner.staying_ones import Sure
from autotp.planner.varying import positions
from autotp.trace.graph import Node, Origin, Value
from autotp.trace.ints import IntExpr, Literal, SizeRef, evaluate, leaves

#: How many times as long as the traced ones the lengths are that are tried: each alone, and each another one.
TIMES = (2, 3)
APART = (2, 3, 5, 7, 11, 13)
_VIEWS = frozenset(("view", "_unsafe_view", "reshape", "view_copy", "flatten", "unflatten"))


@dataclass(frozen=True, slots=True)
class Length:
    """A dim that is of size 1 in the traced call and may be longer in others: of an argument of the model, or what code left of one."""

    value: int
    dim: int


Factor = Atom | Length
#: The factors of each dim of a value, lengths of 1 with their places.
Form = tuple[tuple[Factor, ...], ...]
Sizes = Mapping[Factor, int]


def regrouped(
    axes: Axes,
    by_dim: Leaves,
    of_parameters: Atoms,
    activations: Collection[int],
    long: Atoms,
    sure: Sure,
    kept: Mapping[Atom, Atom],
) -> Mapping[int, Atoms]:
    """Returns node → the axes of parameters that its view mixes with lengths in other calls. `activations`: values made of arguments;
    `long`: see `free_lengths`; `kept`: see `kept_lengths`.
    """
    forms = _Forms(axes, by_dim, of_parameters, long, sure, kept)
    found: dict[int, Atoms] = {}
    for node in axes.graph.nodes:
        for v in node.inputs():
            if v.origin is Origin.INPUT and 1 in v.shape:
                forms.given(v)
        if node.opname in _VIEWS and len(node.outputs) == 1:
            if node.args[0].id in activations and (mixed := forms.view(node)):
                found[node.index] = mixed
        elif any(v.id in activations for v in node.outputs):
            forms.passes(node)
    return found


class _Forms:
    """The factors of the values' dims, as far as they are followed."""

    def __init__(self, axes: Axes, by_dim: Leaves, of_parameters: Atoms, long: Atoms, sure: Sure, kept: Mapping[Atom, Atom]) -> None:
        self.axes, self.by_dim, self.of_parameters, self.long, self.sure = axes, by_dim, of_parameters, long, sure
        self.known: dict[int, Form] = {}  # of values with lengths of 1
        self.same: dict[Factor, Factor] = dict(kept.items())  # lengths that are one: the first of them

    def of(self, key: int) -> Form:
        """Returns the factors of each dim of a value."""
        return self.known.get(key) or tuple(tuple(flat(d)) for d in self.axes.dims.get(key, ()))

    def given(self, v: Value) -> None:
        """Notes the dims of size 1 of an argument of the model."""
        if v.id not in self.known:
            self.known[v.id] = tuple(d or (Length(v.id, i),) for i, d in enumerate(self.of(v.id)))

    def passes(self, node: Node) -> None:
        """Follows the dims of a node that is no view. One of size 1 that need not stay so is a length."""
        brought = [v for v in node.inputs() if v.id in self.known]
        for out in node.outputs:
            rank = len(out.shape)
            form = list(self.of(out.id))
            for v in brought:
                own = self.known[v.id]
                hidden = {_atoms(d): d for d in own if len(d) > 1 and len(_atoms(d)) < len(d)}
                form = [dim if n == 1 else hidden.get(_atoms(dim), dim) for dim, n in zip(form, out.shape, strict=True)]
            if node.opname == "squeeze" and len(brought) == 1:
                form = self._squeezed(node, brought[0])
            for i, n in enumerate(out.shape):
                if n != 1 or self.sure.of(out, i - rank, given=False):
                    continue
                for v in brought:
                    for d in ones_before(self.by_dim, node, v, out, i - rank):
                        form[i] = self._joined(form[i], self.known[v.id][d])
                form[i] = form[i] or (Length(out.id, i),)
            if any(len(_atoms(d)) < len(d) for d in form):
                self.known[out.id] = tuple(form)

    def _squeezed(self, node: Node, v: Value) -> list[tuple[Factor, ...]]:
        """Keeps a length whose dim is gone beside the dim before it: the order of elements is the same, and other calls have that dim."""
        gone = [d for d in dims_of(arg(node, 1, "dim"), v) if v.shape[d] == 1]
        found: list[tuple[Factor, ...]] = [()]
        for i, dim in enumerate(self.known[v.id]):
            if i in gone:
                found[-1] = (*found[-1], *dim)
            else:
                found.append(dim)
        return [(*found[0], *found[1]), *found[2:]] if len(found) > 1 else found[1:]

    def _joined(self, here: tuple[Factor, ...], there: tuple[Factor, ...]) -> tuple[Factor, ...]:
        """Two dims of size 1 that meet are one length."""
        if here and there:
            a, b = (self._first(d[0]) for d in (here, there))
            if isinstance(a, Length) and isinstance(b, Length) and a != b:
                self.same[b] = a
        return here or there

    def _first(self, factor: Factor) -> Factor:
        while factor in self.same:
            factor = self.same[factor]
        return factor

    def view(self, node: Node) -> Atoms:
        """Follows the dims through a view, and returns the axes of parameters that it mixes with lengths."""
        x, out = node.args[0], node.outputs[0]
        source = self.of(x.id)
        factors = [f for d in source for f in d]
        target: list[tuple[Factor, ...]] = [tuple(flat(d)) for d in self.axes.dims[out.id]]
        if _atoms(factors) != tuple(a for d in target for a in d):
            return frozenset()  # the traced call mixes them already
        wanted = self._wanted(node, x, out)
        said = {a for d, expr in zip(target, wanted, strict=True) if _plain(expr) and len(d) == 1 for a in leaf_atoms(_atoms(d))}
        lengths = sorted({self._first(f) for f in factors for f in self._lengths_in(f) if f not in said}, key=_order)
        if not lengths:
            return frozenset()
        runs = self._runs(wanted, target, set(lengths))
        together = [wanted[run.start] if len(run) == 1 else None for run in runs]
        tried: list[tuple[list[int], list[int], Sizes]] = [(list(x.shape), [prod(out.shape[i] for i in run) for run in runs], {})]
        unknown: set[Factor] = set()
        for sizes in _other(lengths):
            before = [self._size(d, sizes) for d in source]
            after = self._after(together, prod(before), sizes, set(lengths))
            if after is None:
                unknown.update(sizes)
            elif after:
                tried.append((before, after, sizes))
        form, mixed = [tuple(f for i in run for f in target[i]) for run in runs], self._before(source, unknown)
        for left, right in _groups([t[0] for t in tried], [t[1] for t in tried]):
            rest = [f for d in source[left.start : left.stop] for f in d]
            placed = self._placed(rest, [[t[1][j] for t in tried] for j in right], [t[2] for t in tried])
            regrouped = len(left) > 1 and not unknown.isdisjoint(self._first(a) for f in rest for a in self._lengths_in(f))
            if placed is None or regrouped:
                mixed |= {a for f in rest if isinstance(f, Atom) for a in leaf_atoms([f])} & self.of_parameters
            else:
                form[right.start : right.stop] = placed
        for run, dim in zip(runs, form, strict=True):
            if len(run) == 1:
                target[run.start] = dim or self._said_length(wanted[run.start])
        if any(len(_atoms(d)) < len(d) for d in target):
            self.known[out.id] = tuple(target)
        return frozenset(mixed)

    def _runs(
        self, wanted: Sequence[IntExpr | tuple[Factor, ...] | None], target: Sequence[tuple[Factor, ...]], lengths: set[Factor]
    ) -> list[range]:
        """Returns the dims of a view's result: as one those side by side of unknown sizes and without axes of parameters."""
        unknown = [
            (each is None or (not isinstance(each, tuple) and self._of_others(each, lengths)))
            and self.of_parameters.isdisjoint(leaf_atoms(_atoms(dim)))
            for each, dim in zip(wanted, target, strict=True)
        ]
        found: list[range] = []
        for i, is_unknown in enumerate(unknown):
            if i and is_unknown and unknown[i - 1]:
                found[-1] = range(found[-1].start, i + 1)
            else:
                found.append(range(i, i + 1))
        return found

    def _said_length(self, size: IntExpr | tuple[Factor, ...] | None) -> tuple[Factor, ...]:
        """Returns the length of 1 that a dim of size 1 has, where the code gives that of another value as its size."""
        dim = self._dim(size) if isinstance(size, SizeRef) else ()
        return dim if len(dim) == 1 and isinstance(dim[0], Length) else ()

    def _before(self, source: Form, unknown: set[Factor]) -> set[Atom]:
        """Returns the axes of parameters in dims before a length of 1 that other calls put somewhere else, nobody knows where."""
        ones = [i for i, d in enumerate(source) if any(isinstance(f, Length) and self._first(f) in unknown for f in d)]
        return {a for d in source[: max(ones, default=0)] for a in leaf_atoms(_atoms(d))} & self.of_parameters

    def _placed(self, rest: list[Factor], wanted: list[list[int]], tried: list[Sizes]) -> list[tuple[Factor, ...]] | None:
        """Deals factors, in order, to dims of the sizes that are wanted in each call; None where they don't make these in all."""
        at, found = 0, []
        for sizes in wanted:
            need, part = list(sizes), []
            while any(n != 1 for n in need):
                if at == len(rest):
                    return None
                own = [self._size((rest[at],), call) for call in tried]
                if any(m == 0 or n % m for n, m in zip(need, own, strict=True)):
                    return None
                need = [n // m for n, m in zip(need, own, strict=True)]
                part.append(rest[at])
                at += 1
            found.append(tuple(part))
        return found if all(self._size(rest[at:], call) == 1 for call in tried) else None

    def _lengths_in(self, factor: Factor) -> Iterator[Factor]:
        if isinstance(factor, Length) or factor in self.long:
            yield factor
        else:
            yield from (a for a in leaf_atoms([factor]) if a in self.long)

    def _size(self, dim: Sequence[Factor], sizes: Sizes) -> int:
        size = 1
        for factor in dim:
            if isinstance(factor, Length):
                size *= sizes.get(self._first(factor), 1)
            elif factor.segments is None or factor in sizes:
                size *= sizes.get(self._first(factor), factor.size)
            else:
                size *= sum(self._size(flat(segment), sizes) for segment in factor.segments)
        return size

    def _wanted(self, node: Node, x: Value, out: Value) -> list[IntExpr | tuple[Factor, ...] | None]:
        """Returns for each dim of a view's result the number that the code gives, or factors, or None where it is not known."""
        source = self.of(x.id)
        if node.opname == "flatten":
            first, last = (dim_of(arg(node, i, name, default), x) for i, name, default in ((1, "start_dim", 0), (2, "end_dim", -1)))
            return [*source[:first], tuple(f for d in source[first : last + 1] for f in d), *source[last + 1 :]]
        if not node.ints and len(node.tensors) == 2:  # `view_as`, `reshape_as`
            other = self.of(node.tensors[1])
            if tuple(self._size(d, {}) for d in other) == out.shape:
                return list(other)
        sizes = list(arg(node, 2 if node.opname == "unflatten" else 1, "sizes" if node.opname == "unflatten" else "size"))
        found = [self._expr(node, n, i, len(sizes)) for i, n in enumerate(sizes)]
        if node.opname == "unflatten":
            d = dim_of(node.args[1], x)
            return [*source[:d], *found, *source[d + 1 :]]
        kept = next((i for i, (n, m) in enumerate(zip(x.shape, out.shape, strict=False)) if n != m), min(len(source), len(found)))
        # a 1 of unknown origin in the place of a dim of size 1 is that dim: `reshape(len(x), c, -1)`
        return [source[i] if e is None and i < kept and x.shape[i] == 1 else e for i, e in enumerate(found)]

    def _expr(self, node: Node, number: int, at: int, listed: int) -> IntExpr | None:
        exprs = {node.ints[p] for p in positions(node, number, at, listed)} if number != -1 else set()
        found = exprs.pop() if len(exprs) == 1 else None
        return None if found == Literal(1) else found  # `len(x)` of a batch of one has lost its origin

    def _after(
        self, wanted: Sequence[IntExpr | tuple[Factor, ...] | None], elements: int, sizes: Sizes, lengths: set[Factor]
    ) -> list[int] | None:
        """Returns the sizes of a view's result in a call; [] where there is no such call, None where more than one size is not known."""
        found: list[int] = []
        for each in wanted:
            if isinstance(each, tuple):
                found.append(self._size(each, sizes))
            else:
                value = None if each is None or self._of_others(each, lengths) else evaluate(each, lambda leaf: self._leaf(leaf, sizes))
                found.append(-1 if value is None else value)
        others = prod(n for n in found if n != -1)
        if found.count(-1) > 1:
            return None
        if others <= 0 or elements % others or (-1 not in found and others != elements):
            return []
        return [elements // others if n == -1 else n for n in found]

    def _of_others(self, expr: IntExpr, lengths: set[Factor]) -> bool:
        """True where a number is made of lengths that the tensor does not have: how they hang together is not known."""
        refs = (leaf for leaf in leaves(expr) if isinstance(leaf, SizeRef))
        return any(self._first(f) not in lengths for leaf in refs for factor in self._dim(leaf) for f in self._lengths_in(factor))

    def _dim(self, leaf: SizeRef) -> tuple[Factor, ...]:
        form = self.of(leaf.value_id)
        return form[leaf.dim] if 0 <= leaf.dim < len(form) else tuple(f for d in form for f in d)

    def _leaf(self, leaf: object, sizes: Sizes) -> int:
        if isinstance(leaf, SizeRef) and leaf.value_id in self.axes.dims:
            return self._size(self._dim(leaf), sizes)
        value: int = leaf.value  # type: ignore[attr-defined]
        return value


def _plain(expr: object) -> bool:
    """True for a number that no size is part of."""
    return expr is not None and not isinstance(expr, tuple) and not any(isinstance(leaf, SizeRef) for leaf in leaves(expr))  # type: ignore[arg-type]


def _atoms(dim: Sequence[Factor]) -> tuple[Atom, ...]:
    return tuple(f for f in dim if isinstance(f, Atom))


def _order(factor: Factor) -> tuple[int, int]:
    return (factor.value, factor.dim) if isinstance(factor, Length) else (-1, factor.id)


def _other(lengths: Sequence[Factor]) -> Iterator[Sizes]:
    """Yields lengths in the place of those that were traced."""

    def longer(factor: Factor, times: int) -> int:
        return times * (factor.size if isinstance(factor, Atom) else 1)

    for factor in lengths:
        yield from ({factor: longer(factor, n)} for n in TIMES)
    if len(lengths) > 1:
        yield {factor: longer(factor, APART[i % len(APART)]) for i, factor in enumerate(lengths)}


def _groups(before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> Iterator[tuple[range, range]]:
    """Yields the finest runs of dims of both shapes that hold as many elements as each other in every call."""
    i, j = len(before[0]), len(after[0])
    behind = [[tuple(prod(shape[k:]) for shape in shapes) for k in range(len(shapes[0]) + 1)] for shapes in (before, after)]
    for a in range(i - 1, -1, -1):
        stop = next((b for b in range(j, -1, -1) if behind[1][b] == behind[0][a]), None)
        stop = 0 if a == 0 else stop
        if stop is not None:
            yield range(a, i), range(stop, j)
            i, j = a, stop
    if i or j:
        yield range(i), range(j)
