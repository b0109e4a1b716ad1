"""Checks a model before it is made parallel: the mesh has a tp dim, all ranks have one model, and it is not parallel yet."""

from __future__ import annotations

import re
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autotp.agree import agree
from autotp.digest import digest, plain_text, tensor_digest
from autotp.errors import MeshError, PlanError

STATE = "_autotp"
_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
#: transformers' loader stays on a model that it quantized; it is no part of its computation, and lists its files in any order.
_OWN = frozenset((*nn.Module().__dict__, "hf_quantizer")) - {"training"}


def tp_mesh(mesh: object) -> DeviceMesh:
    """The 1-D mesh of the tp ranks.

    Raises:
        MeshError: no process group, no mesh, or no dim of it that is the tp dim.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise MeshError("no process group: call torch.distributed.init_process_group (or start under torchrun) before parallelize")
    if not isinstance(mesh, DeviceMesh):
        raise MeshError(f"mesh must be a torch DeviceMesh (see init_device_mesh), got {type(mesh).__name__}")
    names = mesh.mesh_dim_names
    if names is not None and "tp" in names:
        return mesh["tp"] if mesh.ndim > 1 else mesh
    if mesh.ndim == 1:
        return mesh
    raise MeshError(f"a mesh of {mesh.ndim} dims needs one named 'tp', got dims {names}: pass mesh_dim_names=(…, 'tp') to init_device_mesh")


def refuse_parallel(model: nn.Module) -> None:
    """Raise where a model, or a part of it, is parallel already.

    Raises:
        PlanError: it is.
    """
    if any(STATE in m.__dict__ for m in model.modules()):
        raise PlanError("the model, or a module in it, is already parallel; autotp.plan_of(model) gives its plan")
    foreign = [n for n, p in model.named_parameters() if isinstance(p, DTensor)]
    if foreign:
        raise PlanError(f"{foreign[0]} is already a DTensor: parallelize takes the model before FSDP or another parallelism is applied")


def refuse_synchronised(model: nn.Module, group: dist.ProcessGroup) -> None:
    """Refuse batch norms that would take their statistics over ranks of `group`: these see the same rows, and other channels."""
    ranks = set(dist.get_process_group_ranks(group))
    for path, module in model.named_modules():
        if isinstance(module, nn.SyncBatchNorm):
            over = ranks & set(dist.get_process_group_ranks(module.process_group or dist.group.WORLD))
            if len(over) > 1:
                raise PlanError(
                    f"{path} is a SyncBatchNorm over ranks {sorted(over)}, which are tensor-parallel: in training it would count every row "
                    f"{len(over)} times; give it the process group of the data-parallel ranks, or make it a BatchNorm"
                )


def same_model(group: dist.ProcessGroup, model: nn.Module) -> None:
    """Raise where the ranks' models differ: in classes, parameters, buffers or plain attributes. Collective.

    An int that is each rank's own number is no difference, nor is a device.

    Raises:
        PlanError: they differ; names the first difference. The same on every rank.
    """
    own = agree(group, lambda: _description(model))
    size = dist.get_world_size(group)
    short: list[Any] = [None] * size
    dist.all_gather_object(short, digest(repr(own)), group=group)
    if len(set(short)) == 1:
        return
    everyone: list[dict[str, str]] = [{}] * size
    dist.all_gather_object(everyone, own, group=group)
    names = [n for n in dict.fromkeys(n for each in everyone for n in each) if _differs([each.get(n) for each in everyone])]
    if names:
        first = names[0]
        rank = next(r for r, each in enumerate(everyone) if each.get(first) != everyone[0].get(first))
        values = "" if "tensor " in first else f" ({_brief(everyone[rank].get(first))} and {_brief(everyone[0].get(first))})"
        others = f", and so {len(names) - 1} more things" if len(names) > 1 else ""
        raise PlanError(
            f"the models differ between ranks: {first} on rank {rank} is not what it is on rank 0{values}{others}; "
            "load the same weights and set the same attributes on every rank, or seed alike before building the model"
        )


def _differs(values: list[str | None]) -> bool:
    return len(set(values)) > 1 and values != [repr(rank) for rank in range(len(values))]


def _is_unique(value: object) -> bool:
    """True for a text that is a random UUID: it tells modules of one process apart, and is another in each by intention."""
    return isinstance(value, str) and _UUID.fullmatch(value) is not None


def _brief(text: str | None) -> str:
    return "nothing" if text is None else text if len(text) < 60 else text[:57] + "…"


def _description(model: nn.Module) -> dict[str, str]:
    """Returns the facts that must be equal on all ranks, by name."""
    own: dict[str, str] = {}
    for path, module in model.named_modules():
        at = path or "the model"
        own[f"the class of {at}"] = f"{type(module).__module__}.{type(module).__qualname__}"
        for name, value in vars(module).items():
            text = None if name in _OWN or name.startswith("_torchdynamo") or _is_unique(value) else plain_text(value)
            if text is not None:
                own[f"the attribute {name} of {at}"] = text
    for name, t in (*model.named_parameters(), *model.named_buffers()):
        # of a parameter that is parallel already each rank has a part of its own
        text = str(tuple(t.shape)) if isinstance(t, DTensor) else tensor_digest(t) if isinstance(t, Tensor) else str(type(t))
        own[f"the tensor {name}"] = f"{text}{t.requires_grad}"
    return own
