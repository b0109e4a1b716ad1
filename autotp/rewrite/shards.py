"""Parameters as DTensors over the tp mesh.

The local tensor is `layout.shard(full, rank)`. The DTensor is placed as an even `Shard(dim)` over the *layout's own order*;
with padding or shared indices its global size along the dim, `tp` times the local one, is larger than the model's. The layout comes
with it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from autotp.errors import MeshError
from autotp.plan.layout import Layout
from autotp.rewrite.tensor import LayoutDTensor, laid_out

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
    """The DTensor of one rank's `local` (shape `layout.local_shape`); no communication."""
    dim = layout.dim
    if dim is None:
        whole = DTensor.from_local(local, mesh, (Replicate(),), run_check=False)
        return laid_out(whole._spec, whole._local_tensor, layout)
    shape = list(layout.local_shape)
    shape[dim] *= layout.tp
    stride = torch.empty(shape, device="meta").stride()
    made = DTensor.from_local(local, mesh, (Shard(dim),), run_check=False, shape=torch.Size(shape), stride=stride)
    return laid_out(made._spec, made._local_tensor, layout)


def keep_attributes(old: nn.Parameter, new: nn.Parameter) -> None:
    """Copy the attributes that users put on a parameter (weight decay marks and the like)."""
    for name, value in vars(old).items():
        if name not in vars(new):
            setattr(new, name, value)
