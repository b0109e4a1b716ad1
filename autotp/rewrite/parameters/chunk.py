"""Finds which entries of a tp rank's part one data-parallel rank holds.

FSDP cuts the part that a tp rank holds of a parameter, padding and copies included, into chunks along one dim, as `torch.chunk` does:
every chunk has ``ceil(n / ranks)`` indices, but for the last ones, which may have fewer or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autotp.plan.layout import Interval


@dataclass(frozen=True, slots=True)
class Chunk:
    """Indices ``[start, stop)`` of `dim` of a tensor with `size` of them; the first of `ranks` chunks has `most`."""

    dim: int
    start: int
    stop: int
    size: int
    most: int
    ranks: int

    @classmethod
    def of(cls, dim: int, size: int, rank: int, ranks: int) -> Chunk:
        """Returns the chunk of `rank` where `size` indices of `dim` are cut over `ranks`."""
        most = -(-size // ranks)
        return cls(dim, min(rank * most, size), min((rank + 1) * most, size), size, most, ranks)

    def shape(self, part: Sequence[int]) -> tuple[int, ...]:
        """Returns the shape of this chunk of a tp rank's part of shape `part`."""
        return (*part[: self.dim], self.stop - self.start, *part[self.dim + 1 :])

    def cut(self, part: Tensor) -> Tensor:
        """Returns this chunk of a tp rank's part: a view."""
        return part.narrow(self.dim, self.start, self.stop - self.start)

    def padded(self, chunk: Tensor) -> Tensor:
        """Returns `chunk` with `most` indices: collectives take tensors of one shape."""
        missing = self.most - chunk.shape[self.dim]
        if not missing:
            return chunk
        shape = list(chunk.shape)
        shape[self.dim] = self.most
        full = chunk.new_zeros(shape)
        full.narrow(self.dim, 0, chunk.shape[self.dim]).copy_(chunk)
        return full

    def joined(self, chunks: Sequence[Tensor]) -> Tensor:
        """Returns the tp rank's part from all ranks' padded chunks, in rank order."""
        return torch.cat(list(chunks), self.dim).narrow(self.dim, 0, self.size)

    def within(self, runs: Sequence[Interval]) -> tuple[Interval, ...]:
        """Returns those of `runs`, or the parts of them, that are in this chunk, counted from its start."""
        inside = ((max(a, self.start) - self.start, min(b, self.stop) - self.start) for a, b in runs)
        return tuple((a, b) for a, b in inside if b > a)


def held_of(chunk: Chunk | None, dim: int | None, runs: Sequence[Interval]) -> Sequence[Interval]:
    """Returns those of `runs` of dim `dim` of a tp rank's part that the rank with `chunk` of it holds (None: all), counted there."""
    return runs if chunk is None or chunk.dim != dim else chunk.within(runs)
