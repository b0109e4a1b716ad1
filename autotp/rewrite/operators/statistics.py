"""Selects the entries that a statistic over a sharded dim counts: every index once, no padding.

Ranks hold equal parts, but not every entry of a part counts. Padding stands for no index, and a copy of a shared index is counted
where its owner is. So `Σ x` over the full dim is the sum over the ranks of `Σ owned(x)`, and the number of entries is that of the
full dim. Masked entries get no gradient through the statistic.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from autotp.errors import PlanError
from autotp.plan.expressions import Expr, notation, size
from autotp.plan.layout import owned
from autotp.rewrite.collectives.comm import Comm


class Across:
    """The sharded dim `dim` (negative: from the right) of a statistic's input, in the layout `expr`.

    Without an expression the parts are those of an even cut: every entry counts, and there are `tp` times as many.
    """

    __slots__ = ("_masks", "comm", "dim", "everything", "expr", "local")

    def __init__(self, comm: Comm, expr: Expr | None = None, dim: int = -1) -> None:
        if dim >= 0:
            raise PlanError(f"the dim that a statistic crosses is counted from the right, got {dim}")
        self.comm, self.expr, self.dim = comm, expr, dim
        self.local = 0 if expr is None else size(expr, comm.size)
        self.everything = expr is None or owned(expr, comm.rank, comm.size) == ((0, self.local),)
        self._masks: dict[torch.device, Tensor] = {}

    def count(self, x: Tensor, axes: Sequence[int]) -> int:
        """Counts the entries of the whole tensor that a statistic of `x` (this rank's part) over `axes` covers.

        Raises:
            PlanError: the sharded dim is none of `axes`, or has another size than the layout's part.
        """
        count = self.comm.size if self.expr is None else size(self.expr)
        crossed = self.dim % x.ndim if x.ndim >= -self.dim else None
        for d in axes:
            if self.expr is None or d % x.ndim != crossed:
                count *= x.shape[d]
            elif x.shape[d] != self.local:
                raise PlanError(f"a statistic of a tensor of shape {tuple(x.shape)}: the plan wants {self.local} entries in dim {d}")
        if self.expr is not None and crossed not in [d % x.ndim for d in axes]:
            raise PlanError(f"a statistic over dims {tuple(axes)} does not cross dim {self.dim}, which holds {notation(self.expr)}")
        return count

    def owned(self, x: Tensor) -> Tensor:
        """Returns `x` with zeros at the entries that are not counted here; `x` itself where all are."""
        return x if self.everything else x.masked_fill(self._ignored(x.device), 0)

    def _ignored(self, device: torch.device) -> Tensor:
        mask = self._masks.get(device)
        if mask is None:
            assert self.expr is not None
            with torch.inference_mode(False):  # autograd may save it later
                mask = torch.ones(self.local, dtype=torch.bool, device=device)
                for a, b in owned(self.expr, self.comm.rank, self.comm.size):
                    mask[a:b] = False
                mask = mask.view(-1, *[1] * (-self.dim - 1))
            if type(mask) is Tensor:  # a fake one is for this call only
                self._masks[device] = mask
        return mask
