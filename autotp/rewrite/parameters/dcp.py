"""Tells torch.distributed.checkpoint (DCP) about one tensor: this rank's pieces, in the model's order and true shape.

`Sharded` follows DCP's protocol for tensors (`torch/distributed/_checkpointable.py`). It writes the pieces that this rank owns and
reads all that it holds, copies of an index too. DCP finds the saved boxes that they overlap with, whatever number of ranks saved
them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from autotp.plan.boxes import Piece, piece_dim, pieces, shorter, within
from autotp.plan.layout import Layout
from autotp.rewrite.parameters.chunk import Chunk


class Sharded:
    """Presents `local` (shape `layout.local_shape`) as `rank`'s part of a tensor of shape `layout.shape`.

    most: pieces are written in boxes of at most so many bytes, so that a reader of a part need not read all.
    chunk: `local` is this chunk of the part.
    """

    __slots__ = ("_across", "_most", "_pieces", "layout", "local")

    def __init__(self, local: Tensor, layout: Layout, rank: int, most: int | None = None, chunk: Chunk | None = None) -> None:
        self.local, self.layout, self._most = local, layout, most
        self._pieces: Sequence[Piece] = pieces(layout, rank)
        self._across: Chunk | None = None
        if chunk is not None and layout.shape:
            if chunk.dim == piece_dim(layout):
                self._pieces = [part for piece in self._pieces for part in within(piece, chunk.start, chunk.stop)]
            else:
                self._across = chunk
                self._pieces = self._pieces if chunk.stop > chunk.start else ()
        if most is not None and layout.shape and local.numel():
            width = local.numel() // local.shape[piece_dim(layout)] * local.element_size()
            self._pieces = [part for piece in self._pieces for part in shorter(piece, max(1, most // width))]

    def size(self) -> torch.Size:
        """Returns the shape of the model's tensor."""
        return torch.Size(self.layout.shape)

    def __create_write_items__(self, fqn: str, object: object) -> list[Any]:  # the name is the protocol's
        from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        properties = TensorProperties(dtype=self.local.dtype)
        items = []
        for piece in self._pieces:
            if piece.owned:
                chunk = self._chunk(piece)
                data = TensorWriteData(chunk=chunk, properties=properties, size=self.size())
                items.append(WriteItem(index=MetadataIndex(fqn, chunk.offsets), type=WriteItemType.SHARD, tensor_data=data))
        return items

    def __create_chunk_list__(self) -> list[Any]:
        return [self._chunk(piece) for piece in self._pieces]

    def __get_tensor_shard__(self, index: Any) -> Tensor:
        """Returns the view of `local` that is the piece of `index`: the `index.index`-th where that one begins there, else the
        first that does, one that is owned before copies of it.
        """
        dim = piece_dim(self.layout)
        if not self.layout.shape:
            return self.local
        start = index.offset[dim] if index.offset is not None else 0
        hint = index.index
        if hint is not None and hint < len(self._pieces) and self._pieces[hint].start == start:
            return self._view(self._pieces[hint])
        there = [piece for piece in self._pieces if piece.start == start]
        return self._view(next((piece for piece in there if piece.owned), there[0]))

    def _view(self, piece: Piece) -> Tensor:
        return self.local.narrow(piece_dim(self.layout), piece.at, piece.length)

    def _chunk(self, piece: Piece) -> Any:
        from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

        offsets, sizes = [0] * len(self.layout.shape), list(self.layout.shape)
        if sizes:
            offsets[piece_dim(self.layout)], sizes[piece_dim(self.layout)] = piece.start, piece.length
        if (across := self._across) is not None:
            offsets[across.dim], sizes[across.dim] = across.start, across.stop - across.start
        return ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
