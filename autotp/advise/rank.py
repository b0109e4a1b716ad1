"""Puts one rank's part of a model in its place, on fake tensors, and takes it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autotp.advise.comm import CountedComm
from autotp.advise.routing import route_evenly
from autotp.plan.layout import Layout
from autotp.plan.plan import Plan
from autotp.plan.sequence_parallel import tokens_in_parts
from autotp.rewrite.apply import apply
from autotp.rewrite.parameters.make import as_dtensor
from autotp.rewrite.sequence.scatter import Scatter
from autotp.trace.keep import Undo, undisturbed, undone
from autotp.trace.memo import Memo
from autotp.trace.model_state import same_numbers, set_item


@dataclass(frozen=True, slots=True)
class Rank:
    """One rank of a parallel model on fake tensors. parameters, buffers: the local tensors, each once."""

    fake: FakeTensorMode
    comm: CountedComm
    model: nn.Module
    memo: Memo

    @property
    def parameters(self) -> list[Tensor]:
        """The rank's parts of the parameters."""
        return [local(p) for p in self.model.parameters()]

    @property
    def gradients(self) -> list[Tensor]:
        """The rank's parts of the gradients that are there."""
        return [local(p.grad) for p in self.model.parameters() if p.grad is not None]

    @property
    def buffers(self) -> list[Tensor]:
        """The buffers."""
        return list(self.model.buffers())


def local(tensor: Tensor) -> Tensor:
    """Returns the rank's part of a DTensor; another tensor as it is."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class _Line(DeviceMesh):
    """The tp mesh as rank 0 sees it, without process groups."""

    def __init__(self, tp: int) -> None:
        super().__init__("cpu", torch.arange(tp), mesh_dim_names=("tp",), _init_backend=False, _rank=0)

    def get_local_rank(self, mesh_dim: int | str | None = None) -> int:
        return 0


@contextmanager
def one_rank(model: nn.Module, plan: Plan, dtype: torch.dtype) -> Iterator[Rank]:
    """`model` is rank 0 of `plan` inside, with fake weights in `dtype`; it comes out as it went in.

    Floating-point parameters are in `dtype`. Buffers keep theirs, and their numbers where they have some.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    mesh = _Line(plan.tp)
    comm = CountedComm(mesh)
    with undisturbed(model), same_numbers(), undone() as undo:
        _fake_tensors(model, fake, dtype, undo)

        def make(name: str, old: nn.Parameter, layout: Layout) -> nn.Parameter:
            with fake:
                part = torch.empty(layout.local_shape, dtype=old.dtype)
                return nn.Parameter(as_dtensor(part, layout, mesh), requires_grad=old.requires_grad)

        route_evenly(model, plan, undo)
        if plan.tp > 1:
            scatter = Scatter(comm, plan.least_scattered) if tokens_in_parts(plan) else None
            more = {"scatter": scatter, "by_token": plan.tokens.by_token, "together": plan.together}
            undo.append(apply(model, plan.params, plan.modules, comm=comm, make_param=make, **more).undo)  # type: ignore[arg-type]
        yield Rank(fake, comm, model, Memo(fake, {}))


def _fake_tensors(model: nn.Module, fake: FakeTensorMode, dtype: torch.dtype, undo: Undo) -> None:
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in list(table.items()):
                if tensor is None or (table is module._buffers and tensor.device.type == "cpu"):
                    continue
                if id(tensor) not in made and table is module._buffers and not tensor.is_meta:
                    made[id(tensor)] = tensor.cpu()  # where the fake weights are
                if id(tensor) not in made:
                    wanted = dtype if table is module._parameters and tensor.is_floating_point() else tensor.dtype
                    with fake:
                        new: Tensor = torch.empty(tensor.shape, dtype=wanted)
                        made[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if table is module._parameters else new
                set_item(table, name, made[id(tensor)], undo)
