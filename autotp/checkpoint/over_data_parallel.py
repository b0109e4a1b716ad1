"""Brings the shards that FSDP made of a parallel model together on the first data-parallel ranks, which then write alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp.agree import agree
from autotp.rewrite.parameters.data_parallel import DataParallelDTensor
from autotp.rewrite.parameters.fsdp import reshard


@dataclass(frozen=True, slots=True)
class TpParts:
    """The tp rank's part of each parameter (by id) that FSDP manages, in main memory; only where `first`.

    groups: this rank's groups along the data-parallel dims of the mesh. first: this rank is the first in each.
    """

    parts: Mapping[int, Tensor]
    groups: tuple[dist.ProcessGroup, ...] = ()
    first: bool = True


@torch.no_grad()
def gather_tp_parts(model: nn.Module) -> TpParts:
    """Gathers the tp parts of the parameters that FSDP manages. Collective over the data-parallel ranks; nothing without FSDP."""
    reshard(model)
    # Where there is one tp rank, FSDP makes ordinary DTensors.
    managed = [p for p in model.parameters() if isinstance(p, DTensor) and (type(p) is DTensor or isinstance(p, DataParallelDTensor))]
    if not managed:
        return TpParts({})
    mesh = managed[0]._spec.mesh
    dims = range(mesh.ndim - isinstance(managed[0], DataParallelDTensor))
    groups = tuple(mesh.get_group(dim) for dim in dims)
    first = all(mesh.get_local_rank(dim) == 0 for dim in dims)
    parts: dict[int, Tensor] = {}
    for p in managed:
        part = (p._tp_part() if isinstance(p, DataParallelDTensor) else p.full_tensor()).detach()
        if first:
            parts[id(p)] = part.cpu()
    return TpParts(parts, groups, first)


def agree_along(groups: Sequence[dist.ProcessGroup], work: Callable[[], None]) -> None:
    """Run `work` on every rank; if it raises on any rank of the mesh whose dims have these `groups`, raise on all. Collective."""
    if groups:
        agree(groups[0], lambda: agree_along(groups[1:], work))
    else:
        work()
