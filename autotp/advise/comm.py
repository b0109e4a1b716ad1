"""A group of ranks without processes, which notes each collective that it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from autotp.plan.conversions import CollectiveKind
from autotp.rewrite.collectives.comm import DryComm


@dataclass(frozen=True, slots=True)
class Message:
    """A collective, and the bytes of its result on each rank; of a reduce-scatter, those of what each rank gives."""

    kind: CollectiveKind
    bytes: int


class CountedComm(DryComm):
    """Rank 0 of `mesh`: an all-reduce changes nothing, as one in place does; the others allocate their results.

    messages: collectives alike, counted.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        super().__init__(mesh.size())
        self.mesh = mesh
        self.messages: Counter[Message] = Counter()

    def _count(self, kind: CollectiveKind, tensor: Tensor, times: int = 1) -> None:
        self.messages[Message(kind, tensor.numel() * tensor.element_size() * times)] += 1

    def all_reduce_(self, tensor: Tensor) -> Tensor:
        self._count(CollectiveKind.ALL_REDUCE, tensor)
        return tensor

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.all_reduce_(tensor.clone(memory_format=torch.contiguous_format))

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        self._count(CollectiveKind.ALL_GATHER, tensor, self.size)
        return [torch.empty_like(tensor) for _ in range(self.size)]

    def all_gather_rows(self, rows: Tensor) -> Tensor:
        self._count(CollectiveKind.ALL_GATHER, rows, self.size)
        return rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])

    def reduce_scatter(self, rows: Tensor) -> Tensor:
        self._count(CollectiveKind.REDUCE_SCATTER, rows)
        return rows.new_empty(rows.shape[0] // self.size, *rows.shape[1:])

    def all_to_all(self, rows: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        result = rows.new_empty(sum(received), *rows.shape[1:])
        self._count(CollectiveKind.ALL_TO_ALL, result)
        return result

    def take_messages(self) -> Counter[Message]:
        """Returns the collectives since the last call."""
        done, self.messages = self.messages, Counter()
        return done
