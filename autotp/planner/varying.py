"""Finds the axes of parameters that another call may size otherwise.

``positions[:, :x.shape[1]]`` takes as many rows as there are tokens. What it takes, and what it leaves, are axes of the parameter for
the traced length alone, and a rank keeps the rows of the plan for good. So none of the two is cut.

An axis is *settled* where a parameter's dim, or a number that no length is part of, says its size. A number of the code that is made
of other sizes is a length. It must not change, for another length, what the dim of a parameter is made of. A plain number may be a
length whose origin was lost (``len(x[0])``, ``int(n)``): where it cuts a dim, it does not settle an axis that arguments bring.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from autotp.axes.analysis import Axes, Demand
from autotp.axes.atoms import Atom, flat, leaf_atoms
from autotp.axes.operators.table import Is, is_a
from autotp.planner.kept_lengths import with_kept
from autotp.trace.graph import Node, Origin, Value
from autotp.trace.ints import AttrRef, IntExpr, Literal, SizeRef, evaluate, leaves

Atoms = frozenset[Atom]
#: How much longer than the traced ones the lengths are that are tried.
MORE = (1, 2, 5)


@dataclass(frozen=True, slots=True)
class Asked:
    """A number of the code that the size of dims of a value follows, as its code wrote it, in one or several expressions.

    all: it takes all of a dim, which may be longer, or nothing. axes: of the dims. sizes: the axes of the sizes that it is made of.
    plain: it is written in the code, or its origin is unknown, and it cuts the dim. sized: sizes of tensors are part of it.
    """

    node: Node
    demand: Demand
    exprs: tuple[IntExpr, ...]
    all: bool
    axes: Atoms
    sizes: Atoms
    plain: bool
    sized: bool


def varying(
    axes: Axes, asked: Sequence[Asked], given: Atoms, weights: Atoms, long: Atoms, kept: Mapping[Atom, Atom]
) -> Mapping[Atom, Node]:
    """Returns axes of parameters that the code sizes by a length, each with the node that does so. `asked`: see `asked_sizes`; `given`: see
    `given_axes`; `weights`: see `weight_axes`; `long`: see `free_lengths`; `kept`: see `kept_lengths`.
    """
    params = _dims_of_parameters(axes)
    free = given - _settled(params, asked, given, weights)
    dims_of: dict[Atom, list[Sequence[Atom]]] = {}
    for dim in params:
        for atom in leaf_atoms(dim):
            dims_of.setdefault(atom, []).append(dim)
    ones = any(1 in v.shape for n in axes.graph.nodes for v in n.inputs() if v.origin is Origin.INPUT)
    names = {v.id for v in axes.graph.params.values()}
    found: dict[Atom, Node] = {}
    for each in asked:
        cut = _cut_dim(axes, each)
        own = [a for a in (each.axes if cut is None else frozenset(leaf_atoms(cut))) if a in dims_of]
        if not own:
            continue
        lengths = (each.sizes | each.axes if each.plain else each.sizes) & free
        unknown = is_a(each.node, Is.CUTS) and _is_unknown(axes, each, given, names, ones)
        if each.demand in axes.meanings[each.node.index].counted:  # how many pieces
            lengths |= each.sizes & long
            unknown |= not all(any(True for _ in leaf_atoms(d)) for expr in each.exprs for d in _dims_in(axes, expr))
        if not lengths and not unknown:
            continue
        lengths = with_kept(lengths, kept)
        fixed = cut is not None and _size(cut, lengths, 1) == _size(cut, lengths, 0)
        wrong = unknown or fixed or each.all or not all(_follows(axes, each, lengths, more) for more in MORE)
        for dim in {id(d): d for a in own for d in dims_of[a]}.values():
            if wrong or _size(dim, lengths, 1) != _size(dim, lengths, 0):
                found.update((a, each.node) for a in leaf_atoms(dim) if a not in found)
    return found


def unsettled(axes: Axes, asked: Sequence[Asked], weights: Atoms) -> Atoms:
    """Returns those of the axes of weights that arguments bring whose size neither parameters nor numbers say."""
    return weights - _settled(_dims_of_parameters(axes), asked, weights, weights)


def written(asked: Sequence[Asked], params: Sequence[Sequence[Atom]] = (), pieces: Atoms = frozenset()) -> Atoms:
    """Returns the axes whose size numbers of the code say, and those dims of parameters. `pieces`: a number that says what several of these
    are together says each.
    """
    found = _settled(params, asked, frozenset(), frozenset())
    said = [*map(frozenset, map(leaf_atoms, params)), *(each.axes for each in asked if not each.all and each.sizes <= found)]
    while more := [atoms for atoms in said if not atoms <= found and atoms - found <= pieces]:
        found.update(*more)
    return frozenset(found)


def _dims_of_parameters(axes: Axes) -> list[Sequence[Atom]]:
    return [d for v in {v.id: v for v in axes.graph.params.values()}.values() for d in axes.dims.get(v.id, ())]


def positions(node: Node, number: int, at: int, listed: int) -> list[int]:
    """Returns the positions among a call's ints that may be int `number` of the ATen call (the `at`-th of a list of `listed`)."""
    values = [e.value for e in node.ints]
    if listed:
        sizes = next(
            (a for a in node.args if isinstance(a, (list, tuple)) and len(a) == listed and all(isinstance(x, int) for x in a)), None
        )
        if sizes is not None:
            runs = [i for i in range(len(values) - listed + 1) if values[i : i + listed] == list(sizes)]
            if runs:
                return [runs[-1] + at]
    return [i for i, v in enumerate(values) if v == number]


def asked_sizes(axes: Axes) -> list[Asked]:
    """Returns the numbers of the code that say sizes of dims."""
    return list(_asked(axes))


def _asked(axes: Axes) -> Iterator[Asked]:
    for node, meaning in zip(axes.graph.nodes, axes.meanings, strict=True):
        cuts = is_a(node, Is.CUTS)
        read = cuts and len(node.tensors) > 1  # a tensor is a number there (`x[:n]`)
        for demand in (*meaning.demands, *meaning.taken) if node.ints or read else ():
            exprs = tuple(node.ints[p] for p in positions(node, demand.number, demand.at, demand.listed))
            if exprs or read:
                plain = cuts and any(isinstance(expr, Literal) for expr in exprs)
                yield _of(axes, node, demand, exprs, demand in meaning.taken, plain)
        for demand in (*meaning.counted, *_unseen(axes, node)) if node.ints else ():
            exprs = tuple(e for e in node.ints if e.value == demand.number and any(isinstance(leaf, SizeRef) for leaf in leaves(e)))
            if exprs:
                yield _of(axes, node, demand, exprs, True, False)


def _of(axes: Axes, node: Node, demand: Demand, exprs: tuple[IntExpr, ...], all: bool, plain: bool) -> Asked:
    own = frozenset(a for dim in demand.dims for a in leaf_atoms(dim))
    sized = any(isinstance(leaf, SizeRef) for expr in exprs for leaf in leaves(expr))
    return Asked(node, demand, exprs, all, own, frozenset(a for expr in exprs for a in _atoms(axes, expr)), plain, sized)


def _unseen(axes: Axes, node: Node) -> Iterator[Demand]:
    """Yields the numbers that take all rows of a parameter (`table[:n]`): that is no operator, the result is the parameter."""
    if node.opname == "alias" and (x := node.args[0]).origin is Origin.PARAM:
        yield from (Demand(n, x.id, (dim,)) for n, dim in zip(x.shape, axes.dims.get(x.id, ()), strict=False))


def _cut_dim(axes: Axes, each: Asked) -> Sequence[Atom] | None:
    """Returns the dim that a cut takes a piece of: a piece of one index has no axis."""
    if is_a(each.node, Is.CUTS) and not each.all:
        x, out = each.node.args[0], each.node.outputs[0]
        for dim, before, after in zip(axes.dims[x.id], x.shape, out.shape, strict=True):
            if before != after:
                return dim
    return None


def _is_unknown(axes: Axes, each: Asked, given: Atoms, params: set[int], ones: bool) -> bool:
    """True where a number that cuts was read from data, or is a size that no axis follows: that of one row, and one that was cut up into
    rows (`torch.cat([x[:, 1:], x[:, :1]], 1)`).

    A plain number that cuts a parameter itself may be made of what code reads from data, or one, where arguments have `ones`. One that
    cuts an activation may be what code read.
    """
    if not each.exprs:
        return True
    number, read = abs(each.demand.number), axes.graph.read
    if each.plain and each.node.args[0].origin is Origin.PARAM and (read or (ones and number == 1)):
        return True
    if each.plain and number > 1 and number in read:
        return True
    for leaf in (leaf for expr in each.exprs for leaf in leaves(expr)):
        if isinstance(leaf, SizeRef) and leaf.value_id not in params:
            rows = {a for dim in _dims_of(axes, leaf) for a in flat(dim)}
            if number == 1 or not rows or (rows <= given and not any(True for _ in _atoms(axes, leaf))):
                return True
    return False


def given_axes(axes: Axes) -> Atoms:
    """Returns the axes that arguments of the model bring, and those that operators make of them first (the patches of an image)."""
    found: set[Atom] = set()
    met: set[Atom] = set()
    activations: set[int] = set()
    seen: set[int] = set()
    for node in axes.graph.nodes:
        inputs = list(node.inputs())
        for v in inputs:
            if v.id not in seen:
                seen.add(v.id)
                own = _axes_of(axes, v)
                if v.origin is Origin.CONST:  # rows of indices, which nobody says the number of
                    found |= own - met
                met |= own
                if v.origin is Origin.INPUT:
                    found |= own
                    activations.add(v.id)
        made = any(v.id in activations for v in inputs)
        for v in node.outputs:
            seen.add(v.id)
            own = _axes_of(axes, v)
            if made:
                activations.add(v.id)
                joined = frozenset() if node.opname != "cat" else _joined(axes, node, v, found)
                found |= own - met - joined
            met |= own
    return frozenset(found)


def _joined(axes: Axes, node: Node, out: Value, given: set[Atom]) -> Atoms:
    """Returns the axes of a dim that `cat` makes of rows none of which is given: they may come from a buffer."""
    for i, (dim, size) in enumerate(zip(axes.dims.get(out.id, ()), out.shape, strict=True)):
        pieces = [v for v in node.inputs() if len(v.shape) == len(out.shape) and v.shape[i] != size]
        brought = {a for v in pieces for piece in axes.dims[v.id][i : i + 1] for a in (*flat(piece), *leaf_atoms(piece))}
        if pieces and not brought & given:
            return frozenset(flat(dim))
    return frozenset()


def _axes_of(axes: Axes, value: Value) -> set[Atom]:
    """Returns the axes of a value, and those that were cut up into rows."""
    found: set[Atom] = set()
    for dim in axes.dims.get(value.id, ()):
        found |= {a for a in leaf_atoms(dim) if a.size} | {a for a in flat(dim) if a.segments and not any(True for _ in leaf_atoms([a]))}
    return found


def _settled(params: Sequence[Sequence[Atom]], asked: Sequence[Asked], given: Atoms, weights: Atoms) -> set[Atom]:
    """Returns the axes whose size parameters and plain numbers say. A dim of a parameter that is an axis of `given` alone does not, unless
    it is one of `weights`.
    """
    longer = {each.axes for each in asked if each.all and (each.sized or each.plain) and each.axes & given}
    own = [frozenset(leaf_atoms(dim)) for dim in params]
    said = [atoms for atoms in own if atoms not in longer and not (len(atoms) == 1 and atoms <= given - weights)]
    found: set[Atom] = set()
    while True:
        before = len(found)
        for atoms in said:
            _settle(found, atoms)
        for each in asked:
            if not each.all and each.sizes <= found:
                _settle(found, each.axes, given if each.plain else frozenset())
        if len(found) == before:
            return found


def _settle(found: set[Atom], atoms: Atoms, given: Atoms = frozenset()) -> None:
    """Adds the one axis of a known size that is not settled, if it is not given."""
    rest = atoms - found
    if len(rest) == 1 and not rest & given:
        found |= rest


def _atoms(axes: Axes, expr: IntExpr) -> Iterator[Atom]:
    for dim in _dims_in(axes, expr):
        yield from leaf_atoms(dim)


def _dims_in(axes: Axes, expr: IntExpr) -> Iterator[Sequence[Atom]]:
    for leaf in leaves(expr):
        if isinstance(leaf, SizeRef):
            yield from _dims_of(axes, leaf)


def _dims_of(axes: Axes, leaf: SizeRef) -> Sequence[Sequence[Atom]]:
    dims = axes.dims.get(leaf.value_id, ())
    return dims[leaf.dim : leaf.dim + 1] if leaf.dim >= 0 else dims


def _follows(axes: Axes, each: Asked, lengths: Atoms, more: int) -> bool:
    """True where a number is the size of its dims for longer lengths, too."""

    def value(leaf: AttrRef | SizeRef) -> int:
        if isinstance(leaf, AttrRef) or leaf.value_id not in axes.dims:
            return leaf.value
        size = 1
        for dim in _dims_of(axes, leaf):
            size *= _size(dim, lengths, more)
        return size

    wanted = sum(_size(dim, lengths, more) for dim in each.demand.dims)
    return all(evaluate(expr, value) in (wanted, -wanted) for expr in each.exprs)


def _size(dim: Sequence[Atom], lengths: Atoms, more: int) -> int:
    """Returns the size of a dim where lengths are `more` than they were traced with."""
    size = 1
    for atom in flat(dim):
        if atom.segments is None:
            size *= atom.size + (more if atom in lengths else 0)
        else:
            size *= sum(_size(segment, lengths, more) for segment in atom.segments)
    return size
