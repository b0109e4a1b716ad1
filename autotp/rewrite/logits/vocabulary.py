"""Tells which entries of a vocabulary each rank holds: even slices in rank order, as DTensor's `Shard` cuts a dim."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import own


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """`size` entries over the ranks of `comm`, of which `mesh` is the tp mesh: each rank holds `each`, the last ones fewer or none."""

    size: int
    each: int
    comm: Comm
    mesh: DeviceMesh

    @property
    def start(self) -> int:
        """The first entry of this rank."""
        return min(self.comm.rank * self.each, self.size)

    @property
    def held(self) -> int:
        """How many entries this rank has."""
        return min(self.each, self.size - self.start)

    def __deepcopy__(self, memo: dict[int, Any]) -> Vocabulary:
        return self


@dataclass(frozen=True, slots=True)
class Along:
    """Splits `dim` of a tensor by a vocabulary, as `autotp.rewrite.collectives.split.Split` does by a layout."""

    dim: int
    vocabulary: Vocabulary

    def take(self, x: Tensor) -> Tensor:
        """[.., size, ..] → [.., held, ..], a view."""
        return x.narrow(self.dim, self.vocabulary.start, self.vocabulary.held)

    own = take

    @property
    def comm(self) -> Comm:
        """The group whose ranks hold the parts."""
        return self.vocabulary.comm

    def received(self, grad: Tensor) -> Tensor:
        """The part of a gradient: of a whole one, or of the DTensor that torch's own functions of DTensors give."""
        if isinstance(grad, DTensor):
            placed = (Shard(self.dim),)
            return (grad if grad.placements == placed else grad.redistribute(placements=placed)).to_local()
        return own(grad, self)

    def pad(self, x: Tensor) -> Tensor:
        """[.., held, ..] → [.., size, ..] with zeros where other ranks' parts are."""
        v = self.vocabulary
        return _padded(x, self.dim, v.start, v.size - v.start - v.held)

    def join(self, x: Tensor) -> Tensor:
        """[.., held, ..] of every rank → [.., size, ..]."""
        v = self.vocabulary
        sent = x.view(torch.uint8) if x.dtype is torch.bool else x  # not every backend sends truth values
        parts = v.comm.all_gather(_padded(sent, self.dim, 0, v.each - v.held))
        held = [part.narrow(self.dim, 0, max(0, min(v.each, v.size - r * v.each))) for r, part in enumerate(parts)]
        return torch.cat(held, self.dim).view(x.dtype)


def _padded(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    if not before and not after:
        return x
    return F.pad(x, [0, 0] * (x.ndim - 1 - dim % x.ndim) + [before, after])
