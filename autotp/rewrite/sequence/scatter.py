"""Decides in each call whether the sum that leaves a region is scattered over tokens or all-reduced: both give the same values."""

from __future__ import annotations

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import reduce
from autotp.rewrite.sequence.rows import Rows
from autotp.rewrite.sequence.tokens import scattered


class Scatter:
    """P → R, kept in token parts where it pays: in a call of the model that records gradients, of at least one token a rank.

    Decoding, and a model with code that is compiled, all-reduces. least: bytes of the whole tensor from which it is scattered. running: the
    model's own, a copy of the model has another one.
    """

    __slots__ = ("comm", "last", "least", "running")

    def __init__(self, comm: Comm, least: int) -> None:
        self.comm, self.least, self.running = comm, least, comm.running
        self.last: Rows | None = None  # the sums of one call mostly have the same rows

    def rows(self, x: Tensor, width: int = 0, item: int = 0) -> Rows | None:
        """The rows to which a summand is scattered, None where it is all-reduced. The same on every rank.

        Args:
            x: The summand, or a tensor with its rows.
            width: The summand's last dim, where `x` is not it.
            item: Bytes of an element, where `x` has others.
        """
        running = self.running
        if not running.records or running.compiles or not running.open or x.ndim < 2 or is_dynamo_compiling():
            return None
        kind, shape = self.last, x.shape[:-1]
        if kind is None or kind.shape != shape:
            kind = self.last = Rows(tuple(shape), self.comm)
        return kind if kind.total >= self.comm.size and kind.total * (width or x.shape[-1]) * (item or x.itemsize) >= self.least else None

    def __call__(self, x: Tensor) -> Tensor:
        kind = self.rows(x)
        return reduce(x, self.comm) if kind is None else scattered(x, kind)
