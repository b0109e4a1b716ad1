"""A tensor as the matrix of its rows, which products of gradients take."""

from __future__ import annotations

from torch import Tensor


def matrix(x: Tensor) -> Tensor:
    """Returns [..., n] as [rows, n]; n may be 0, of which `reshape(-1, n)` knows no number of rows."""
    dims = x.dim()
    return x if dims == 2 else x.flatten(0, -2) if dims > 2 else x.unsqueeze(0)
