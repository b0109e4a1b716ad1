"""Runs the few collectives of a rewritten model.

`all_reduce_` sums a tensor that the caller owns, in place where that is cheapest. `all_reduce` leaves its argument alone. Both
return the sum. Eager code uses plain c10d (4 µs a call, functional collectives cost 76 µs). Code being compiled uses functional
collectives, so that a forward stays one graph. So does code under a dispatch mode: the mode may keep a tensor that it got
(selective activation checkpointing does), and that tensor must not be changed afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.compiler import is_dynamo_compiling
from torch.distributed.device_mesh import DeviceMesh

from autotp.agree import raise_lost
from autotp.rewrite.collectives.copy_cache import CopyMemo
from autotp.rewrite.running import Running
from autotp.rewrite.transforms import refuse_transforms

_modes = torch._C._len_torch_dispatch_stack
# torch 2.13 gave them new names, and warns of the old ones
_gather_rows: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_scatter_rows: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def keeps_results() -> bool:
    """True where a dispatch mode gets results: no result of an operator may be changed in place then."""
    return bool(_modes())


#: Waits for a collective that has begun, and returns its result.
Waits = Callable[[], Tensor]


class Comm(Protocol):
    """The interface of a tensor-parallel group, from one rank."""

    rank: int
    size: int
    memo: CopyMemo
    running: Running
    mesh: DeviceMesh | None

    def ask(self) -> None:
        """Raises where this thread may not run collectives now."""

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        """Sums a contiguous tensor, owned by the caller, over the ranks; use the returned tensor."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sums over the ranks into a fresh contiguous tensor; `tensor` keeps its values."""

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns every rank's tensor, in rank order."""

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        """[n, ..] of every rank, equal n → [size · n, ..] in rank order."""

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        """Sums [size · n, ..] over the ranks → this rank's [n, ..]; `rows` keeps its values."""

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        """Rows for each rank in turn, `sent[i]` of them for rank i → those from each rank in turn, `received[i]` from rank i."""

    def begin_sum(self, tensor: Tensor) -> Waits:
        """Begins `all_reduce_`; the result is there when the returned function is called."""

    def begin_gather(self, rows: Tensor) -> Waits:
        """Begins `all_gather_rows`."""

    def begin_scatter(self, rows: Tensor) -> Waits:
        """Begins `reduce_scatter`."""

    def broadcast_(self, tensor: Tensor) -> Tensor:
        """Writes rank 0's values into `tensor`."""


class Watches(Protocol):
    """What `autotp.serve` puts on parameters."""

    def ask(self) -> None:
        """Raise where this thread may not run collectives now."""

    def watch(self, comm: GroupComm) -> None:
        """Have a group's collectives ask before they run."""


class GroupComm:
    """Runs collectives over a process group.

    mesh: the 1-D mesh of these ranks, where the model's own mesh is known.
    wire: the group that carries the tensors of this class: `group` itself, or one of the same ranks that `autotp.serve` puts in its place
        for a while.
    """

    def __init__(self, group: dist.ProcessGroup, mesh: DeviceMesh | None = None) -> None:
        self.mesh = mesh
        self.group = self.wire = group
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.name: str = group.group_name
        self.memo, self.running = CopyMemo(), Running()

    def __deepcopy__(self, memo: dict[int, Any]) -> GroupComm:
        return self

    def ask(self) -> None:
        """Raise where this thread may not run collectives now; `autotp.serve` puts another one in its place for a while."""

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        if self.size == 1:
            return tensor
        if is_dynamo_compiling() or _modes():
            return self._functional_sum(tensor)
        refuse_transforms()
        try:
            dist.all_reduce(tensor, group=self.wire)
        except (RuntimeError, ValueError) as error:
            raise_lost("all-reduce", self.rank, error)
            raise
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
        try:
            dist.all_gather(parts, tensor, group=self.wire)
        except (RuntimeError, ValueError) as error:
            raise_lost("all-gather", self.rank, error)
            raise
        return parts

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        if self.size == 1:
            return rows
        rows = rows.contiguous()
        if is_dynamo_compiling() or _modes():
            op = torch.ops._c10d_functional
            return op.wait_tensor(op.all_gather_into_tensor(rows, self.size, self.name))  # type: ignore[no-any-return]
        refuse_transforms()
        found = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        try:
            _gather_rows(found, rows, group=self.wire)
        except (RuntimeError, ValueError) as error:
            raise_lost("all-gather", self.rank, error)
            raise
        return found

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        if self.size == 1:
            return rows.clone()
        rows = rows.contiguous()
        if is_dynamo_compiling() or _modes():
            op = torch.ops._c10d_functional
            return op.wait_tensor(op.reduce_scatter_tensor(rows, "sum", self.size, self.name))  # type: ignore[no-any-return]
        refuse_transforms()
        found = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        try:
            _scatter_rows(found, rows, group=self.wire)
        except (RuntimeError, ValueError) as error:
            raise_lost("reduce-scatter", self.rank, error)
            raise
        return found

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        if self.size == 1:
            return rows.clone()
        rows = rows.contiguous()
        if is_dynamo_compiling() or _modes():
            op = torch.ops._c10d_functional
            return op.wait_tensor(op.all_to_all_single(rows, list(received), list(sent), self.name))  # type: ignore[no-any-return]
        refuse_transforms()
        found = rows.new_empty(sum(received), *rows.shape[1:])
        try:
            dist.all_to_all_single(found, rows, list(received), list(sent), group=self.wire)
        except (RuntimeError, ValueError) as error:
            raise_lost("all-to-all", self.rank, error)
            raise
        return found

    def begin_sum(self, tensor: Tensor) -> Waits:
        if not self._overlaps():
            return _done(self.all_reduce_(tensor))
        return self._begun(tensor, lambda: dist.all_reduce(tensor, group=self.wire, async_op=True), "all-reduce")

    def begin_gather(self, rows: Tensor) -> Waits:
        if not self._overlaps():
            return _done(self.all_gather_rows(rows))
        rows = rows.contiguous()
        found = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        return self._begun(found, lambda: _gather_rows(found, rows, group=self.wire, async_op=True), "all-gather")

    def begin_scatter(self, rows: Tensor) -> Waits:
        if not self._overlaps():
            return _done(self.reduce_scatter(rows))
        rows = rows.contiguous()
        found = rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])
        return self._begun(found, lambda: _scatter_rows(found, rows, group=self.wire, async_op=True), "reduce-scatter")

    def _overlaps(self) -> bool:
        """True where a collective may run beside other work: not in modes that get results, nor past a server's guard."""
        if self.size == 1 or is_dynamo_compiling() or _modes() or "all_reduce_" in self.__dict__:
            return False
        refuse_transforms()
        return True

    def _begun(self, found: Tensor, begin: Callable[[], Any], name: str) -> Waits:
        try:
            work = begin()
        except (RuntimeError, ValueError) as error:
            raise_lost(name, self.rank, error)
            raise

        def wait() -> Tensor:
            try:
                if work is not None:
                    work.wait()
            except (RuntimeError, ValueError) as error:
                raise_lost(name, self.rank, error)
                raise
            return found

        return wait

    def broadcast_(self, tensor: Tensor) -> Tensor:
        if self.size > 1:
            refuse_transforms()
            try:
                dist.broadcast(tensor, group=self.wire, group_src=0)
            except (RuntimeError, ValueError) as error:
                raise_lost("broadcast", self.rank, error)
                raise
        return tensor

    def _functional_sum(self, tensor: Tensor) -> Tensor:
        op = torch.ops._c10d_functional
        summed: Tensor = op.wait_tensor(op.all_reduce(tensor.contiguous(), "sum", self.name))
        return summed


def _done(tensor: Tensor) -> Waits:
    return lambda: tensor


class DryComm:
    """Stands in for a group of `size` without one: shapes are right, values are this rank's own. Runs on fake tensors."""

    def __init__(self, size: int, rank: int = 0) -> None:
        self.size = size
        self.rank = rank
        self.mesh: DeviceMesh | None = None
        self.memo, self.running = CopyMemo(), Running()

    def __deepcopy__(self, memo: dict[int, Any]) -> DryComm:
        return self

    def ask(self) -> None:
        """Anybody may."""

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        return self.all_reduce(tensor)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.clone()

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        return [tensor] * self.size

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        return torch.cat([rows] * self.size)

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        return rows.chunk(self.size)[self.rank].clone()

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        return rows.new_zeros(sum(received), *rows.shape[1:])

    def begin_sum(self, tensor: Tensor) -> Waits:
        return _done(self.all_reduce_(tensor))

    def begin_gather(self, rows: Tensor) -> Waits:
        return _done(self.all_gather_rows(rows))

    def begin_scatter(self, rows: Tensor) -> Waits:
        return _done(self.reduce_scatter(rows))

    def broadcast_(self, tensor: Tensor) -> Tensor:
        return tensor
