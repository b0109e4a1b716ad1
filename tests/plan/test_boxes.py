"""Pieces of all ranks: the owned ones cover the tensor exactly once, all of them fill a rank's part but for its padding."""

from __future__ import annotations

from math import prod

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autotp.plan.boxes import piece_dim, pieces, shorter
from autotp.plan.layout import Layout
from autotp.rewrite.parameters.dcp import Sharded
from autotp.testing.strategies import layouts

QUICK = settings(max_examples=150, deadline=None)


@QUICK
@given(layouts())
def test_owned_pieces_cover_the_tensor_once(layout: Layout) -> None:
    times = torch.zeros(layout.shape, dtype=torch.long)
    ranks = range(layout.tp) if layout.dim is not None else range(1)
    for rank in ranks:
        for piece in pieces(layout, rank):
            times.narrow(piece_dim(layout), piece.start, piece.length).add_(piece.owned)
    assert bool((times == 1).all())
    every = [piece for rank in ranks for piece in pieces(layout, rank)]
    if any(not piece.owned for piece in every):  # and copies are what would cover it more than once
        assert sum(piece.length for piece in every) > layout.shape[piece_dim(layout)]
    assert len({(piece.start, piece.length) for piece in every}) == len({piece.start for piece in every})


@QUICK
@given(layouts(), st.integers(1, 5))
def test_pieces_are_the_rank_s_part(layout: Layout, most: int) -> None:
    full = 1 + torch.arange(prod(layout.shape)).reshape(layout.shape)
    dim = piece_dim(layout)
    for rank in range(layout.tp):
        made = torch.zeros(layout.local_shape, dtype=full.dtype)
        for piece in pieces(layout, rank):
            parts = shorter(piece, most)
            assert sum(part.length for part in parts) == piece.length and all(part.length <= most for part in parts)
            for part in parts:
                made.narrow(dim, part.at, part.length).copy_(full.narrow(dim, part.start, part.length))
        assert torch.equal(made, layout.shard(full, rank))


@QUICK
@given(layouts(), st.data())
def test_what_one_set_of_ranks_writes_another_reads(layout: Layout, data: st.DataObject) -> None:
    """DCP's own overlaps of the boxes, without files: any tp to any other, with and without boxes of a limited size."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

    source, target = layout, Layout(layout.shape, layout.dims, data.draw(st.integers(1, 5)))
    most = data.draw(st.sampled_from([None, 8, 40]))
    full = 1 + torch.arange(prod(layout.shape)).reshape(layout.shape)
    boxes: dict[tuple[int, ...], torch.Tensor] = {}
    chunks = []
    for rank in range(source.tp):
        sharded = Sharded(source.shard(full, rank), source, rank, most)
        for item in sharded.__create_write_items__("w", sharded):
            if tuple(item.index.offset) not in boxes:
                chunks.append(item.tensor_data.chunk)
                boxes[tuple(item.index.offset)] = sharded.__get_tensor_shard__(item.index)
                assert boxes[tuple(item.index.offset)].shape == item.tensor_data.chunk.sizes
    stored = TensorStorageMetadata(item.tensor_data.properties, torch.Size(layout.shape), chunks)
    for rank in range(target.tp):
        local = torch.zeros(target.local_shape, dtype=full.dtype)
        reader = Sharded(local, target, rank)
        for read in create_read_items_for_chunk_list("w", stored, reader.__create_chunk_list__()):
            into, box = reader.__get_tensor_shard__(read.dest_index), boxes[tuple(read.storage_index.offset or ())]
            for dim, (at, start, length) in enumerate(zip(read.dest_offsets, read.storage_offsets, read.lengths, strict=True)):
                into, box = into.narrow(dim, at, length), box.narrow(dim, start, length)
            into.copy_(box)
        assert torch.equal(local, target.shard(full, rank))
