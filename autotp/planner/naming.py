"""Names the axes for people, from the sites of an axis. No decision uses the names.

attention: a batch dim of a query·key product or of scaled_dot_product_attention. embedding and lm head: the rows of a looked-up
table and of a product whose result leaves the model whole. moe: the width of a parameter with an experts dim. conv: channels that
pass a depthwise convolution. mlp: everything between two products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count, pairwise

from autotp.axes.atoms import Atom, flat, leaf_atoms
from autotp.axes.operators.table import Is, is_a
from autotp.plan.expressions import Concat, Expr, Factor, Product
from autotp.planner.partition import Atoms, Partitions
from autotp.planner.placements import GraphIndex, SlotKey

#: Factors up to this size are called by it, as the 3 of a fused q, k, v.
SMALL = 4
_FACTOR = {"attention": "h", "mlp": "i", "moe": "i", "embedding": "v", "lm head": "v", "conv": "c"}


def pattern_of(space: GraphIndex, gathers: Mapping[SlotKey, Atoms], atom: Atom) -> str:
    """The pattern name of one sharded atom."""
    kinds: set[str] = set()
    softmaxed = False
    for node in space.meeting(atom):
        if is_a(node, Is.ATTENTION | Is.SOFTMAX) and node.index in space_softmax(space, node.index, atom):
            softmaxed = True
        elif is_a(node, Is.LOOKUP) and atom in space.leaves[node.args[0].id][0]:
            kinds.add("embedding")
        elif is_a(node, Is.CONVOLUTION):
            kinds.add("conv")
    if softmaxed:
        return "attention"
    if "embedding" in kinds:
        return "embedding"
    if any(atom in atoms for atoms in gathers.values()) and not _contracted(space, atom):
        return "lm head"
    if "conv" in kinds:
        return "conv"
    carriers = [v for v in space.graph.params.values() if atom in space.carried[v.id]]
    return "moe" if any(len(v.shape) == 3 for v in carriers) else "mlp"


def space_softmax(space: GraphIndex, index: int, atom: Atom) -> tuple[int, ...]:
    """(index,) where `atom` runs in parallel through a softmax or attention node."""
    node = space.graph.nodes[index]
    out = node.outputs[0]
    dims = space.leaves.get(out.id, ())
    return (index,) if any(atom in d for d in dims[:-1]) and len(out.shape) >= 3 else ()


def _contracted(space: GraphIndex, atom: Atom) -> bool:
    return any(atom in atoms for contracts in space.contracts for _, atoms in contracts)


class Namer:
    """Names of factors, by role: ``kv group h d`` of attention, ``i v c`` of other axes, ``e`` the model's width, small numbers as such.

    A name is told apart by a number only from others in the same parameter: every block's heads are ``h``.
    """

    def __init__(self, patterns: Mapping[Atom, str], cuts: Partitions, carried: Sequence[Sequence[Sequence[Atom]]] = ()) -> None:
        """`carried`: the dims of each parameter."""
        self.cuts = cuts
        self.patterns = dict(patterns)
        self.bases = _bases(self.patterns, cuts, carried)
        self.beside: dict[Atom, set[Atom]] = {}
        for dims in carried:
            inside = {atom for dim in dims for atom in _every(dim)}
            for atom in inside:
                self.beside.setdefault(atom, set()).update(inside - {atom})
        self.names: dict[Atom, str] = {}

    def name(self, atom: Atom) -> str:
        """The name of an atom."""
        if atom not in self.names:
            base = self.bases.get(atom) or (str(atom.size) if atom.size <= SMALL else "n")
            taken = {self.names.get(other) for other in self.beside.get(atom, ())}
            numbered = (f"{base}{'_' * base.isdigit()}{k}" for k in count(2))
            self.names[atom] = next(name for name in chain((base,), numbered) if name not in taken)
        return self.names[atom]

    def expr(self, dim: Iterable[Atom], on: Iterable[Atom]) -> Expr:
        """A dim as a layout expression, sharded on the atoms of `on`."""
        sharded = set(on)
        parts: list[Expr] = []
        for atom in flat(list(dim)):
            if atom.segments is None:
                parts.append(self._factor(atom, atom in sharded))
            elif not any(leaf in sharded for leaf in leaf_atoms([atom])):
                parts.append(Factor(self.name(atom), atom.size))
            else:
                parts.append(Concat(tuple(self.expr(s, sharded) for s in atom.segments)))
        if not parts:
            return Factor("1", 1)
        return parts[0] if len(parts) == 1 else Product(tuple(_merged(parts, self)))

    def _factor(self, atom: Atom, sharded: bool) -> Factor:
        cut = self.cuts.get(atom)
        if not sharded or cut is None:
            return Factor(self.name(atom), atom.size)
        of = "" if atom is cut.major else self.name(cut.major)
        return Factor(self.name(atom), atom.size, True, cut.pieces, of, cut.granule)


def _every(dim: Iterable[Atom]) -> Iterable[Atom]:
    """Atoms of a dim and of its concatenations' segments, concatenations too."""
    for atom in flat(list(dim)):
        yield atom
        for segment in atom.segments or ():
            yield from _every(segment)


def _runs(dim: Iterable[Atom]) -> Iterable[list[Atom]]:
    """The products inside a dim: itself, and those in the segments of its concatenations."""
    atoms = flat(list(dim))
    yield atoms
    for atom in atoms:
        for segment in atom.segments or ():
            yield from _runs(segment)


def _bases(patterns: Mapping[Atom, str], cuts: Partitions, carried: Sequence[Sequence[Sequence[Atom]]]) -> dict[Atom, str]:
    bases = {atom: _FACTOR.get(pattern, "n") for atom, pattern in patterns.items()}
    for cut in cuts.values():
        if cut.minor is not None:
            base = bases.get(cut.major, "n")
            bases[cut.major], bases[cut.minor] = ("kv", "group") if base in ("h", "kv") else (base, base + "_group")
    products = [run for dims in carried for dim in dims for run in _runs(dim)]
    # A small factor behind heads is the size of their groups where several weights have it (queries and their output), else a 3 of q, k, v.
    behind: dict[Atom, set[int]] = {}
    for number, dims in enumerate(carried):
        for run in (r for dim in dims for r in _runs(dim) if len(dims) > 1):
            for atom, after in pairwise(run):
                if bases.get(atom) == "h" and after not in bases:
                    behind.setdefault(after, set()).add(number)
    counted = {atom for atom, numbers in behind.items() if len(numbers) > 1}
    tails: dict[Atom, set[int]] = {}
    for run in products:
        for i, atom in enumerate(run):
            if bases.get(atom) in ("h", "kv", "group"):
                tails.setdefault(atom, set()).add(sum(a.size > SMALL or a in bases or a in counted for a in run[i + 1 :]))
    for run in products:  # a head axis that stands before one factor here and two there is that of key-value heads
        for atom, after, *rest in (run[i:] for i in range(len(run) - 1)):
            if bases.get(atom) == "h" and len(tails[atom]) > 1 and len([a for a in rest if a.size > SMALL]) >= 1 and after not in bases:
                bases[atom], bases[after] = "kv", "group"
    for run in products:
        heads = [i for i, atom in enumerate(run) if bases.get(atom) in ("h", "kv", "group")]
        for atom in run[heads[-1] + 1 :] if heads else ():
            if atom not in bases and atom.size > SMALL:
                bases[atom] = "d"
    widths: dict[Atom, int] = {}
    for dims in carried:
        for dim in dims:
            for atom in flat(list(dim)):
                if len(flat(list(dim))) == 1 and atom not in bases:
                    widths[atom] = widths.get(atom, 0) + 1
    if widths:
        bases[max(widths, key=lambda a: (widths[a], a.size))] = "e"
    return bases


def _merged(parts: list[Expr], namer: Namer) -> list[Expr]:
    """Neighbouring whole factors of one name (the parts of a head's width that a rotation tells apart) are one factor to a layout."""
    out: list[Expr] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, Factor) and isinstance(last, Factor) and last.name == part.name and not part.sharded and not last.sharded:
            out[-1] = Factor(last.name, last.size * part.size)
        else:
            out.append(part)
    return out
