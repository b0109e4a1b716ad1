"""Tells which tokens each rank holds: the dims before the last, flattened to rows, in even slices in rank order.

The rows of a batch are one run of memory, so a reduce-scatter and an all-gather move no element beside what they send, whatever the
batch size; and code that flattens batch and sequence, as mixtures of experts do, keeps the slices. (Korthikanti et al., 2022,
arXiv:2205.05198, cut the sequence dim of a [sequence, batch, width] layout, which is the same cut.)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from autotp.rewrite.collectives.comm import Comm
from autotp.rewrite.collectives.conversions import own


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of tensors [*shape, width] over the ranks of `comm`. A part is [1, .., held, width], of as many dims as the whole.

    There are `total` rows. This rank has `held` of them from `start`, in messages of `each`: each rank holds ⌈total / tp⌉, the last ones
    fewer or none. It is the `Kind` of tensors in parts.
    """

    shape: tuple[int, ...]
    comm: Comm
    total: int = field(init=False, compare=False)
    each: int = field(init=False, compare=False)
    start: int = field(init=False, compare=False)
    held: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        total = prod(self.shape)
        each = -(-total // self.comm.size)
        start = min(self.comm.rank * each, total)
        for name, value in (("total", total), ("each", each), ("start", start), ("held", min(each, total - start))):
            object.__setattr__(self, name, value)

    def __deepcopy__(self, memo: object) -> Rows:
        return self

    def part_of(self, rows: Tensor) -> Tensor:
        """[held, width] → a part."""
        return rows.view(*(1,) * (len(self.shape) - 1), *rows.shape)

    def take(self, x: Tensor) -> Tensor:
        """[*shape, width] → this rank's part; it shares memory with `x` where it can."""
        return self.part_of(x.reshape(self.total, x.shape[-1]).narrow(0, self.start, self.held))

    own = take

    def pad(self, x: Tensor) -> Tensor:
        """A part → [*shape, width] with zeros where other ranks' parts are."""
        rows = F.pad(x.reshape(self.held, x.shape[-1]), [0, 0, self.start, self.total - self.start - self.held])
        return rows.view(*self.shape, x.shape[-1])

    def join(self, x: Tensor) -> Tensor:
        """The parts of all ranks → [*shape, width]."""
        sent = x.view(torch.uint8) if x.dtype is torch.bool else x  # not every backend sends truth values
        return self.joined(self.comm.all_gather_rows(self.filled(sent))).view(x.dtype)

    def joined(self, rows: Tensor) -> Tensor:
        """What an all-gather of `filled` parts gave → [*shape, width]."""
        rows = rows if rows.shape[0] == self.total else rows.narrow(0, 0, self.total)
        return rows.view(*self.shape, rows.shape[-1])

    def sum(self, x: Tensor) -> Tensor:
        """A summand [*shape, width] on each rank → this rank's part of the sum."""
        return self.part_of(self.cut(self.comm.reduce_scatter(self.filled(x, self.comm.size))))

    def cut(self, rows: Tensor) -> Tensor:
        """What a reduce-scatter of `filled` summands gave → [held, width]."""
        return rows if rows.shape[0] == self.held else rows.narrow(0, 0, self.held).clone()

    def filled(self, x: Tensor, ranks: int = 1) -> Tensor:
        """A part, or a whole tensor for all `ranks`, as a message: [ranks · each, width], with zeros at the end."""
        rows = x.reshape(self.held if ranks == 1 else self.total, x.shape[-1])
        count = ranks * self.each
        return rows if rows.shape[0] == count else F.pad(rows, [0, 0, 0, count - rows.shape[0]])

    def received(self, grad: Tensor) -> Tensor:
        """The part of a gradient that is whole on every rank."""
        return own(grad, self)

    def beside(self, x: Tensor) -> Tensor | None:
        """The rows of a tensor that broadcasts to [*shape, any width], as a part; None where it does not. It may broadcast itself."""
        leading = x.shape[:-1]
        if len(leading) > len(self.shape):
            return None
        if all(size == 1 for size in leading):
            return x
        along = self.shape[len(self.shape) - len(leading) :]
        if any(a not in (1, b) for a, b in zip(leading, along, strict=True)):
            return None
        rest = torch.arange(self.start, self.start + self.held, device=x.device)
        at, stride = torch.zeros_like(rest), 1
        for size, full in zip(reversed(leading), reversed(along), strict=True):
            if size != 1:
                at += rest % full * stride
                stride *= size
            rest = rest // full
        return self.part_of(x.reshape(-1, x.shape[-1]).index_select(0, at))
