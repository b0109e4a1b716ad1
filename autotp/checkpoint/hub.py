"""Finds the directory that a path names: one on this machine, or a model of the hub, which transformers downloads."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from autotp.agree import agree
from autotp.errors import CheckpointError
from autotp.rewrite.collectives.comm import GroupComm


def local_directory(path: str | os.PathLike[str], comm: GroupComm) -> Path:
    """Returns the directory of `path` on this rank's machine. Collective.

    Raises:
        CheckpointError: it is no directory, and no model that can be downloaded.
    """
    directory, text = Path(path), os.fspath(path)
    found = _everywhere((directory.is_dir(), directory.exists()), comm)
    if all(is_dir for is_dir, _ in found):
        return directory
    if any(exists for _, exists in found) or text.count("/") > 1 or text.startswith((".", "/", "~")):
        agree(comm.group, lambda: _missing(directory))
    first = agree(comm.group, lambda: _download(text) if comm.rank == 0 else None)
    return agree(comm.group, lambda: first or _download(text))  # in the cache by now, unless this is another machine


def _everywhere(here: tuple[bool, bool], comm: GroupComm) -> list[tuple[bool, bool]]:
    found: list[tuple[bool, bool]] = [here] * comm.size
    dist.all_gather_object(found, here, group=comm.group)
    return found


def _missing(directory: Path) -> None:
    if directory.is_file():
        raise CheckpointError(f"{directory}: a file, wanted the directory of a checkpoint")
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory on this rank's machine")


def _download(name: str) -> Path:
    """Downloads the files of a model of the hub into transformers' cache."""
    try:
        from transformers.utils import cached_file
        from transformers.utils.hub import get_checkpoint_shard_files

        config = cached_file(name, "config.json")
        cached_file(name, "generation_config.json", _raise_exceptions_for_missing_entries=False)
        if cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False) is None:
            get_checkpoint_shard_files(name, cached_file(name, "model.safetensors.index.json"))
    except Exception as error:
        raise CheckpointError(
            f"{name}: no such directory, and not a model that can be downloaded: {' '.join(str(error).split())}"
        ) from error
    return Path(str(config)).parent
