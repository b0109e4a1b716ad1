"""Runs the few collectives of a rewritten model.

`all_reduce_` sums a tensor that the caller owns, in place where that is cheapest. `all_reduce` leaves its argument alone. Both
return the sum. Eager code uses plain c10d (4 µs a call, functional collectives cost 76 µs). Code being compiled uses functional
collectives, so that a forward stays one graph. So does code under a dispatch mode: the mode may keep a tensor that it got
(selective activation checkpointing does), and that tensor must not be changed afterwards.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from autotp.rewrite.collectives.copy_cache import CopyMemo
from autotp.rewrite.transforms import refuse_transforms

_modes = torch._C._len_torch_dispatch_stack


def keeps_results() -> bool:
    """True where a dispatch mode gets results: no result of an operator may be changed in place then."""
    return bool(_modes())


class Comm(Protocol):
    """The interface of a tensor-parallel group, from one rank."""

    rank: int
    size: int
    memo: CopyMemo

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sums a contiguous tensor, owned by the caller, over the ranks; use the returned tensor."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums over the ranks into a fresh contiguous tensor; `tensor` keeps its values."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns every rank's tensor, in rank order."""

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Writes rank 0's values into `tensor`."""


class GroupComm:
    """Runs collectives over a process group."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.name: str = group.group_name
        self.memo = CopyMemo()

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupComm:
        return self

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor
        if is_dynamo_compiling() or _modes():
            return self._functional_sum(tensor)
        refuse_transforms()
        dist.all_reduce(tensor, group=self.group)
        return tensor

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self.size > 1 and (is_dynamo_compiling() or _modes()):
            return self._functional_sum(tensor)
        return self.all_reduce_(tensor.clone(memory_format=torch.contiguous_format))

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        if self.size == 1:
            return [tensor]
        tensor = tensor.contiguous()
        if is_dynamo_compiling() or _modes():
            op = torch.ops._c10d_functional
            out = op.wait_tensor(op.all_gather_into_tensor(tensor.reshape(1, -1), self.size, self.name))
            return [part.reshape(tensor.shape) for part in out.unbind(0)]
        refuse_transforms()
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        dist.all_gather(parts, tensor, group=self.group)
        return parts

    def broadcast_(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            refuse_transforms()
            dist.broadcast(tensor, group=self.group, group_src=0)
        return tensor

    def _functional_sum(self, tensor: Tensor) -> Tensor:
        op = torch.ops._c10d_functional
        summed: Tensor = op.wait_tensor(op.all_reduce(tensor.contiguous(), "sum", self.name))
        return summed


class DryComm:
    """Stands in for a group of `size` without one: shapes are right, values are this rank's own. Runs on fake tensors."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size = size
        self.rank = rank
        self.memo = CopyMemo()

    def __deepcopy__(self, memo: dict[int, Any]) -> DryComm:
        return self

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return self.all_reduce(tensor)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor] * self.size

    def broadcast_(self, tensor: Tensor) -> Tensor:
        return tensor
