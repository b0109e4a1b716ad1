"""Finds products that are whole in a plan although their weights could be cut: those between two whole activations.

Patch embeddings, convolutions that make an image smaller between stages, and projections of a condition (the shifts and scales of a
diffusion transformer) return the width of the model, with which regions end. No region is around them, so their rows could
only be cut as that width is, everywhere. But they can be cut alone: y = w x is the concatenation of the ranks' rows,

    y = [w_1 x | … | w_tp x],

so each rank keeps some rows, the argument is copied (its gradient summed) and the result gathered where the module returns. The axis
ends at that boundary: what leaves the module has fresh dims (`autotp.axes.operators.pseudo.crossing`). That costs a gather for each
call. So it is done for weights that would otherwise make a rank hold noticeably more than its even share.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from math import prod

from autotp.axes.analysis import Meaning
from autotp.axes.operators.table import Is, arg, is_a
from autotp.plan.layout import Layout
from autotp.planner.assemble import Draft
from autotp.planner.partition import Atoms
from autotp.planner.placements import NONE, GraphIndex, Labels
from autotp.planner.repeats import with_copies
from autotp.trace.graph import Node, Origin, Pseudo, Value

#: A weight is cut alone where keeping it whole adds at least this much to an even share of the model.
LEAST = 0.02


def lone_products(draft: Draft, tp: int, elements: int, wanted: Mapping[int, Layout]) -> dict[str, int]:
    """Returns path of a module → the dim of its result, counted from the last, that its product makes and that is to end there.

    Args:
        draft: the plan without them. tp: number of ranks. elements: of all parameters of the model.
        wanted: layouts that are asked for, by the id of the parameter's value; a weight that is asked to be cut may be of any size.
    """
    space, labels = draft.space, draft.choice.labels
    products = _products(space)
    ending, added = _ending(space, labels), _added(space, {w.id: space.leaves[w.id][_rows(n)] for n, w, _ in products.values()})
    found: dict[str, int] = {}
    for path, (node, weight, result) in products.items():
        rows = space.leaves[weight.id][_rows(node)]
        if any(labels.of(v) or v.id in labels.partial for v in (*node.inputs(), *node.outputs, result)):
            continue
        asked = wanted.get(weight.id)
        if asked is not None and asked.dim is not None and rows & ending:
            found[path] = _dim(node, weight)
        elif asked is None and rows & (ending | added):
            copies = len(with_copies([(path, None)], space.graph.repeats))
            if copies * prod(weight.shape) * (tp - 1) >= LEAST * elements:
                found[path] = _dim(node, weight)
    return found


def _ending(space: GraphIndex, labels: Labels) -> Atoms:
    """Returns the axes of the sums that regions end with; a latent that a region only begins with is none of them."""
    return NONE.union(*(space.carried.get(key, NONE) for key in labels.born))


def _added(space: GraphIndex, rows: Mapping[int, Atoms]) -> Atoms:
    """Returns the axes that several products make and that sums of activations have: the width of residual networks without a region.

    rows: the axes that each weight gives to its product.
    """
    sums = (o.id for n, m in zip(space.graph.nodes, space.axes.meanings, strict=True) if _adds(space, m) for o in n.outputs)
    makers = Counter(atom for atoms in rows.values() for atom in atoms)
    return NONE.union(*(space.carried.get(key, NONE) for key in sums)) & {atom for atom, times in makers.items() if times > 1}


def _adds(space: GraphIndex, meaning: Meaning) -> bool:
    """True for a sum of two activations that have gradients."""
    return any(sum(key in space.flows and space.parameter_of(key) is None for key in group) > 1 for group in meaning.linear)


def _products(space: GraphIndex) -> dict[str, tuple[Node, Value, Value]]:
    """Returns path → (product, weight, result) of the modules whose code is one product with a weight of their own."""
    inside: dict[str, list[Node]] = {}
    leaving: dict[str, list[Node]] = {}
    for node in space.graph.nodes:
        if node.op is Pseudo.EXIT and node.slot is not None:
            leaving.setdefault(node.slot[0], []).append(node)
        elif node.op is not Pseudo.ENTER:
            inside.setdefault(node.module, []).append(node)
    parents = {path.rpartition(".")[0] for path in inside}
    found: dict[str, tuple[Node, Value, Value]] = {}
    for path, nodes in inside.items():
        exits = leaving.get(path, [])
        first, weight = nodes[0], _weight(nodes[0])
        if weight is None or path in parents or len(exits) != len(nodes) or any(e.slot != (path, ()) for e in exits):
            continue
        if all(_weight(n) is weight and n.op is first.op for n in nodes) and _only(space, weight, path, [*_results(nodes, exits)]):
            found[path] = first, weight, exits[0].outputs[0]
    return found


def _results(nodes: list[Node], exits: list[Node]) -> Iterator[bool]:
    for node, leaving in zip(nodes, exits, strict=True):
        yield leaving.args[0] is node.outputs[0]


def _only(space: GraphIndex, weight: Value, path: str, returned: list[bool]) -> bool:
    """True where nothing else reads the weight, and the module returns its products."""
    return all(returned) and all(space.graph.nodes[i].module == path for i in space.users.get(weight.id, ()))


def _weight(node: Node) -> Value | None:
    """Returns the weight of a product of a whole activation with a parameter, None for other nodes and convolutions in groups."""
    if isinstance(node.op, Pseudo) or not (node.opname == "linear" or is_a(node, Is.CONVOLUTION)):
        return None
    weight, groups = node.args[1], arg(node, 6, "groups", 1) if is_a(node, Is.CONVOLUTION) else 1
    return weight if isinstance(weight, Value) and weight.origin is Origin.PARAM and groups == 1 else None


def _rows(node: Node) -> int:
    """Returns the dim of a product's weight that its result has."""
    return 1 if node.opname.startswith("conv_transpose") else 0


def _dim(node: Node, weight: Value) -> int:
    """Returns the dim of a product's result that counts the rows of its weight: the last, or the channels before the positions."""
    return -1 if not is_a(node, Is.CONVOLUTION) else 1 - len(weight.shape)
