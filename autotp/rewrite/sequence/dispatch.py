"""Sends hidden states in token parts to the ranks of their experts, and their results back.

    dispatched   rows of this rank's tokens → rows of the tokens that have an expert here      all-to-all / all-to-all
    combined     a summand for each of those → sums for this rank's tokens                     all-to-all / all-to-all

Every rank knows the experts of all tokens, so no counts are exchanged. A token goes once to each rank that holds one of its experts,
which is at most what an all-gather sends, and nothing is dropped. The rows that a rank gets are in the order of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.sequence.rows import Rows
from autotp.rewrite.transforms import direct, refuse_transforms


@dataclass(frozen=True, slots=True)
class Route:
    """Which rows go where.

    own [m]: the numbers of this rank's rows that it sends, those for each rank in turn, `sent[i]` of them to rank i. tokens [n]: the
    numbers of the tokens that it gets, `received[i]` of them from rank i.
    """

    own: Tensor
    sent: tuple[int, ...]
    tokens: Tensor
    received: tuple[int, ...]
    kind: Rows

    @classmethod
    def of(cls, index: Tensor, spans: Sequence[tuple[int, int]], kind: Rows) -> Route:
        """Routes tokens to their experts.

        Args:
            index: [T, k], the experts of all tokens.
            spans: The experts from the first of each rank to the one after its last.
            kind: The rows that are this rank's.
        """
        rank = kind.comm.rank
        wanted = torch.stack([((index >= start) & (index < stop)).any(-1) for start, stop in spans])  # [ranks, T]
        filled = torch.nn.functional.pad(wanted, [0, kind.each * kind.comm.size - kind.total])
        counts = filled.view(len(spans), kind.comm.size, kind.each).sum(-1)  # [to, from]
        sent, received = torch.stack([counts[:, rank], counts[rank]]).tolist()
        own = wanted[:, kind.start : kind.start + kind.held].nonzero(as_tuple=True)[1]
        return cls(own, tuple(sent), wanted[rank].nonzero(as_tuple=True)[0], tuple(received), kind)

    def dispatched(self, rows: Tensor) -> Tensor:
        """[held, width] of this rank's tokens → [n, width] of those that have an expert here."""
        return _sent(rows.index_select(0, self.own), self.kind.comm, self.sent, self.received)

    def combined(self, results: Tensor) -> Tensor:
        """[n, width], a summand for each token that has an expert here → [held, width], sums for this rank's tokens."""
        back = _sent(results, self.kind.comm, self.received, self.sent)
        return back.new_zeros(self.kind.held, *back.shape[1:]).index_add(0, self.own, back)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, comm: Comm, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
        ctx.of = comm, sent, received
        return comm.all_to_all(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        comm, sent, received = ctx.of
        return _sent(grad, comm, received, sent), None, None, None


_all_to_all = direct(_AllToAll)


def _sent(rows: Tensor, comm: Comm, sent: tuple[int, ...], received: tuple[int, ...]) -> Tensor:
    if rows.requires_grad and torch.is_grad_enabled():
        refuse_transforms()
        return _all_to_all(rows, comm, sent, received)  # type: ignore[no-any-return]
    return comm.all_to_all(rows, sent, received)
