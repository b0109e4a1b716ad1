"""Makes the parameters of a rank without a process group: the DTensors that `parallelize` makes, over a mesh of this process.

Modules run in other forms with them: a Linear of DTensors is one autograd function, a plain one is not. Some faults appear only in
these forms: a view that cannot be changed in place, code that reads a parameter past its module. The check finds them here too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.numeric.ranks import LocalComm
from autotp.numeric.subject import CannotRun
from autotp.plan.layout import Layout
from autotp.rewrite.parameters.make import MakeParam, as_dtensor, keep_attributes


class LocalMesh(DeviceMesh):
    """The tp mesh as one rank of `comm` sees it; `comm` stands in for its group."""

    def __init__(self, comm: LocalComm) -> None:
        super().__init__("cpu", torch.arange(comm.size), mesh_dim_names=("tp",), _init_backend=False, _rank=comm.rank)
        self.comm = comm

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        """This rank."""
        return self.comm.rank

    def get_group(self, mesh_dim: int | str | None = None) -> Any:
        """There is none.

        Raises:
            CannotRun: always; DTensor's own collectives want one.
        """
        raise CannotRun("code of the model makes DTensor communicate, which takes a process group")


def local_parameters(comm: LocalComm) -> MakeParam:
    """As `shard_onto`, for one rank of this process."""
    mesh = LocalMesh(comm)

    def make(name: str, old: nn.Parameter, layout: Layout) -> nn.Parameter:
        with torch.no_grad():
            local = layout.shard(old.detach(), comm.rank).clone()
            new = nn.Parameter(as_dtensor(local, layout, mesh), requires_grad=old.requires_grad)
        keep_attributes(old, new)
        return new

    return make
