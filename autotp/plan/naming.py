"""Names for axes: labels that people read, derived from the sites of an axis. Nothing rests on them.

attention: a batch dim of a query·key product or of scaled_dot_product_attention; embedding and lm head: the rows of a looked-up
table and of a product whose result leaves the model whole; moe: the width of a parameter with an experts dim; conv: channels
that pass a depthwise convolution; mlp: everything between two products.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from autotp.axes.atoms import Atom, flat
from autotp.plan.choose import Choice
from autotp.plan.labels import Space, leaf_atoms
from autotp.plan.layout import Concat, Expr, Factor, Product

_FACTOR = {"attention": "h", "mlp": "i", "moe": "i", "embedding": "v", "lm head": "v", "conv": "c"}


def pattern_of(space: Space, choice: Choice, atom: Atom) -> str:
    """The pattern name of one sharded atom."""
    kinds: set[str] = set()
    softmaxed = False
    for node in space.graph.nodes:
        if not any(atom in space.carried.get(v.id, ()) for v in (*space.inputs[node.index], *node.outputs)):
            continue
        name = node.opname
        if name in ("scaled_dot_product_attention", "softmax", "_softmax") and node.index in space_softmax(space, node.index, atom):
            softmaxed = True
        elif name == "embedding" and atom in space.leaves[node.args[0].id][0]:
            kinds.add("embedding")
        elif name.startswith("conv") and name[4:5].isdigit():
            kinds.add("conv")
    if softmaxed:
        return "attention"
    if "embedding" in kinds:
        return "embedding"
    if any(atom in atoms for atoms in choice.gathers.values()) and not _contracted(space, atom):
        return "lm head"
    if "conv" in kinds:
        return "conv"
    carriers = [v for v in space.graph.params.values() if atom in space.carried[v.id]]
    return "moe" if any(len(v.shape) == 3 for v in carriers) else "mlp"


def space_softmax(space: Space, index: int, atom: Atom) -> tuple[int, ...]:
    """(index,) where `atom` runs in parallel through a softmax or attention node."""
    node = space.graph.nodes[index]
    out = node.outputs[0]
    dims = space.leaves.get(out.id, ())
    return (index,) if any(atom in d for d in dims[:-1]) and len(out.shape) >= 3 else ()


def _contracted(space: Space, atom: Atom) -> bool:
    return any(atom in atoms for contracts in space.contracts for _, atoms in contracts)


@dataclass
class Namer:
    """Hands out factor names, unique among the atoms of one plan part, stable across its parameters."""

    patterns: Mapping[Atom, str]
    names: dict[Atom, str] = field(default_factory=dict)
    taken: dict[str, int] = field(default_factory=dict)

    def name(self, atom: Atom) -> str:
        """The name of an atom."""
        if atom not in self.names:
            base = _FACTOR.get(self.patterns.get(atom, ""), "d")
            count = self.taken.get(base, 0)
            self.taken[base] = count + 1
            self.names[atom] = base if count == 0 else f"{base}{count}"
        return self.names[atom]

    def expr(self, dim: Iterable[Atom], on: Iterable[Atom]) -> Expr:
        """A dim as a layout expression, sharded on the atoms of `on`."""
        sharded = set(on)
        parts: list[Expr] = []
        for atom in flat(list(dim)):
            if atom.segments is None:
                parts.append(Factor(self.name(atom), atom.size, atom in sharded))
            elif not any(leaf in sharded for leaf in leaf_atoms([atom])):
                parts.append(Factor(self.name(atom), atom.size))
            else:
                parts.append(Concat(tuple(self.expr(s, sharded) for s in atom.segments)))
        if not parts:
            return Factor("1", 1)
        return parts[0] if len(parts) == 1 else Product(tuple(_merged(parts, self)))


def _merged(parts: list[Expr], namer: Namer) -> list[Expr]:
    """Neighbouring whole factors are one factor to a layout."""
    out: list[Expr] = []
    for part in parts:
        last = out[-1] if out else None
        if isinstance(part, Factor) and isinstance(last, Factor) and not part.sharded and not last.sharded:
            out[-1] = Factor(f"{last.name}_{part.name}", last.size * part.size)
        else:
            out.append(part)
    return out
