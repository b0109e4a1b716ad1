"""Saves and resumes training: parameters, buffers and the optimizer's state, by torch.distributed.checkpoint.

Each rank writes the entries of each tensor that it owns, in the model's order and shape, and reads the entries that it holds. So a
checkpoint does not depend on the ranks that saved it: it loads at any other `tp`, and by torch.distributed.checkpoint on one device
without autotp. No rank ever holds a whole parameter that is sharded. `autotp.checkpoint.contents` lists the contents and their
keys.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from autotp.agree import agree
from autotp.checkpoint.contents import BOX, Contents, contents_of, moment, whole
from autotp.checkpoint.directory import written_beside
from autotp.checkpoint.fit_state import Stored, fit_model, fit_optimizer
from autotp.checkpoint.resume import Resume
from autotp.checkpoint.storage import failures, read, read_index, write
from autotp.errors import CheckpointError, InputError
from autotp.parallel_state import params_of, state_of
from autotp.rewrite.collectives.comm import GroupComm


def save(model: nn.Module, optimizer: Any, path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None) -> None:
    """Save the parallel `model` and `optimizer` (None: the model alone) into the folder `path`. Collective: call on every rank.

    The ranks write beside `path` and rename when all files are there. An older checkpoint at `path` stays whole until then,
    whatever happens.

    Args:
        path: a folder that all ranks see. One that exists is replaced, if it is a checkpoint.
        group: the ranks that save together, all ranks by default. Ranks whose mesh has further dims hold equal copies, and share
            the writing.

    Raises:
        CheckpointError: something cannot be saved, or a rank failed; on every rank that is left. PlanError: `model` is not parallel.
        InputError: `path` is no path, or `group` no process group.
    """
    _save(model, optimizer, _folder(path), _everyone(group))


def _folder(path: object) -> Path:
    if not isinstance(path, str | os.PathLike):
        raise InputError(f"path is {type(path).__name__}, wanted a folder: save(model, optimizer, path), load(model, optimizer, path)")
    return Path(path)


def load(model: nn.Module, optimizer: Any, path: str | os.PathLike[str], *, group: dist.ProcessGroup | None = None) -> None:
    """Load a checkpoint that `save` wrote, at this or any other `tp`, into the parallel `model` and `optimizer` (None: the model
    alone). Collective.

    autotp compares everything before it changes anything. It makes optimizer state that does not exist yet.

    Args:
        path: the folder that was saved.
        group: the ranks that load together, all ranks by default.

    Raises:
        CheckpointError: on every rank: the checkpoint is not there, damaged, or of another model or optimizer. Damage that is only
            found while tensors are read leaves some of them loaded; the message says so. PlanError: `model` is not parallel.
        InputError: `path` is no path, or `group` no process group.
    """
    _load(model, optimizer, _folder(path), _everyone(group))


def _save(model: nn.Module, optimizer: Any, path: Path, group: dist.ProcessGroup | None) -> None:
    contents = agree(group, lambda: _contents(model, optimizer, group))
    _same(group, contents, path)
    aliases = {f"model.{other}": f"model.{first}" for other, first in contents.aliases.items()}
    with written_beside(path, group, replaces=_is_part) as folder:
        write(_nested(contents), aliases, folder, path, group)
        agree(group, lambda: read_index(folder))  # also where a rank's folder is on another disk


def _load(model: nn.Module, optimizer: Any, path: Path, group: dist.ProcessGroup | None) -> None:
    resume = agree(group, lambda: _resume(_contents(model, optimizer, group), optimizer, path))
    try:
        read(resume.values, path, group)
    except CheckpointError as error:
        raise CheckpointError(f"{error}\nPart of the state is loaded by now: load another checkpoint before you go on") from error
    resume.finish()


def _everyone(group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """Returns `group`, or all ranks by default; None on one process that has no group."""
    if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
        raise InputError(f"group is {group!r}, wanted a ProcessGroup of the ranks that call, as mesh.get_group() is, or None for all")
    return group if group is not None or not (dist.is_available() and dist.is_initialized()) else dist.group.WORLD


def _contents(model: nn.Module, optimizer: Any, group: dist.ProcessGroup | None) -> Contents:
    state = state_of(model)
    ranks = set(dist.get_process_group_ranks(state.comm.group)) if isinstance(state.comm, GroupComm) else set()
    if missing := ranks - set(dist.get_process_group_ranks(group) if group is not None else []):
        raise CheckpointError(
            f"the model is cut over ranks {sorted(ranks)}, and {sorted(missing)} of them are not in the group that was passed"
        )
    return contents_of(model, params_of(model), state.comm.rank, optimizer)


def _resume(contents: Contents, optimizer: Any, path: Path) -> Resume:
    stored = Stored.of(path, read_index(path))
    fit_model(stored, contents)
    groups = stored.groups() if optimizer is not None else []
    if optimizer is not None:
        fit_optimizer(stored, contents, groups)
    return Resume(stored, contents, optimizer, groups)


def _nested(contents: Contents) -> dict[str, Any]:
    """Returns the tree that DCP writes: its leaves are `Sharded` or plain values."""
    state: dict[str, Any] = {"model": contents.model(BOX)}
    if contents.groups is not None:
        groups = [{"params": group.names} | {key: _leaf(value) for key, value in group.options.items()} for group in contents.groups]
        states = {
            name: {key: moment(contents.params[name], v, BOX) if isinstance(v, Tensor) else v for key, v in of.items()}
            for name, of in contents.states.items()
        }
        state["optimizer"] = {"state": states, "param_groups": groups}
    return state


def _leaf(value: Any) -> Any:
    return whole(value) if isinstance(value, Tensor) else value


def _same(group: dist.ProcessGroup | None, contents: Contents, path: Path) -> None:
    """Refuse ranks that do not save the same thing to the same place.

    Raises:
        CheckpointError: on every rank.
    """
    if group is None:
        return
    tensors = {name: (tuple(s.size()), s.local.dtype) for name, s in contents.model().items()}
    states = {name: sorted(state) for name, state in contents.states.items()}
    groups = [(group.names, sorted((key, _shown(value)) for key, value in group.options.items())) for group in contents.groups or []]
    mine = {"path": str(path), "model": _digest(tensors), "parameter groups": _digest(groups), "state": _digest(states)}
    everyone: list[Any] = [None] * dist.get_world_size(group)
    with failures("the ranks cannot be compared"):
        dist.all_gather_object(everyone, mine, group=group)
    for rank, other in enumerate(everyone):
        if differ := [what for what in mine if other[what] != everyone[0][what]]:
            raise CheckpointError(
                f"the ranks do not save the same: the {' and the '.join(differ)} of rank {rank} ({other['path']}) "
                f"and of rank 0 ({everyone[0]['path']}) differ; models on some of the ranks are saved with group=mesh.get_group()"
            )


def _shown(value: Any) -> str:
    """Returns the value of a hyperparameter as text, on whichever device it is."""
    return repr((value.dtype, value.tolist()) if isinstance(value, Tensor) else value)


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


def _is_part(name: str) -> bool:
    """True for the files of a checkpoint, which a new one replaces; others in its folder stay."""
    return name == ".metadata" or name.endswith(".distcp")
