"""`save_pretrained` writes a parallel model as one checkpoint, which the ranks put together a piece at a time.

Every rank writes about as many bytes. A rank's share is a run of rows of the files. They come to it in pieces
(`safetensors_writer.PIECE`). The rank puts each piece together from the parts that the ranks own, and writes it to the file at
once. So a rank holds its part of the model and a few pieces.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from autotp import adapters
from autotp.adapters import base_of
from autotp.agree import agree
from autotp.checkpoint import pretrained
from autotp.checkpoint.contents import local_of
from autotp.checkpoint.directory import written_beside
from autotp.checkpoint.exchange import Held, round_of
from autotp.checkpoint.files import INDEX
from autotp.checkpoint.nodes import Box, Node, sizes
from autotp.checkpoint.over_data_parallel import agree_along, gather_tp_parts
from autotp.checkpoint.progress import bar
from autotp.checkpoint.pullback import fill
from autotp.checkpoint.read_shard import Counting
from autotp.checkpoint.safetensors_writer import PIECE, FilePlan, OutputFile, Piece, lay_out, pieces
from autotp.errors import CheckpointError, InputError, PlanError
from autotp.parallel_state import state_of
from autotp.plan.plan import Plan
from autotp.plan.spec import ParamPlan
from autotp.rewrite.collectives.comm import Comm, GroupComm
from autotp.rewrite.parameters.layout_dtensor import layout_of
from autotp.rewrite.parameters.names import Names

_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


def save_pretrained(model: nn.Module, path: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
    """Write a parallel model as a checkpoint of Hugging Face form. Collective: call on every rank of one tp group, and of the whole
    mesh where FSDP shards the model.

    The directory equals what transformers' `save_pretrained` writes of the unsharded model, bit by bit, also where transformers
    stores weights otherwise than the model holds them. `AutoModel.from_pretrained` loads it. For a module that is not of
    transformers, the directory gets the weight files alone, by the names of its `state_dict`.

    The rank that writes a piece of a tensor puts it together. No rank holds more than its part of the model and a few pieces (16
    MiB, or one row of a tensor). The ranks share the writing: parts of every file on one machine, whole files on several. They
    write beside `path`; the complete checkpoint takes its place in one step. Other files there stay. On a mesh of several dims call
    this where the other coordinates are 0; on all ranks where FSDP shards the model: those at coordinate 0 then gather their tp parts
    to main memory, and write.

    Args:
        path: the directory; it is made, or its checkpoint replaced. Every rank must see the same file system.
        max_shard_size: most bytes of a file, or text such as "5GB"; a tensor that is larger has a file of its own.

    Raises:
        AutoTPError: the same on every rank, with an old checkpoint as it was. CheckpointError: the file system refuses (no space,
            no permission), a rank is gone. PlanError: `model` is not parallel. InputError: wrong arguments.
    """
    state_of(model)
    if base_of(model) is not model:
        raise PlanError(
            f"{type(model).__name__} is a wrapper of PEFT: model.save_pretrained(path), on every rank, writes its adapters. To write the "
            "weights with the adapters in them, pass model.merge_and_unload()"
        )
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path: got {type(path).__name__}, wanted a directory")
    if getattr(model, "_hf_peft_config_loaded", False):
        _save_adapters(model, Path(path))
        return
    gathered = gather_tp_parts(model)
    write = lambda: _write_all(model, Path(path), max_shard_size, gathered.parts)  # noqa: E731
    agree_along(gathered.groups, write if gathered.first else lambda: None)


def _save_adapters(model: nn.Module, path: Path) -> None:
    """Write the adapters that `model.add_adapter` or `load_adapter` of transformers put on a model, as transformers does."""
    comm = state_of(model).comm
    comm.ask()
    group = comm.group if isinstance(comm, GroupComm) else None
    mine = {f"{at}." for at, _ in adapters.layers(model)}
    state = {
        name: t.full_tensor() if isinstance(t, DTensor) else t.detach()
        for name, t in model.state_dict(keep_vars=True).items()
        if any(name.startswith(at) for at in mine) and ".base_layer." not in name
    }
    meshes = [p.device_mesh for p in model.parameters() if isinstance(p, DTensor)]
    first = not any(at for mesh in meshes[:1] for at in mesh.get_coordinate() or ())  # of the tp ranks, and where FSDP shards of all
    kind: Any = type(model)
    agree(group, lambda: kind.save_pretrained(model, path, state_dict=state, is_main_process=True) if first else None)


def _write_all(model: nn.Module, path: Path, max_shard_size: int | str, parts: Mapping[int, Tensor]) -> None:
    parallel = state_of(model)
    comm = parallel.comm
    comm.ask()
    group = comm.group if isinstance(comm, GroupComm) else None
    state, identity = agree(group, lambda: held_state(model, parallel.plan.params, parts))
    files, metadata = agree(group, lambda: _files(model, state, identity, max_shard_size))
    with written_beside(path, group, replaces=_replaced) as directory:
        first = comm.rank == 0
        agree(group, lambda: _begin(directory, model, parallel.plan, state, files) if first else None)
        write_files(directory, files, metadata, comm, f"Saving {path.name}")


def held_state(model: nn.Module, params: Mapping[str, ParamPlan], parts: Mapping[int, Tensor]) -> tuple[dict[str, Node], dict[str, int]]:
    """Returns the model's `state_dict` as nodes, and a number for each name that tied tensors share.

    `parts`: the tp rank's part of the parameters (by id) that FSDP shards.

    Raises:
        CheckpointError: a tensor has no values.
    """
    own_name = Names(params)
    state: dict[str, Node] = {}
    identity: dict[str, int] = {}
    made: dict[int, Held] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        name = own_name(key)
        if not isinstance(tensor, Tensor):
            continue  # a module's extra state that is no tensor: transformers does not write it either
        plan = params.get(name)
        if id(tensor) not in made:
            local = parts[id(tensor)] if id(tensor) in parts else local_of(tensor)
            if local.is_meta:
                raise CheckpointError(f"{name} is on the meta device and has no values: load weights into the model first")
            if plan is not None:
                layout = layout_of(tensor, plan.layout)
                made[id(tensor)] = Held(layout.shape, local.dtype, local, layout)
            else:
                made[id(tensor)] = Held(tuple(local.shape), local.dtype, local)
        state[name], identity[name] = made[id(tensor)], id(tensor)
    return state, identity


def _files(
    model: nn.Module, state: Mapping[str, Node], identity: Mapping[str, int], max_shard_size: int | str
) -> tuple[dict[str, dict[str, Node]], dict[str, str]]:
    if pretrained.is_pretrained(model):
        return pretrained.split(pretrained.as_saved(model, state, identity), max_shard_size), {"format": "pt"}
    kept, removed = pretrained.without_copies(state, identity)
    return pretrained.split(kept, max_shard_size), {"format": "pt", **removed}


def _begin(directory: Path, model: nn.Module, plan: Plan, state: Mapping[str, Node], files: Mapping[str, Mapping[str, Node]]) -> None:
    parameters = {
        id(state[name]): prod(state[name].shape) for name in map(Names(plan.params), dict(model.named_parameters())) if name in state
    }
    if pretrained.is_pretrained(model):
        pretrained.write_config(directory, model, [a for m in plan.modules if not m.path for a in m.attributes])
    pretrained.write_index(directory, files, sum(parameters.values()))


def _replaced(name: str) -> bool:
    return name == INDEX or bool(_WEIGHTS.fullmatch(name))


@dataclass(frozen=True, slots=True)
class _Job:
    """One rank writes these pieces, of about `PIECE` bytes together."""

    file: str
    pieces: tuple[Piece, ...]


def write_files(directory: Path, files: Mapping[str, Mapping[str, Node]], metadata: Mapping[str, str], comm: Comm, text: str) -> None:
    """Write `files`, the same on every rank, whose tensors are made of `Held` ones. Collective.

    Raises:
        CheckpointError: the same on every rank.
    """
    group = comm.group if isinstance(comm, GroupComm) else None
    plans = {file: lay_out(tensors, metadata) for file, tensors in files.items()}
    total = sum(plan.size - len(plan.header) for plan in plans.values())
    shares = _shares(files, plans, comm.size, _one_machine(group))
    with ExitStack() as stack:
        out: dict[str, OutputFile] = {}

        def create() -> None:
            if comm.rank == 0:
                for file, plan in plans.items():
                    with OutputFile(directory / file) as made:
                        made.reserve(plan)

        agree(group, create)
        agree(group, lambda: out.update({f: stack.enter_context(OutputFile(directory / f)) for f in {j.file for j in shares[comm.rank]}}))
        advance = stack.enter_context(bar(text, total, comm.rank == 0))
        failure: Exception | None = None
        for i in range(max(map(len, shares))):
            jobs = [share[i] if i < len(share) else None for share in shares]
            parts = round_of(comm, [[] if job is None else list(_needed(files[job.file], job)) for job in jobs])
            job = jobs[comm.rank]
            if job is not None and failure is None:
                try:
                    _write(out[job.file], files[job.file], job, iter(parts))
                except Exception as error:  # the others need this rank in their rounds: it says so at the end
                    failure = error
            advance(sum(_size(files[j.file], p) for j in jobs if j is not None for p in j.pieces))

        def done() -> None:
            if failure is not None:
                raise failure

        agree(group, done)


def _needed(tensors: Mapping[str, Node], job: _Job) -> Iterator[tuple[Held, Box]]:
    for piece in job.pieces:
        node = tensors[piece.key]
        asked: list[tuple[Held, Box]] = []
        fill(node, piece.box, torch.empty(sizes(piece.box), dtype=node.dtype, device="meta"), Counting(_recorder(asked)))
        yield from asked


def _recorder(asked: list[tuple[Held, Box]]) -> Callable[[Node, Box], None]:
    def record(source: Node, box: Box) -> None:
        assert isinstance(source, Held)
        asked.append((source, box))

    return record


def _write(file: OutputFile, tensors: Mapping[str, Node], job: _Job, parts: Iterator[Tensor]) -> None:
    for piece in job.pieces:
        node = tensors[piece.key]
        if isinstance(node, Held):
            made = next(parts)
        else:
            made = torch.empty(sizes(piece.box), dtype=node.dtype)
            fill(node, piece.box, made, lambda source, box: next(parts))
        file.put(made.cpu(), piece.start)


def _size(tensors: Mapping[str, Node], piece: Piece) -> int:
    return prod(sizes(piece.box)) * tensors[piece.key].dtype.itemsize


def _shares(files: Mapping[str, Mapping[str, Node]], plans: Mapping[str, FilePlan], ranks: int, one_machine: bool) -> list[list[_Job]]:
    """Returns each rank's jobs: a run of every file each, or, where the ranks are on several machines, whole files.

    Machines that write to one page of a file over a network can undo each other's writing.
    """
    shares: list[list[_Job]] = [[] for _ in range(ranks)]
    for number, (file, tensors) in enumerate(files.items()):
        jobs = list(_jobs(file, tensors, plans[file]))
        for i, job in enumerate(jobs):
            shares[i * ranks // len(jobs) if one_machine else number % ranks].append(job)
    return shares


def _jobs(file: str, tensors: Mapping[str, Node], plan: FilePlan) -> Iterator[_Job]:
    batch: list[Piece] = []
    size = 0
    for key, start in plan.starts.items():
        for piece in pieces(key, tensors[key], start):
            if batch and size + _size(tensors, piece) > PIECE:
                yield _Job(file, tuple(batch))
                batch, size = [], 0
            batch.append(piece)
            size += _size(tensors, piece)
    if batch:
        yield _Job(file, tuple(batch))


def _one_machine(group: dist.ProcessGroup | None) -> bool:
    if group is None:
        return True
    names: list[str] = [""] * dist.get_world_size(group)
    dist.all_gather_object(names, socket.gethostname(), group=group)
    return len(set(names)) == 1
