"""Writes safetensors files in pieces.

The library's own writer takes all tensors of a file at once. But the format needs only their shapes to begin with. A file has eight
bytes with the length of the header, and the header (JSON: dtype, shape and offsets by key). The entries of the tensors follow,
row-major, one after the other without gaps. So this module lays a file out first, and then any process can put any rows anywhere.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from autotp.checkpoint.files import DTYPES
from autotp.checkpoint.nodes import Box, Node
from autotp.errors import CheckpointError

#: Bytes that are put together and written at once. Large enough that messages and calls cost nothing beside the copying.
PIECE = 16 << 20

_RANK = {dtype: i for i, dtype in enumerate(DTYPES.values())}


@dataclass(frozen=True, slots=True)
class FilePlan:
    """A file before it is written: its header (with its length in front), its size in bytes, where each tensor starts."""

    header: bytes
    size: int
    starts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor that stand together in a file, from byte `start`."""

    key: str
    box: Box
    start: int


def lay_out(tensors: Mapping[str, Node], metadata: Mapping[str, str]) -> FilePlan:
    """Returns the plan of a file with `tensors`, in the order of the library's writer: by dtype, the wide ones first, then by key.

    Raises:
        CheckpointError: a dtype that safetensors has no name for.
    """
    for key, node in tensors.items():
        if node.dtype not in _RANK:
            raise CheckpointError(f"{key}: safetensors has no dtype {node.dtype}")
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset, offsets = 0, {}
    for key, node in sorted(tensors.items(), key=lambda item: (-_RANK[item[1].dtype], item[0].encode())):
        end = offset + prod(node.shape) * node.dtype.itemsize
        header[key] = {"dtype": [*DTYPES][_RANK[node.dtype]], "shape": list(node.shape), "data_offsets": [offset, end]}
        offsets[key], offset = offset, end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    first = 8 + len(text)
    return FilePlan(len(text).to_bytes(8, "little") + text, first + offset, {k: first + v for k, v in offsets.items()})


def pieces(key: str, node: Node, start: int) -> Iterator[Piece]:
    """Yields the rows of a tensor that starts at byte `start` of its file, in pieces of about `PIECE` bytes (one row at least)."""
    if not node.shape:
        yield Piece(key, (), start)
        return
    row = prod(node.shape[1:]) * node.dtype.itemsize
    step = max(1, PIECE // max(row, 1))
    for a in range(0, node.shape[0] if row else 0, step):
        yield Piece(key, ((a, min(a + step, node.shape[0])), *((0, n) for n in node.shape[1:])), start + a * row)


class OutputFile:
    """An open file that pieces are put into."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self._fd)

    def reserve(self, plan: FilePlan) -> None:
        """Write the header and take the space for the rest, so that a full disk shows now.

        Raises:
            CheckpointError: no space, or another error of the file system.
        """
        try:
            try:
                os.posix_fallocate(self._fd, 0, plan.size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                    raise
                os.ftruncate(self._fd, plan.size)
        except OSError as error:
            raise CheckpointError(f"{self.path.name}: {plan.size:,} bytes cannot be written: {error}") from error
        self.put(plan.header, 0)

    def put(self, data: bytes | Tensor, start: int) -> None:
        """Write bytes, or a tensor's entries, from byte `start`.

        Raises:
            CheckpointError: no space, or another error of the file system.
        """
        view = memoryview(data) if isinstance(data, bytes) else _bytes_of(data)
        try:
            while view:
                done = os.pwrite(self._fd, view, start)
                view, start = view[done:], start + done
        except OSError as error:
            raise CheckpointError(f"{self.path.name}: writing failed: {error}") from error


def _bytes_of(tensor: Tensor) -> memoryview:
    array: Any = tensor.contiguous().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
