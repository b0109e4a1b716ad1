"""Finds the lengths that convolutions keep: what comes out is as long as what goes in, for every length, and an axis of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from autotp.axes.analysis import Axes
from autotp.axes.atoms import Atom, flat
from autotp.axes.operators.table import Is, arg, is_a
from autotp.trace.graph import Node


def kept_lengths(axes: Axes) -> Mapping[Atom, Atom]:
    """Returns axes of results of convolutions → the axis of an argument that they are as long as."""
    found: dict[Atom, Atom] = {}
    for node in axes.graph.nodes:
        if is_a(node, Is.CONVOLUTION) and "transpose" not in node.opname:
            (before, kernel), out = node.args[:2], node.outputs[0]
            for i in range(len(kernel.shape) - 2):
                at = i + 2 - len(kernel.shape)  # counted from the last: there may be no batch
                here, there = (flat(axes.dims[v.id][at]) for v in (before, out))
                if _keeps(node, i) and len(here) == len(there) == 1 and here[0] != there[0]:
                    found[there[0]] = found.get(here[0], here[0])
    return found


def with_kept(lengths: Iterable[Atom], kept: Mapping[Atom, Atom]) -> frozenset[Atom]:
    """Adds the axes that are as long as one of `lengths`."""
    longer = {kept.get(a, a) for a in lengths}
    return frozenset(longer).union(lengths, (a for a, first in kept.items() if first in longer))


def _keeps(node: Node, i: int) -> bool:
    """True where the padding of the `i`-th dim makes up for the kernel, at a stride of 1."""

    def number(at: int, name: str, default: int) -> object:
        found = arg(node, at, name, default)
        return found[i if len(found) > 1 else 0] if isinstance(found, (list, tuple)) and found else found

    stride, padding, dilation = (number(at, name, n) for at, name, n in ((3, "stride", 1), (4, "padding", 0), (5, "dilation", 1)))
    if stride != 1 or not isinstance(dilation, int):
        return False
    return padding == "same" or (isinstance(padding, int) and 2 * padding == dilation * (node.args[1].shape[2 + i] - 1))
