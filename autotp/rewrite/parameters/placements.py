"""Says how a tensor with a layout is placed on its mesh, and refuses to have it cut as a plain `Shard` would cut it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from autotp.errors import AutoTPError
from autotp.plan.layout import Layout


def placements(layout: Layout) -> tuple[Any]:
    """Returns how a tensor of `layout` is placed on its mesh."""
    return (Replicate() if layout.dim is None else Shard(layout.dim),)


def in_dtype(spec: Any, dtype: torch.dtype) -> Any:
    """Returns `spec` for entries of another dtype."""
    meta = spec.tensor_meta
    if dtype == meta.dtype:
        return spec
    return DTensorSpec(spec.mesh, spec.placements, tensor_meta=TensorMeta(meta.shape, meta.stride, dtype))


def end_to_end(spec: Any, local: Tensor) -> DTensorSpec:
    """Returns the placements of `spec` for the tensor that the ranks' tensors, each as large as `local`, make when laid end to end."""
    shape = list(local.shape)
    placed = tuple(p if p.is_replicate() else Shard(p.dim) for p in spec.placements)
    for dim, p in enumerate(placed):
        if not p.is_replicate():
            shape[p.dim] *= spec.mesh.size(dim)
    meta = TensorMeta(torch.Size(shape), torch.empty(shape, device="meta").stride(), local.dtype)
    return DTensorSpec(spec.mesh, placed, tensor_meta=meta)


class InLayout(Shard):
    """The placement that users see of a tensor whose parts are not even slices of it: a `Shard` that names no dim.

    Code that cuts whole tensors by the placements of a parameter (`distribute_tensor`, `set_model_state_dict` with whole tensors) asks
    for the dim.
    """

    layout: Layout

    @classmethod
    def of(cls, dim: int, layout: Layout) -> InLayout:
        """Returns the placement of a tensor of `layout` that a dim of its mesh shards along `dim`."""
        made = cls(dim)
        made.layout = layout
        return made

    @property
    def dim(self) -> int:  # type: ignore[override]  # that it raises is what it is for
        """Nothing.

        Raises:
            AutoTPError: always.
        """
        raise AutoTPError(
            f"a tensor with the layout {self.layout} is not cut in even slices, so its placements do not tell how to cut another one "
            "(set_model_state_dict and set_optimizer_state_dict of whole tensors, distribute_tensor): load whole tensors on every rank by "
            "model.load_state_dict, or use autotp.checkpoint.load or autotp.from_pretrained"
        )

    def __repr__(self) -> str:
        return f"InLayout({self.layout})"
