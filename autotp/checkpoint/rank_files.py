"""Reads the files of a checkpoint that is cut ahead: a rank reads its own, and whole tensors are put together from all."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autotp.checkpoint.exchange import owned_parts
from autotp.checkpoint.files import FileTensor, Reader, tensors_of
from autotp.checkpoint.manifest import rank_file
from autotp.checkpoint.nodes import Box, Node, sizes
from autotp.errors import CheckpointError
from autotp.plan.layout import Layout


@dataclass(frozen=True, slots=True, eq=False)
class CutTensor(Node):
    """A parameter or buffer whose parts are in the files of all ranks; `layout` None: each file has all of it."""

    name: str
    layout: Layout | None


class RankFile:
    """Reads the file of one rank."""

    def __init__(self, directory: Path, rank: int, tp: int, read: Reader) -> None:
        self.path = directory / rank_file(rank, tp)
        self._read = read
        self._tensors = tensors_of(self.path)

    def tensor(self, name: str, shape: tuple[int, ...]) -> FileTensor:
        """Returns the rank's part of `name`.

        Raises:
            CheckpointError: it is not there, or has another shape.
        """
        found = self._tensors.get(name)
        if found is None:
            raise CheckpointError(f"{self.path}: no {name}; the checkpoint was changed: cut it again")
        if found.shape != shape:
            raise CheckpointError(f"{self.path}: {name} has the shape {found.shape}, the plan's is {shape}; cut the checkpoint again")
        return found

    def part(self, name: str, shape: tuple[int, ...], box: Box) -> Tensor:
        """Returns a box of the rank's part."""
        return self._read(self.tensor(name, shape), box)


class AllRanks:
    """A `Read` for `CutTensor`s, and for tensors of other files."""

    def __init__(self, directory: Path, tp: int) -> None:
        self._read = Reader()
        self._files = [RankFile(directory, rank, tp, self._read) for rank in range(tp)]

    def __call__(self, source: Node, box: Box) -> Tensor:
        if not isinstance(source, CutTensor):
            return self._read(source, box)
        layout = source.layout
        if layout is None or layout.dim is None:
            return self._files[0].part(source.name, source.shape, box)
        out = torch.empty(sizes(box), dtype=source.dtype)
        for rank, file in enumerate(self._files):
            for part in owned_parts(layout, box, rank):
                inner = (*box[: layout.dim], (part.start, part.start + part.length), *box[layout.dim + 1 :])
                out.narrow(layout.dim, part.at, part.length).copy_(file.part(source.name, layout.local_shape, inner))
        return out

    def dtype_of(self, name: str, layout: Layout | None, shape: tuple[int, ...]) -> torch.dtype:
        """Returns the dtype that the files have `name` in."""
        return self._files[0].tensor(name, shape if layout is None else layout.local_shape).dtype
