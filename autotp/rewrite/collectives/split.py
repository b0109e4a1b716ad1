"""Splits one dim of a tensor over the ranks and joins it again, by two pairs of maps, each the other's gradient:

    take  [full] → [local]    the part with its copies of shared indices; padding repeats the last index, so that a padded head
                              gets the values of a real one (a finite mask, a slope), and is a constant to gradients
    pad   [local] → [full]    the part where it belongs, zeros elsewhere; copies of one index add up, padding is dropped
    join  [local]s → [full]   each index from its owner: a shared one is taken once, padding is dropped
    own   [full] → [local]    the owned entries, zero where another copy is the owner and in padding

All index runs are computed once, when the plan is applied. A dim of size 1 that stands for a larger one (it broadcasts)
carries nothing and is left as it is.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from autotp.errors import PlanError
from autotp.plan import layout
from autotp.plan.expressions import Expr, fitted, is_free, notation, size
from autotp.plan.layout import owned_runs, owners, runs
from autotp.rewrite.collectives.comm import Comm

#: What the place says that gets a tensor of another size.
OTHER_PATH = (
    "gets a tensor that no traced call gave it, a rank's part perhaps. Pass example_inputs of a call that takes this path (as many steps "
    "or chunks, say) to parallelize as well (a list of several calls)"
)


class OtherSize(PlanError):
    """A tensor has another size than the plan knows; whoever converts it says where."""


class Dealing(Protocol):
    """The four maps of one dim; see the module."""

    def take(self, x: Tensor) -> Tensor:
        """[.., full, ..] → [.., local, ..]."""

    def pad(self, x: Tensor) -> Tensor:
        """[.., local, ..] → [.., full, ..], zeros elsewhere."""

    def join(self, x: Tensor) -> Tensor:
        """[.., local, ..] of every rank → [.., full, ..]."""

    def own(self, x: Tensor) -> Tensor:
        """[.., full, ..] → [.., local, ..], zero where another rank is the owner."""


def split_of(dim: int, expr: Expr, comm: Comm) -> Split | FreeSplit:
    """Returns the split of a dim; one for each length where the layout leaves the length open."""
    return FreeSplit(dim, expr, comm) if is_free(expr) else Split(dim, expr, comm)


class FreeSplit:
    """Splits a dim whose major factor (a batch) may have any size; the split is made once for each length."""

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

    def own(self, x: Tensor) -> Tensor:
        """[.., full, ..] → [.., local, ..], zero at entries that this rank does not own."""
        return x if x.shape[self.dim] == 1 else self._for(x, 1).own(x)


class Split:
    """Splits `dim` of full size `full` by the layout `expr`; `runs` and `owned` are this rank's, in local order."""

    __slots__ = ("comm", "dim", "distinct", "expr", "full", "local", "order", "owned", "runs")

    def __init__(self, dim: int, expr: Expr, comm: Comm) -> None:
        self.dim, self.expr, self.comm = dim, expr, comm
        self.full, self.local = size(expr), size(expr, comm.size)
        self.runs = runs(expr, comm.rank, comm.size)
        self.owned = owned_runs(expr, comm.rank, comm.size)
        self.order = owners(expr, comm.size)
        real = [run for run in self.runs if run[0] >= 0]
        self.distinct = all(before[1] <= after[0] for before, after in pairwise(real))

    def __deepcopy__(self, memo: dict[int, Any]) -> Split:
        return self

    def take(self, x: Tensor) -> Tensor:
        """[.., full, ..] → [.., local, ..]; a view where the part is one run without padding.

        Raises:
            OtherSize: the dim has another size.
        """
        dim = self.dim
        length = x.shape[dim]
        if length != self.full:
            if length == 1:
                return x
            raise OtherSize(
                f"cannot slice dim {dim} of a tensor of shape {tuple(x.shape)}: the plan wants {notation(self.expr)} of size "
                f"{self.full} there"
            )
        parts = [x.narrow(dim, a, b - a) if a >= 0 else self._last(x, b - a) for a, b in self.runs]
        if not parts:  # the dim is empty, such as that of a batch without rows
            return x
        return parts[0] if len(parts) == 1 and self.runs[0][0] >= 0 else torch.cat(parts, dim)

    def _last(self, x: Tensor, times: int) -> Tensor:
        shape = list(x.shape)
        shape[self.dim] = times
        return x.narrow(self.dim, self.full - 1, 1).expand(shape)

    def own(self, x: Tensor) -> Tensor:
        """[.., full, ..] → [.., local, ..], zero in padding and where another copy of the index is the owner."""
        return x if x.shape[self.dim] == 1 != self.full else layout.take(x, self.dim, self.owned)

    def pad(self, x: Tensor) -> Tensor:
        """[.., local, ..] → [.., full, ..] with zeros where other ranks' parts are; copies of one index add up."""
        dim = self.dim
        if x.shape[dim] == 1 != self.local:
            return x
        if not self.distinct:
            return self._sum_copies(x)
        shape = list(x.shape)
        pieces: list[Tensor] = []
        end = start = 0
        for a, b in (*self.runs, (self.full, self.full)):
            if a < 0:
                start += b - a
                continue
            if a > end:
                shape[dim] = a - end
                pieces.append(x.new_zeros(shape))
            if b > a:
                pieces.append(x.narrow(dim, start, b - a))
            start, end = start + b - a, b
        return torch.cat(pieces, dim)

    def _sum_copies(self, x: Tensor) -> Tensor:
        shape = list(x.shape)
        shape[self.dim] = self.full
        full, start = x.new_zeros(shape), 0
        for a, b in self.runs:
            if a >= 0:
                full.narrow(self.dim, a, b - a).add_(x.narrow(self.dim, start, b - a))
            start += b - a
        return full

    def join(self, x: Tensor) -> Tensor:
        """[.., local, ..] of every rank → [.., full, ..] in the model's order."""
        if x.shape[self.dim] == 1 != self.local:
            return x
        shards = self.comm.all_gather(x)
        if len(self.order) == len(shards) and self.full == self.local * len(shards):
            return torch.cat([shards[rank] for rank, _, _ in self.order], self.dim)
        return torch.cat([shards[rank].narrow(self.dim, start, length) for rank, start, length in self.order], self.dim)
