"""One dim of a tensor cut over the ranks: take a part, put the parts together, pad a part with zeros.

All index runs are computed once, when the plan is applied. A dim of size 1 that stands for a larger one (it broadcasts)
carries nothing and is left as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotp.errors import PlanError
from autotp.plan.layout import Expr, fitted, intervals, is_free, notation, size
from autotp.rewrite.comm import Comm


def split_of(dim: int, expr: Expr, comm: Comm) -> Split | FreeSplit:
    """The split of a dim; one for each length where the layout leaves the length open."""
    return FreeSplit(dim, expr, comm) if is_free(expr) else Split(dim, expr, comm)


class FreeSplit:
    """Splits of a dim whose major factor (a batch) has the size that comes, made once for each length."""

    __slots__ = ("_splits", "comm", "dim", "expr")

    def __init__(self, dim: int, expr: Expr, comm: Comm) -> None:
        self.dim, self.expr, self.comm = dim, expr, comm
        self._splits: dict[tuple[int, int], Split] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FreeSplit:
        return self

    def _for(self, x: Tensor, tp: int) -> Split:
        key = (x.shape[self.dim], tp)
        if key not in self._splits:
            expr = fitted(self.expr, *key)
            if expr is None:
                raise PlanError(f"dim {self.dim} of a tensor of shape {tuple(x.shape)} does not divide into {notation(self.expr)}")
            self._splits[key] = Split(self.dim, expr, self.comm)
        return self._splits[key]

    def take(self, x: Tensor) -> Tensor:
        """[.., full, ..] → [.., local, ..]; a dim of size 1 broadcasts and is left."""
        return x if x.shape[self.dim] == 1 else self._for(x, 1).take(x)

    def pad(self, x: Tensor) -> Tensor:
        """[.., local, ..] → [.., full, ..] with zeros where other ranks' parts are."""
        return self._for(x, self.comm.size).pad(x)

    def join(self, x: Tensor) -> Tensor:
        """[.., local, ..] → [.., full, ..] from all ranks."""
        return self._for(x, self.comm.size).join(x)


class Split:
    """`dim` of full size `full` in the layout `expr`; `runs` are this rank's, in local order."""

    __slots__ = ("comm", "dim", "expr", "full", "local", "order", "runs")

    def __init__(self, dim: int, expr: Expr, comm: Comm) -> None:
        self.dim, self.expr, self.comm = dim, expr, comm
        self.full, self.local = size(expr), size(expr, comm.size)
        self.runs = intervals(expr, comm.rank, comm.size)
        self.order = _order(expr, comm.size)

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return self

    def take(self, x: Tensor) -> Tensor:
        """[.., full, ..] → [.., local, ..]; a view where the part is one run.

        Raises:
            PlanError: if the dim has another size.
        """
        dim = self.dim
        length = x.shape[dim]
        if length != self.full:
            if length == 1:
                return x
            raise PlanError(
                f"cannot slice dim {dim} of a tensor of shape {tuple(x.shape)}: the plan wants {notation(self.expr)} of size "
                f"{self.full} there"
            )
        parts = [x.narrow(dim, a, b - a) for a, b in self.runs]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

    def pad(self, x: Tensor) -> Tensor:
        """[.., local, ..] → [.., full, ..] with zeros where other ranks' parts are."""
        dim = self.dim
        if x.shape[dim] == 1 != self.local:
            return x
        shape = list(x.shape)
        pieces: list[Tensor] = []
        end = start = 0
        for a, b in (*self.runs, (self.full, self.full)):
            if a > end:
                shape[dim] = a - end
                pieces.append(x.new_zeros(shape))
            if b > a:
                pieces.append(x.narrow(dim, start, b - a))
            start, end = start + b - a, b
        return torch.cat(pieces, dim)

    def join(self, x: Tensor) -> Tensor:
        """[.., local, ..] of every rank → [.., full, ..] in the model's order."""
        if x.shape[self.dim] == 1 != self.local:
            return x
        shards = self.comm.all_gather(x)
        if len(self.order) == len(shards) and self.full == self.local * len(shards):
            return torch.cat([shards[rank] for rank, _, _ in self.order], self.dim)
        return torch.cat([shards[rank].narrow(self.dim, start, length) for rank, start, length in self.order], self.dim)


def _order(expr: Expr, tp: int) -> tuple[tuple[int, int, int], ...]:
    """(rank, local start, length) of the pieces that make the full dim, in order; repeated runs are taken once."""
    runs = []
    for rank in range(tp):
        start = 0
        for a, b in intervals(expr, rank, tp):
            runs.append((a, b, rank, start))
            start += b - a
    pieces, end = [], 0
    for a, b, rank, start in sorted(runs):
        if b > end:
            pieces.append((rank, start + max(0, end - a), b - max(a, end)))
            end = b
    return tuple(pieces)
