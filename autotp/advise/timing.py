"""Turns what a rank does into seconds on given hardware."""

from __future__ import annotations

from dataclasses import dataclass

from autotp.advise.hardware import Gpu, Link
from autotp.advise.measured import Pass
from autotp.plan.conversions import CollectiveKind

#: Turns around the ring. Of an all-to-all, each rank gets (n−1)/n from the others, as of an all-gather.
_TURNS = {kind: 2 if kind is CollectiveKind.ALL_REDUCE else 1 for kind in CollectiveKind}


@dataclass(frozen=True, slots=True)
class Seconds:
    """compute: of operators. communication: of tensor-parallel collectives, which operators wait for."""

    compute: float
    communication: float

    @property
    def total(self) -> float:
        """Both together: no operator runs beside a collective."""
        return self.compute + self.communication


def seconds(done: Pass, gpu: Gpu, link: Link, tp: int, *, eager: bool) -> Seconds:
    """Seconds of a pass. `eager`: the host launches each operator, so none may take less than that."""
    compute = sum(n * gpu.seconds(w.flops, w.bytes, w.dtype) for w, n in done.work.items())
    if eager and not gpu.serial:
        compute = max(compute, done.operators * gpu.launch)
    communication = sum(n * link.seconds(_TURNS[m.kind], m.bytes, tp) for m, n in done.messages.items())
    return Seconds(compute, communication)
