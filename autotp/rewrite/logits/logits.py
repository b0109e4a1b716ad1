"""`ParallelLogits` are logits of which each rank holds its tokens of the vocabulary, and that compute like whole ones.

They have the whole shape. Losses and whatever else can run on parts do so (`autotp.rewrite.logits.operators`); any other operator gets
the whole tensor, gathered on the spot. So every result is that of one device, and a row of logits is on no rank unless code asks for
it. They are DTensors: `full_tensor()` and `redistribute` gather them, torch's `loss_parallel` takes them.

An operator that has to gather is collective, as the model's call is: all ranks run it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from autotp.rewrite.collectives.conversions import gather
from autotp.rewrite.collectives.split import Split
from autotp.rewrite.in_parts.calls import Gathers
from autotp.rewrite.in_parts.tensor import parted
from autotp.rewrite.logits import operators
from autotp.rewrite.logits.parts import LogitsInParts
from autotp.rewrite.logits.vocabulary import Along, Vocabulary


class ParallelLogits(Gathers, LogitsInParts):
    """See the module."""

    noun, option = "logits", "loss_parallel=True"

    @classmethod
    def way(cls, func: Any) -> Callable[..., Any] | None:
        return operators.of(func)


class Show:
    """The conversion of a head's result: S → whole, in parts.

    Where no gradient is recorded, results of the model's call are made whole before the caller gets them (`whole_results`). A head that
    is called by itself then gathers, and so do code that is compiled, calls that such code makes, and ranks without a mesh (the check of
    numbers).
    """

    __slots__ = ("split", "vocabulary")

    def __init__(self, split: Split) -> None:
        self.split = split
        mesh = split.comm.mesh
        self.vocabulary = None if mesh is None else Vocabulary(split.full, split.local, split.comm, mesh)

    def __call__(self, x: Tensor) -> Tensor:
        v = self.vocabulary
        if v is None or is_dynamo_compiling():
            return gather(x, self.split)
        running = v.comm.running
        if running.inside_compiled or not (running.open or torch.is_grad_enabled()):
            return gather(x, self.split)
        held = x if v.held == x.shape[-1] else x.narrow(-1, 0, v.held).contiguous()
        return parted(ParallelLogits, Along(x.ndim - 1, v), held)
