"""Collects the ints and tensors of a Python call with their provenance, as the code wrote them."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from autotp.trace.ints import IntExpr, Life, origin_of
from autotp.trace.values import Values


def gather(tree: Any, ints: list[IntExpr], tensors: list[int], values: Values, life: Life) -> None:
    """Append the ints in `tree` with their provenance, and the value ids of its tensors (-1: none), each in order."""
    for item in tree:
        if isinstance(item, Tensor):
            known = values.known(item)
            tensors.append(known.id if known else -1)
        elif isinstance(item, int) and not isinstance(item, bool):
            ints.append(origin_of(item, life))
        elif isinstance(item, (tuple, list)):
            gather(item, ints, tensors, values, life)
        elif isinstance(item, slice):
            gather((item.start, item.stop, item.step), ints, tensors, values, life)
