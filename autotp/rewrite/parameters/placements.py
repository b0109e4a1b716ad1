"""Says how a tensor with a layout is placed on its mesh, and refuses to have it cut as a plain `Shard` would cut it."""

from __future__ import annotations

from typing import Any

from torch.distributed.tensor import Replicate, Shard

from autotp.errors import AutoTPError
from autotp.plan.layout import Layout


def placements(layout: Layout) -> tuple[Any]:
    """Returns how a tensor of `layout` is placed on its mesh."""
    return (Replicate() if layout.dim is None else Shard(layout.dim),)


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


#: What a user of DistributedDataParallel is told, which replicates plain tensors only.
NO_DDP = (
    'DistributedDataParallel does not take a tensor-parallel model: use replicate(model, mesh=mesh["dp"]) of '
    "torch.distributed._composable.replicate_with_fsdp, or autotp.fully_shard(model, mesh)"
)
