"""Sends each parameter's boxes from the ranks that hold them to the rank that needs them, each entry once.

Boxes are in the model's order. A *round* serves every rank at once. Each rank works out the boxes that every rank needs, so no
requests are sent. Each sends one message to every other rank, with the entries that it owns of that rank's boxes, and receives one
from each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from autotp.checkpoint.nodes import Box, Node, sizes
from autotp.errors import CheckpointError
from autotp.plan.layout import Layout
from autotp.rewrite.collectives.comm import Comm, GroupComm


@dataclass(frozen=True, slots=True, eq=False)
class Held(Node):
    """A tensor in the model's order and shape of which this rank holds `local`; `layout` None: every rank holds all of it."""

    local: Tensor
    layout: Layout | None = None


@dataclass(frozen=True, slots=True)
class Part:
    """`length` indices of the cut dim: from `at` of the box to be filled, from `start` of the owner's local tensor."""

    at: int
    start: int
    length: int


def owned_parts(layout: Layout, box: Box, rank: int) -> Iterator[Part]:
    """Yields the parts of `box` that `rank` owns, over all ranks every entry once."""
    assert layout.dim is not None
    lo, hi = box[layout.dim]
    start = 0
    for a, b in layout.owned_runs(rank):
        if a >= 0 and a < hi and b > lo:
            first, last = max(a, lo), min(b, hi)
            yield Part(first - lo, start + first - a, last - first)
        start += b - a


def _parts(held: Held, box: Box, rank: int) -> Iterator[Part]:
    assert held.layout is not None
    return owned_parts(held.layout, box, rank)


def _is_cut(held: Held) -> bool:
    return held.layout is not None and held.layout.dim is not None


def round_of(comm: Comm, needs: Sequence[Sequence[tuple[Held, Box]]]) -> list[Tensor]:
    """Run one round. Collective: `needs`, the same on every rank, holds the boxes that each rank needs, in rank order.

    Returns:
        The tensors that this rank needs: one for each of its boxes, in the box's shape.

    Raises:
        CheckpointError: a rank is gone.
    """
    inbox: dict[int, Tensor] = {}
    operations: list[dist.P2POp] = []
    for to, boxes in enumerate(needs):
        for of in range(comm.size):
            if of == to or comm.rank not in (of, to):
                continue
            if comm.rank == of:
                out = [_taken(s, box, part) for s, box in boxes if _is_cut(s) for part in _parts(s, box, of)]
                if out:
                    _post(operations, comm, dist.isend, torch.cat(out) if len(out) > 1 else out[0], to)
            else:
                count = sum(_bytes(s, box, part) for s, box in boxes if _is_cut(s) for part in _parts(s, box, of))
                if count:
                    inbox[of] = torch.empty(count, dtype=torch.uint8, device=_device(boxes))
                    _post(operations, comm, dist.irecv, inbox[of], of)
    try:
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()
    except RuntimeError as error:
        raise CheckpointError(f"another rank is gone (killed, or its connection broke): {' '.join(str(error).split())[:300]}") from error
    return _assembled(needs[comm.rank], inbox, comm)


def _post(operations: list[dist.P2POp], comm: Comm, kind: Callable[..., Any], tensor: Tensor, peer: int) -> None:
    assert isinstance(comm, GroupComm)
    operations.append(dist.P2POp(kind, tensor, dist.get_global_rank(comm.group, peer), comm.group))


def _assembled(boxes: Sequence[tuple[Held, Box]], inbox: dict[int, Tensor], comm: Comm) -> list[Tensor]:
    read = dict.fromkeys(inbox, 0)
    out: list[Tensor] = []
    for source, box in boxes:
        if not _is_cut(source):
            out.append(source.local[tuple(slice(a, b) for a, b in box)])
            continue
        assert source.layout is not None and source.layout.dim is not None
        dim = source.layout.dim
        whole = torch.empty(sizes(box), dtype=source.dtype, device=source.local.device)
        for of in range(comm.size):
            for part in _parts(source, box, of):
                into = whole.narrow(dim, part.at, part.length)
                if of == comm.rank:
                    into.copy_(_local(source, box, part))
                else:
                    count = _bytes(source, box, part)
                    into.copy_(inbox[of][read[of] : read[of] + count].view(source.dtype).view(into.shape))
                    read[of] += count
        out.append(whole)
    return out


def _local(held: Held, box: Box, part: Part) -> Tensor:
    assert held.layout is not None
    return held.local[
        tuple(slice(part.start, part.start + part.length) if d == held.layout.dim else slice(a, b) for d, (a, b) in enumerate(box))
    ]


def _taken(held: Held, box: Box, part: Part) -> Tensor:
    return _local(held, box, part).contiguous().view(-1).view(torch.uint8)


def _bytes(held: Held, box: Box, part: Part) -> int:
    assert held.layout is not None
    count = part.length * held.dtype.itemsize
    for d, (a, b) in enumerate(box):
        count *= 1 if d == held.layout.dim else b - a
    return count


def _device(boxes: Sequence[tuple[Held, Box]]) -> torch.device:
    return next(held.local.device for held, _ in boxes if _is_cut(held))
