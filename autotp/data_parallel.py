"""Shards a parallel model over data-parallel ranks too, by torch's `fully_shard`: this module picks the units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp import fully_shard as torch_fully_shard

from autotp.adapters import base_of
from autotp.errors import InputError, MeshError, PlanError
from autotp.parallel_state import state_of
from autotp.plan.plan import Plan
from autotp.replan import plan_adapters


def fully_shard(model: nn.Module, mesh: DeviceMesh, **options: Any) -> nn.Module:
    """Shard the parallel `model` over the data-parallel dims of `mesh` by torch's `fully_shard` (FSDP2), and return it.

    Each repeated block is a unit of its own, and the rest is the root's. Blocks that read each other's parameters, or share them,
    stay in the unit that encloses both. Plain `torch.distributed.fsdp.fully_shard` on modules of your choice works as well.

    Args:
        model: as `parallelize` or `from_pretrained` made it. Make the optimizer after this call.
        mesh: the mesh of the model, whose dims besides "tp" shard: one (FSDP), or two, of which the first replicates (HSDP). Or the
            data-parallel mesh alone, ``mesh["dp"]``.
        options: keywords of torch's `fully_shard`: reshard_after_forward, mp_policy, offload_policy, shard_placement_fn, …

    Raises:
        PlanError: `model` is not parallel, or sharded already. MeshError: no data-parallel dim, more than two, or one that has ranks
            of one tp group. InputError: keywords that torch's `fully_shard` does not have, or that it does not take for
            tensor-parallel parameters.
    """
    state_of(model)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        raise PlanError(f"{type(model).__name__} is sharded by FSDP already, or a part of it is: give the units to torch's fully_shard")
    over = _data_parallel(mesh)
    plan_adapters(base_of(model))
    if type(after := options.get("reshard_after_forward")) is int:
        raise InputError(
            f"reshard_after_forward={after}: FSDP does not reshard tensor-parallel parameters to part of its ranks; True or False"
        )
    try:
        for path in units(base_of(model), state_of(model).plan):
            torch_fully_shard(base_of(model).get_submodule(path), mesh=over, **options)
        torch_fully_shard(model, mesh=over, **options)
    except TypeError as error:
        raise InputError(f"fully_shard: {error}") from error
    return model


def _data_parallel(mesh: object) -> DeviceMesh:
    if not isinstance(mesh, DeviceMesh):
        raise MeshError(f"mesh must be a torch DeviceMesh (see init_device_mesh), got {type(mesh).__name__}")
    names = mesh.mesh_dim_names or ()
    others = tuple(name for name in names if name != "tp")
    if "tp" not in names:
        if mesh.ndim <= 2:
            return mesh
    elif 1 <= len(others) <= 2:
        return mesh[others if len(others) > 1 else others[0]]
    raise MeshError(
        f"fully_shard takes a mesh with one data-parallel dim, or two of which the first replicates, besides 'tp'; got dims "
        f"{names or mesh.ndim}: pass those dims alone, as in mesh['dp'] or mesh['replicate', 'dp']"
    )


def units(model: nn.Module, plan: Plan) -> list[str]:
    """Returns the paths of the modules that are FSDP units of their own, inner ones left out."""
    found = list(_blocks(model, ""))
    for group in _together(model, plan):
        inside = {_unit(path, found) for path in group}
        if len(inside) > 1:
            found = [unit for unit in found if unit not in inside]
    return found


def _blocks(module: nn.Module, path: str) -> Iterator[str]:
    """Yields the modules in the outermost lists of modules that are called, which a list is not."""
    for name, child in module.named_children():
        inside = f"{path}.{name}" if path else name
        is_list = isinstance(module, nn.ModuleList | nn.Sequential) and len(module) > 1
        if is_list and not isinstance(child, nn.ModuleList | nn.ModuleDict) and any(True for _ in child.parameters()):
            yield inside
        else:
            yield from _blocks(child, inside)


def _together(model: nn.Module, plan: Plan) -> Iterator[list[str]]:
    """Yields the paths of modules that must be in one unit: they read one parameter."""
    for module in plan.modules:
        for use in module.uses:
            if use.owner != module.path:
                yield [use.owner, module.path]
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(p), []).append(name.rpartition(".")[0])
    yield from (paths for paths in owners.values() if len(paths) > 1)


def _unit(path: str, found: Sequence[str]) -> str:
    """Returns the unit that the module at `path` is in; "" for the root's."""
    return next((unit for unit in found if f"{path}.".startswith(f"{unit}.")), "")
