"""Says when whole experts are the better choice, by bytes and by the sizes of products.

Per token, both ways move the same bytes: one sum of [T, H]. They differ in

    elements of a rank    ceil(E / tp) · (elements of an expert), or E · (elements of an expert cut to ceil(I / tp))
    its products          [n, H] × [H, I] for E / tp experts,     or [n, H] × [H, I / tp] for all E of them

A product of fewer columns than `NARROW`, the width of a tile of matrix products on GPUs, leaves a part of it idle. Whole experts are
taken below that, unless they cost a rank more memory. Where tokens prefer some experts, the rank that has those does more work than
with the width cut (`python -m benchmarks.experts`), so wide products stay as they are.
"""

from __future__ import annotations

from math import prod

from autotp.plan.experts import dealt_layout, own_params
from autotp.plan.spec import PlanSpec

#: Columns of a rank's part of an expert below which its products are narrow.
NARROW = 128


def why_width(plan: PlanSpec, path: str) -> str:
    """Says why the width of the experts of a module is cut rather than their number; "" where whole experts are the better choice."""
    own = own_params(plan, path)
    cut = sum(prod(p.layout.local_shape) for p in own.values())
    whole = sum(prod(dealt_layout(p.layout).local_shape) for p in own.values())
    if whole > cut:
        return f"whole experts would hold {whole / cut:.2f} times the elements on a rank"
    narrow = narrowest(plan, path)
    if narrow >= NARROW:
        return f"the products of a rank are {narrow} wide with the width cut, not below {NARROW}"
    return ""


def narrowest(plan: PlanSpec, path: str) -> int:
    """The width of a rank's products: the smallest sharded dim of the module's parameters."""
    layouts = [p.layout for p in own_params(plan, path).values()]
    return min(layout.local_shape[layout.dim] for layout in layouts if layout.dim is not None)
