"""Reads a rank's part of a parameter out of the files: the intervals of its layout, straight into the shard."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autotp.checkpoint.nodes import Box, Node, Op, Read, whole_box
from autotp.checkpoint.pullback import fill, value
from autotp.plan.layout import Layout, take


def read_shard(node: Node, layout: Layout, rank: int, read: Read, device: torch.device | str) -> Tensor:
    """Returns `layout.shard` of the tensor that `node` stands for, on `device`; reads the entries that `rank` holds and little more.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if layout.dim is None:
        return value(node, whole_box(node.shape), read, device=device)
    out = torch.empty(layout.local_shape, dtype=node.dtype, device=device)
    for a, b in layout.padding(rank):
        out.narrow(layout.dim, a, b - a).zero_()
    runs = layout.intervals(rank)
    if not runs:
        return out
    lo, hi = min(a for a, _ in runs), max(b for _, b in runs)
    if len(runs) > 1 and isinstance(node, Op):
        # Where runs cannot be read apart, each would read what lies between them again.
        apart = sum(_size(node, layout, run) for run in runs)
        if apart > _size(node, layout, (lo, hi)):
            cover = value(node, _box(layout, (lo, hi)), read, device=device)
            out.copy_(take(cover, layout.dim, [(a - lo, b - lo) if a >= 0 else (a, b) for a, b in layout.runs(rank)]))
            return out
    at = 0
    for a, b in layout.runs(rank):
        if a >= 0:
            fill(node, _box(layout, (a, b)), out.narrow(layout.dim, at, b - a), read)
        at += b - a
    return out


def _box(layout: Layout, run: tuple[int, int]) -> Box:
    return tuple(run if dim == layout.dim else (0, n) for dim, n in enumerate(layout.shape))


def _size(node: Node, layout: Layout, run: tuple[int, int]) -> int:
    """Counts the entries that are read for a run."""
    count = Counting()
    box = _box(layout, run)
    fill(node, box, torch.empty([b - a for a, b in box], dtype=node.dtype, device="meta"), count)
    return count.entries


class Counting:
    """A `Read` that reads nothing: it returns meta tensors, and records the boxes that were asked for."""

    def __init__(self, on_read: Callable[[Node, Box], None] | None = None) -> None:
        self.entries = 0
        self._on_read = on_read

    def __call__(self, source: Node, box: Box) -> Tensor:
        shape = [b - a for a, b in box]
        part = torch.empty(shape, dtype=source.dtype, device="meta")
        self.entries += part.numel()
        if self._on_read is not None:
            self._on_read(source, box)
        return part
