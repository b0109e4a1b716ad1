"""Divides a rank's part of a tensor into boxes of the model's tensor.

A checkpoint holds tensors in the model's order and true shape, as boxes that cover each once. A rank's part is a few runs of one
dim of it (`Layout.runs`). They are cut where any rank's run begins or ends, so that

- a rank owns a piece wholly or not at all, and the owned pieces of all ranks cover the tensor exactly once;
- two pieces that begin at one index have one length, on all ranks: the index names the piece.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache

from autotp.plan.layout import Layout


@dataclass(frozen=True, slots=True)
class Piece:
    """`length` indices of the sharded dim: from `at` in a rank's part, from `start` in the model's tensor.

    owned: this is the copy that is saved. Each rank's copy of a tensor that every rank holds whole is owned.
    """

    at: int
    start: int
    length: int
    owned: bool


def piece_dim(layout: Layout) -> int:
    """Returns the dim that is divided into pieces."""
    return layout.dim or 0


@lru_cache(maxsize=4096)
def pieces(layout: Layout, rank: int) -> tuple[Piece, ...]:
    """Returns the pieces of the model's tensor that `rank` holds, copies too and without padding, in the order of its local dim."""
    if layout.dim is None:
        return (Piece(0, 0, layout.shape[0] if layout.shape else 1, True),)
    edges = _edges(layout)
    owned = list(layout.owned(rank))
    made: list[Piece] = []
    local = 0
    for a, b in layout.runs(rank):
        if a >= 0:
            for start in [a, *edges[bisect_right(edges, a) : bisect_right(edges, b - 1)]]:
                at = local + start - a
                stop = min(b, edges[bisect_right(edges, start)])
                made.append(Piece(at, start, stop - start, any(lo <= at < hi for lo, hi in owned)))
        local += b - a
    return tuple(made)


@lru_cache(maxsize=1024)
def _edges(layout: Layout) -> list[int]:
    """Returns the indices where some rank's run begins or ends."""
    return sorted({edge for rank in range(layout.tp) for run in layout.runs(rank) if run[0] >= 0 for edge in run})


def within(piece: Piece, start: int, stop: int) -> list[Piece]:
    """Returns the part of `piece` that is in ``[start, stop)`` of a rank's part, counted there; nothing where there is none."""
    lo, hi = max(piece.at, start), min(piece.at + piece.length, stop)
    return [Piece(lo - start, piece.start + lo - piece.at, hi - lo, piece.owned)] if hi > lo else []


def shorter(piece: Piece, most: int) -> list[Piece]:
    """Returns `piece` in parts of at most `most` indices."""
    return [
        Piece(piece.at + i, piece.start + i, min(most, piece.length - i), piece.owned) for i in range(0, piece.length, most) or range(1)
    ]


@lru_cache(maxsize=4096)
def is_even(layout: Layout) -> bool:
    """True when the ranks' parts, one after the other, are the model's tensor."""
    end = 0
    for a, b in (run for rank in range(layout.tp if layout.dim is not None else 0) for run in layout.runs(rank)):
        if a != end:
            return False
        end = b
    return layout.dim is None or end == layout.shape[layout.dim]
