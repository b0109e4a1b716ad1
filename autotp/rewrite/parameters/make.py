"""Makes parameters DTensors over the tp mesh.

The local tensor is `layout.shard(full, rank)`. The DTensor has the model's shape and is placed as `Shard(dim)`, over the *layout's
own order*: with padding or shared indices the ranks' parts together are larger than it is. It carries the layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from autotp.errors import MeshError
from autotp.plan.layout import Layout
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, laid_out
from autotp.rewrite.parameters.placements import placements

MakeParam = Callable[[str, nn.Parameter, Layout], nn.Parameter]


def shard_onto(mesh: DeviceMesh) -> MakeParam:
    """A `make_param` that puts each parameter on the 1-D `mesh`.

    Raises:
        MeshError: if `mesh` has more than one dim.
    """
    if mesh.ndim != 1:
        raise MeshError(f"parameters are sharded over one mesh dim, got a mesh with dims {mesh.mesh_dim_names or mesh.ndim}")
    rank = mesh.get_local_rank()

    def make_param(name: str, old: nn.Parameter, layout: Layout) -> nn.Parameter:
        with torch.no_grad():
            new = nn.Parameter(as_dtensor(layout.shard(old.detach(), rank), layout, mesh), requires_grad=old.requires_grad)
            if old.grad is not None:
                new.grad = as_dtensor(layout.shard(old.grad, rank), layout, mesh)
        keep_attributes(old, new)
        return new

    return make_param


def as_dtensor(local: Tensor, layout: Layout, mesh: DeviceMesh) -> LayoutDTensor:
    """Returns the DTensor of one rank's `local` (shape `layout.local_shape`); no communication."""
    stride = torch.empty(layout.shape, device="meta").stride()
    meta = TensorMeta(torch.Size(layout.shape), stride, local.dtype)
    return laid_out(DTensorSpec(mesh, placements(layout), tensor_meta=meta), local, layout)


def keep_attributes(old: nn.Parameter, new: nn.Parameter) -> None:
    """Copy the attributes that users put on a parameter (weight decay marks and the like)."""
    for name, value in vars(old).items():
        if name not in vars(new):
            setattr(new, name, value)
