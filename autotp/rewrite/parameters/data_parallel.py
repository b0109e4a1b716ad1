"""A parameter that data parallelism manages beside tensor parallelism is a `DataParallelDTensor`.

Its mesh has the data-parallel dims first and tp last. Of the part that a tp rank holds by the layout, a rank holds its `Chunk` where
FSDP shards it, and all of it where it is replicated. Everything that a `LayoutDTensor` does holds: numbers are those of the model's
tensor, in its order and shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from autotp.errors import AutoTPError
from autotp.plan.boxes import is_even
from autotp.plan.layout import Interval, Layout
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.parameters.chunk import Chunk, held_of
from autotp.rewrite.parameters.dcp import Sharded
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, new_dtensor
from autotp.rewrite.parameters.own_memory import refuse_sparse
from autotp.rewrite.parameters.placements import end_to_end

#: Set on the parameter that FSDP gathers for a forward, which is an ordinary `LayoutDTensor`.
MANAGED = "_autotp_managed"
#: Set on the parameter that FSDP replaced.
REPLACED = "_autotp_replaced"

#: What a user is told of hooks on parameters that FSDP manages.
NO_HOOKS = (
    "FSDP calls no hook that register_hook puts on a parameter: change p.grad in a hook of register_post_accumulate_grad_hook, set after "
    "fully_shard, or between backward and step"
)
#: What a user of DistributedDataParallel is told, which replicates plain tensors only.
NO_DDP = (
    'DistributedDataParallel does not take a tensor-parallel model: use replicate(model, mesh=mesh["dp"]) of '
    "torch.distributed._composable.replicate_with_fsdp, or autotp.fully_shard(model, mesh)"
)


def is_managed(tensor: Tensor) -> bool:
    """True for a parameter that FSDP has taken over, sharded or gathered."""
    return isinstance(tensor, DataParallelDTensor) or getattr(tensor, MANAGED, False)


def chunk_of(tensor: Tensor, layout: Layout) -> Chunk | None:
    """Returns the chunk of its tp rank's part that this rank holds of `tensor`; None for all of it.

    Where there is one tp rank, FSDP makes ordinary DTensors.
    """
    if isinstance(tensor, DataParallelDTensor):
        return tensor._chunk
    if type(tensor) is not DTensor or layout.tp > 1:
        return None
    mesh, shape = tensor._spec.mesh, tensor.shape
    found = [(i, p) for i, p in enumerate(tensor._spec.placements) if isinstance(p, Shard)]
    if len(found) != 1 or any(p.is_partial() for p in tensor._spec.placements):
        return None
    ((over, placed),) = found
    return Chunk.of(placed.dim, shape[placed.dim], mesh.get_local_rank(over), mesh.size(over))


class DataParallelDTensor(LayoutDTensor):
    """A tensor in the order of its layout over the last dim of its mesh, sharded or replicated over the dims before."""

    @property
    def _sharded_over(self) -> int | None:
        """The mesh dim over which the tp rank's part is cut in chunks; None: it is replicated."""
        found = [i for i, p in enumerate(self._spec.placements[:-1]) if not p.is_replicate()]
        if len(found) > 1:
            raise AutoTPError(f"a parameter is sharded over {len(found)} dims of the mesh {self._spec.mesh} beside tp: shard it over one")
        return found[0] if found else None

    @property
    def _chunk(self) -> Chunk | None:
        over = self._sharded_over
        if over is None:
            return None
        mesh, placed = self._spec.mesh, self._spec.placements[over]
        return Chunk.of(placed.dim, self._layout.local_shape[placed.dim], mesh.get_local_rank(over), mesh.size(over))  # type: ignore[attr-defined]

    @property
    def _is_whole(self) -> bool:
        return self._layout.dim is None and self._sharded_over is None

    @property
    def _is_even(self) -> bool:
        chunk = self._chunk
        return is_even(self._layout) and (chunk is None or chunk.dim != self._layout.dim or chunk.size % chunk.ranks == 0)

    def _placed(self, spec: Any, local: Tensor, layout: Layout) -> LayoutDTensor:
        return placed(spec, local, layout)

    def _become(self, other: LayoutDTensor) -> None:
        # FSDP gathers from the memory that it knows.
        mine, its = self._local_tensor, other._local_tensor
        if mine is not its and (mine.shape, mine.dtype, mine.device) == (its.shape, its.dtype, its.device):
            mine.copy_(its)
        else:
            super()._become(other)

    def _plain(self, local: Tensor | None = None) -> DTensor:
        local = self._local_tensor if local is None else local
        return new_dtensor(DTensor, local, end_to_end(self._spec, local), requires_grad=False)  # type: ignore[no-any-return]

    def _held_of(self, runs: Sequence[Interval]) -> Sequence[Interval]:
        return held_of(self._chunk, self._layout.dim, runs)

    def _owned(self) -> Tensor:
        local = self._local_tensor
        if not local.numel():  # norms of some orders want an entry
            return local.new_zeros([max(n, 1) for n in local.shape])
        return super()._owned()

    def _laid(self, whole: Tensor) -> Tensor:
        # It comes of the data of this rank. FSDP's gradients are means over the data-parallel ranks, and so is this one.
        if whole.layout is not torch.strided:
            refuse_sparse()
        mesh = self._spec.mesh
        for dim in range(mesh.ndim - 1):
            whole = GroupComm(mesh.get_group(dim)).all_reduce(whole) / mesh.size(dim)
        return super()._laid(whole)

    def register_hook(self, hook: Callable[[Tensor], Tensor | None]) -> Any:
        """Registers a hook as on one device, except on a parameter.

        Raises:
            AutoTPError: this is a parameter: FSDP gives it its gradient without calling hooks.
        """
        if self.is_leaf:
            raise AutoTPError(NO_HOOKS)
        return super().register_hook(hook)

    def _tp_part(self) -> Tensor:
        chunk, over = self._chunk, self._sharded_over
        if chunk is None or over is None:
            return self._local_tensor
        comm = GroupComm(self._spec.mesh.get_group(over))
        return chunk.joined(comm.all_gather(chunk.padded(self._local_tensor)))

    def _part(self, whole: Tensor) -> Tensor:
        part, chunk = super()._part(whole), self._chunk
        return part if chunk is None else chunk.cut(part).clone(memory_format=torch.contiguous_format)

    def _sharded(self) -> Sharded:
        return Sharded(self._local_tensor, self._layout, self._rank, chunk=self._chunk)

    def __reduce_ex__(self, protocol: Any) -> Any:
        ordinary = new_dtensor(DTensor, self._local_tensor, self._spec, requires_grad=False)
        return _rebuilt, (ordinary, self._layout, self.requires_grad)


def placed(spec: Any, local: Tensor, layout: Layout) -> DataParallelDTensor:
    """Returns the tensor over `local`, this rank's chunk of its tp rank's part, placed as `spec`, whose last mesh dim is tp."""
    made: DataParallelDTensor = new_dtensor(DataParallelDTensor, local, spec, requires_grad=False)
    made._layout = layout
    return made


def _rebuilt(tensor: DTensor, layout: Layout, requires_grad: bool) -> LayoutDTensor:
    made: LayoutDTensor = placed(tensor._spec, tensor._local_tensor, layout)
    return made.requires_grad_(requires_grad)  # type: ignore[return-value]


torch.serialization.add_safe_globals([_rebuilt])
