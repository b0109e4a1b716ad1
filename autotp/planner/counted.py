"""Finds dims of size 1 that meet a dim that is cut and may be longer in another call: a list of one entry, a slice of one row.

What of them comes from a dim of 1 of an argument alone is checked where the model is called (`autotp.planner.ones`). What the code
itself makes 1 stays so: a new dim, a dim that is kept where it is summed over, a 1 that is written in a view. What is left is counted,
and the operator that meets the cut dim checks it (`Site.ones`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from autotp.plan.spec import Site
from autotp.planner.ones import meets_a_cut
from autotp.planner.placements import GraphIndex, Labels
from autotp.planner.refusals import Refusal
from autotp.trace.graph import Origin, Place, Value, outside

Met = dict[tuple[str, Place], set[tuple[int, int]]]


def with_checks(space: GraphIndex, labels: Labels, sites: Mapping[str, list[Site]]) -> dict[str, list[Site]]:
    """Returns the sites of each module, with those added that check dims of size 1.

    Raises:
        Refusal: no call site can check one.
    """
    out = {module: list(listed) for module, listed in sites.items()}
    for (module, p), ones in _found(space, labels).items():
        listed = out.setdefault(module, [])
        at = next(
            (i for i, s in enumerate(listed) if (s.file, s.function, s.line, s.offset) == (p.file, p.function, p.line, p.offset)), None
        )
        if at is None:
            listed.append(Site(p.file, p.function, p.line, p.offset, ones=tuple(sorted(ones))))
        else:
            listed[at] = replace(listed[at], ones=tuple(sorted(ones)))
    return out


def _found(space: GraphIndex, labels: Labels) -> Met:
    """Returns what each place has to check; a tensor that is longer there in another traced call is not checked."""
    found: Met = {}
    for node, inputs in zip(space.graph.nodes, space.inputs, strict=True):
        for v in inputs:
            if v.origin in (Origin.PARAM, Origin.BUFFER, Origin.INPUT) or 1 not in v.shape:
                continue
            for dim in meets_a_cut(space, labels, node, v):
                if space.sure.of(v, dim):
                    continue
                at = [i for i, key in enumerate(node.tensors) if key == v.id]
                if node.place is None or outside(node) or space.graph.sealed(node) or not at:
                    raise Refusal(node, f"dim {dim} of {v} is 1 there, may be longer in another call, and no call site can check it")
                found.setdefault((node.module, node.place), set()).update((i, dim) for i in at)
    values = {v.id: v for n in space.graph.nodes for v in (*n.inputs(), *n.outputs)} if found else {}
    for node in space.graph.nodes if found else ():
        ones = found.get((node.module, node.place)) if node.place is not None else None
        if ones:
            ones -= {(i, d) for i, d in ones if i >= len(node.tensors) or not _is_one(values.get(node.tensors[i]), d)}
    return {place: ones for place, ones in found.items() if ones}


def _is_one(v: Value | None, dim: int) -> bool:
    return v is not None and -dim <= len(v.shape) and v.shape[dim] == 1
