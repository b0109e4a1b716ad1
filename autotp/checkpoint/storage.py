"""Runs torch.distributed.checkpoint (DCP) with planners for `Sharded` and with files that are checked as they are read.

DCP writes one file a rank and an index, `.metadata`. Each tensor, or box of one, and each number in a file is an archive of
`torch.save` with a checksum, which DCP itself does not check.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.storage import WriteResult

from autotp.errors import CheckpointError, sentence
from autotp.rewrite.parameters.dcp import Sharded


def write(state: dict[str, Any], aliases: Mapping[str, str], folder: Path, path: Path, group: dist.ProcessGroup | None) -> None:
    """Write the nested dict `state`, whose leaves are `Sharded` or plain values, into the empty `folder`. Collective.

    Args:
        aliases: further key → key under which the data is; the index lists both, the data is there once.
        path: the user's name of the place, for messages.

    Raises:
        CheckpointError: on every rank that is still there.
    """
    checksums = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(True)
    try:
        with failures(f"saving to {path} failed", "What was there before is as it was."):
            writer = _Writer(folder, aliases)
            state_dict_saver.save(state, storage_writer=writer, planner=_SavePlanner(), process_group=group, no_dist=_alone())
    finally:
        torch.serialization.set_crc32_options(checksums)


def read(state: dict[str, Any], folder: Path, group: dist.ProcessGroup | None, *, alone: bool = False) -> None:
    """Fill `state` from `folder`: `Sharded` in place, other values are replaced. Keys are those of the index, not nested.

    alone: no other rank takes part. Else collective.

    Raises:
        CheckpointError: on every rank; tensors that were read before the failure keep their new values.
    """
    planner = _LoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)  # the keys are the index's already
    with failures(f"reading {folder} failed"):
        state_dict_loader.load(state, storage_reader=_Reader(folder), planner=planner, process_group=group, no_dist=alone or _alone())


def read_index(folder: Path) -> Metadata:
    """Returns the index of a checkpoint, and checks that its files are all there and as long as they must be.

    Raises:
        CheckpointError: there is no checkpoint, or it is not whole.
    """
    if not (folder / ".metadata").is_file():
        found = "there is no such folder" if not folder.is_dir() else f"it holds {sorted(f.name for f in folder.iterdir())[:5]}"
        raise CheckpointError(f"{folder} is no checkpoint of autotp.checkpoint.save, it has no .metadata file: {found}")
    try:
        index: Metadata = FileSystemReader(folder).read_metadata()
        ends: dict[str, int] = {}
        for place in index.storage_data.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    except Exception as error:  # a pickle that is cut short raises many things
        raise CheckpointError(f"{folder}/.metadata cannot be read, the checkpoint is damaged: {type(error).__name__}: {error}") from error
    for name, end in ends.items():
        size = (folder / name).stat().st_size if (folder / name).is_file() else None
        if size is None or size < end:
            found = "missing" if size is None else f"{size} bytes long, {end} wanted"
            raise CheckpointError(f"the checkpoint {folder} is damaged: {name} is {found}; every rank's file must be there")
    return index


def _alone() -> bool:
    return not (dist.is_available() and dist.is_initialized())


@contextmanager
def failures(what: str, then: str = "") -> Iterator[None]:
    """Turns every error of DCP into one `CheckpointError` that names the rank, and ends with `then`."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield
    except CheckpointException as error:
        rank, (cause, _) = next(iter(sorted(error.failures.items())))
        raise CheckpointError(f"{what} on rank {rank}: {sentence(_text(cause))} {then}".rstrip()) from error
    except (RuntimeError, ValueError, OSError) as error:
        gone = "another rank may be gone (killed, or its connection broke)"
        raise CheckpointError(f"{what}; {gone}: {sentence(_text(error))} {then}".rstrip()) from error


def _text(error: BaseException) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index) if isinstance(found, Sharded) else found


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found: Sharded = self.state_dict[index.fqn]
        return found.__get_tensor_shard__(index)


class _Writer(FileSystemWriter):
    def __init__(self, folder: Path, aliases: Mapping[str, str]) -> None:
        super().__init__(folder)
        self._aliases = aliases

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        for other, first in self._aliases.items():
            metadata.state_dict_metadata[other] = metadata.state_dict_metadata[first]
            metadata.planner_data[other] = (*metadata.planner_data[first][:1], other.partition(".")[2])
            again = [r for written in results for r in written if r.index.fqn == first]
            results = [*results, [replace(r, index=replace(r.index, fqn=other)) for r in again]]
        super().finish(metadata, results)


class _Reader(FileSystemReader):
    def _slice_file(self, file: Any, sinfo: Any) -> Any:
        file.seek(sinfo.offset)
        data = io.BytesIO(file.read(sinfo.length))
        try:
            with zipfile.ZipFile(data) as archive:
                bad = archive.testzip()
        except (zipfile.BadZipFile, EOFError, OSError, NotImplementedError) as error:
            raise CheckpointError(f"{sinfo.relative_path} is damaged at byte {sinfo.offset}: {error}") from error
        if bad is not None:
            raise CheckpointError(f"{sinfo.relative_path} is damaged at byte {sinfo.offset}: the checksum of {bad} is wrong")
        data.seek(0)
        return data
