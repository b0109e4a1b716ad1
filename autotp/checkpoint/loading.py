"""`from_pretrained` loads a checkpoint onto the ranks of a mesh; each rank reads its part."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.agree import agree
from autotp.api import assemble
from autotp.checkpoint.files import Reader, checkpoint_tensors
from autotp.checkpoint.hub import local_directory
from autotp.checkpoint.manifest import read_manifest
from autotp.checkpoint.nodes import Node, whole_box
from autotp.checkpoint.presharded import hollow_skeleton
from autotp.checkpoint.progress import bar
from autotp.checkpoint.pullback import value
from autotp.checkpoint.quantized import Quantized, checked, joined, mark, quantize_loaded, settled, taken
from autotp.checkpoint.rank_files import RankFile
from autotp.checkpoint.read_shard import read_shard
from autotp.checkpoint.skeleton import Skeleton, build, find_class, load_config
from autotp.errors import CheckpointError, InputError, TraceError
from autotp.plan.layout import Layout
from autotp.plan.plan import Plan
from autotp.planning import RecipeLike
from autotp.preflight import tp_mesh
from autotp.replan import plan_adapters
from autotp.rewrite.collectives.comm import GroupComm
from autotp.rewrite.parameters.make import MakeParam, as_dtensor, keep_attributes
from autotp.rewrite.parameters.quantized import quantized_param
from autotp.rewrite.rng import sync_rng
from autotp.textfile import read_text, reason


def from_pretrained(
    path: str | os.PathLike[str],
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype | str | None = None,
    recipe: RecipeLike | None = None,
    plan: Plan | None = None,
    model_class: Any = None,
    quantization_config: Any = None,
    **config_overrides: Any,
) -> nn.Module:
    """Load the model of a checkpoint, parallel over `mesh`. Collective: call on every rank of the mesh.

    autotp builds the model on the meta device and plans it. Each rank then reads the intervals of the files that its layouts name,
    straight into its shards on the mesh's device. No rank holds the whole model. transformers' own loader turns files into
    parameters: renamed, merged and split tensors, tied weights, computed buffers, `generation_config`. Missing and unexpected keys
    are logged on rank 0. Missing weights are initialised from rank 0's random state.

    Args:
        path: a directory with a `config.json` and safetensors files (one, or several with an index), one that `autotp.shard` made
            (loaded by the plan beside it), one with an adapter of PEFT (`adapter_config.json`, which names the base model), or a
            name on the model hub, which transformers downloads.
        mesh: as for `parallelize`.
        dtype: of the parameters, a `torch.dtype` or its name; None or "auto": as the config says, else that of the first tensor.
        recipe, plan: used instead of planning: a recipe as `autotp.plan` takes it, or a ready plan for this tp.
        model_class: a model class or an Auto class of transformers; None: the config's `architectures`.
        quantization_config: a `TorchAoConfig` of transformers: plain weights are quantized when they are loaded, those that transformers
            quantizes on one device. A checkpoint that torchao quantized needs none.
        config_overrides: values of the config; also `attn_implementation`, `trust_remote_code` and the like.

    Returns:
        The parallel model, in eval mode.

    Raises:
        AutoTPError: the same on every rank. CheckpointError: files that are missing, cut off, not safetensors, outside of the
            directory, or of other shapes than the model's. InputError: wrong arguments. PlanError, RecipeError, TraceError: as for
            `parallelize`.
    """
    line = tp_mesh(mesh)
    comm = GroupComm(line.get_group())
    agree(comm.group, lambda: _check(path, dtype, recipe, plan, config_overrides))
    quantization = agree(comm.group, lambda: checked(quantization_config))
    sync_rng(comm, torch.device(line.device_type))
    directory = local_directory(path, comm)
    if (base := agree(comm.group, lambda: _adapted(directory))) is not None:
        model = from_pretrained(base, mesh, dtype=dtype, recipe=recipe, plan=plan, model_class=model_class, **config_overrides)
        return _with_adapter(model, directory, comm)
    read = Reader()
    device = device_of(line)
    rank = comm.rank
    found = agree(comm.group, lambda: _found(directory, read, dtype, recipe, plan, model_class, config_overrides, comm, quantization))
    skeleton = found.skeleton
    total = sum(prod(p.shape) * p.dtype.itemsize for p in skeleton.model.parameters() if id(p) in skeleton.nodes)

    with bar(f"Loading {directory.name}", total, rank == 0) as advance:

        def shard(name: str, node: Node, layout: Layout) -> Tensor:
            local = found.part(name, node, layout, device)
            advance(prod(node.shape) * node.dtype.itemsize)
            return local

        try:
            model = assemble(skeleton.model, mesh, _placed(skeleton.nodes, shard, line, rank), recipe=recipe, made=found.plan)
        except (InputError, TraceError) as error:
            here = f"from_pretrained takes plan=autotp.plan(path, tp={comm.size}, example_inputs={{…}}), or recipe="
            raise type(error)(f"{error} ({here})") from error
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.device != device:
                module._buffers[name] = buffer.to(device)
    if quantization is not None:
        quantize_loaded(model, quantization)
    return model


def _adapted(directory: Path) -> str | None:
    """The model that the adapter in a directory is for; None where there is no adapter.

    Raises:
        CheckpointError: the adapter does not say.
    """
    file = directory / "adapter_config.json"
    if not file.is_file():
        return None
    try:
        base = json.loads(read_text(file)).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{file} cannot be read: {reason(error)}") from error
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{file} names no base_model_name_or_path: load the base model, and then call model.load_adapter(directory)")
    return base


def _with_adapter(model: nn.Module, directory: Path, comm: GroupComm) -> nn.Module:
    load: Any = getattr(model, "load_adapter", None)
    if load is None:
        raise CheckpointError(f"{directory} holds an adapter, and {type(model).__name__} takes none")
    agree(comm.group, lambda: load(str(directory)))
    plan_adapters(model)
    return model.eval()


def device_of(mesh: DeviceMesh) -> torch.device:
    """Returns this rank's device of the mesh's kind."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def _placed(nodes: Mapping[int, Node], shard: Callable[[str, Node, Layout], Tensor], line: DeviceMesh, rank: int) -> MakeParam:
    """Returns a `make_param` that reads parameters that are nodes, and cuts the others (which no file holds)."""
    device = device_of(line)

    def make_param(name: str, old: nn.Parameter, layout: Layout) -> nn.Parameter:
        with torch.no_grad():
            node = nodes.get(id(old))
            local = layout.shard(old.detach(), rank).to(device) if node is None else shard(name, node, layout)
            if isinstance(node, Quantized) and layout.tp > 1:
                return quantized_param(local, node.form, layout, line, old)
            new = nn.Parameter(local if layout.tp == 1 else as_dtensor(local, layout, line), requires_grad=old.requires_grad)
        keep_attributes(old, new)
        return new

    return make_param


@dataclass(frozen=True, slots=True)
class _Found:
    """A checkpoint whose headers were read.

    part: (name, node, layout, device) → this rank's part. plan: the given plan, or that in the directory.
    """

    skeleton: Skeleton
    plan: Plan | None
    part: Callable[[str, Node, Layout, torch.device], Tensor]


def _found(
    directory: Path,
    read: Reader,
    dtype: Any,
    recipe: Any,
    plan: Plan | None,
    model_class: Any,
    overrides: Mapping[str, Any],
    comm: GroupComm,
    quantization: Any,
) -> _Found:
    report = comm.rank == 0
    manifest = read_manifest(directory)
    if manifest is None:
        config, options = load_config(directory, overrides, model_class)
        quantized = taken(config, directory)
        if quantized is not None and quantization is not None:
            raise InputError(f"quantization_config=: {directory} is quantized already; leave it out")
        cls = find_class(config, directory, model_class, bool(options.get("trust_remote_code")))
        files = checkpoint_tensors(directory, getattr(config, "transformers_weights", None))
        tensors = files if quantized is None else joined(files, directory)
        skeleton = build(directory, tensors, read, config=config, cls=cls, dtype=dtype, options=options, report=report)
        if quantized is not None:
            skeleton = settled(skeleton, directory)
            mark(skeleton.model, quantized, loaded=True)
        skeleton.fill_buffers(lambda name, node: value(node, whole_box(node.shape), read))

        def part(name: str, node: Node, layout: Layout, device: torch.device) -> Tensor:
            if isinstance(node, Quantized):
                return node.part(name, layout, comm.rank, read, device)
            return read_shard(node, layout, comm.rank, read, device)

        return _Found(skeleton, plan, part)
    if quantization is not None:
        raise InputError(f"quantization_config=: {directory} is cut ahead; call autotp.quantize_(model, config) after from_pretrained")
    if plan is not None or recipe is not None:
        raise InputError(f"{directory} is cut by the plan in it: plan= and recipe= cannot change that")
    tp = manifest.plan.tp
    if tp != comm.size:
        here = f"the mesh has {comm.size} ranks along its tp dim"
        raise CheckpointError(f"{directory} is cut for tp {tp}, {here}: run autotp shard --tp {comm.size} on the checkpoint it was made of")
    skeleton = hollow_skeleton(directory, manifest, overrides, dtype, model_class, report=report)
    file = RankFile(directory, comm.rank, tp, read)

    def own(name: str, node: Node, shape: tuple[int, ...], device: torch.device) -> Tensor:
        out = torch.empty(shape, dtype=node.dtype, device=device)
        return out.copy_(file.part(name, shape, whole_box(shape)))

    skeleton.fill_buffers(lambda name, node: own(name, node, node.shape, torch.device("cpu")))
    return _Found(skeleton, manifest.plan, lambda name, node, layout, device: own(name, node, layout.local_shape, device))


def _check(path: object, dtype: object, recipe: object, plan: object, overrides: Mapping[str, Any]) -> None:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path: got {type(path).__name__}, wanted a directory or the name of a model")
    if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InputError(f"dtype={dtype!r}: torch has no such dtype")
    if dtype is not None and not isinstance(dtype, str | torch.dtype):
        raise InputError(f"dtype: got {type(dtype).__name__}, wanted a torch.dtype, its name, or None")
    if plan is not None and not isinstance(plan, Plan):
        raise InputError(f"plan: got {type(plan).__name__}, wanted an autotp.Plan (see autotp.plan)")
    if plan is not None and recipe is not None:
        raise InputError("plan= and recipe= both say how the model is cut: give one of them")
    for name in ("device_map", "tp_plan", "tp_size", "state_dict", "device_mesh", "torch_dtype", "config"):
        if name in overrides:
            raise InputError(f"{name}=: autotp.from_pretrained has no such argument; the mesh says where the model goes")
