"""The numbers of a plan's page: bytes of weights by kind, bytes sent for a token, costs beyond an even share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch

from autotp.plan.conversions import When
from autotp.plan.cost import busiest_work, collectives, padding_waste, repeated_share
from autotp.plan.kinds import Kind
from autotp.plan.spec import PlanSpec


@dataclass(frozen=True, slots=True)
class Figures:
    """`whole`: bytes of the weights on one device, by kind. `held`: on each of the ranks, padding included. `sent`: bytes a token."""

    elements: int
    whole: Mapping[Kind, int]
    held: Mapping[Kind, int]
    sent: Mapping[When, int]
    collectives: Mapping[When, int]
    padding: float
    repeated: float
    busiest: float

    @property
    def rows(self) -> tuple[tuple[str, str], ...]:
        """Returns what is compared with another plan, as texts."""
        return (
            ("weights on each rank", nbytes(sum(self.held.values()))),
            ("padding", f"{self.padding * 100:.1f} %"),
            ("repeated", f"{self.repeated * 100:.1f} %"),
            ("work of the busiest rank", f"{self.busiest:.2f} × the ideal"),
            *((f"sent for a token, {w}", f"{nbytes(self.sent[w])} in {self.collectives[w]} collectives") for w in When),
        )


def figures(plan: PlanSpec, kinds: Mapping[str, Kind], dtype: torch.dtype) -> Figures:
    """Returns the figures of a plan whose weights and activations are of `dtype`; a tied parameter counts once."""
    whole, held = dict.fromkeys(Kind, 0), dict.fromkeys(Kind, 0)
    for name, p in plan.params.items():
        if name not in plan.aliases:
            whole[kinds[name]] += prod(p.layout.shape) * dtype.itemsize
            held[kinds[name]] += prod(p.layout.local_shape) * dtype.itemsize
    sent, count = dict.fromkeys(When, 0), dict.fromkeys(When, 0)
    for t, found in zip(plan.traffic, collectives(plan, 1, dtype), strict=True):
        if t.width:
            sent[t.when] += found.bytes
            count[t.when] += 1
    elements = sum(whole.values()) // dtype.itemsize
    return Figures(elements, whole, held, sent, count, padding_waste(plan), repeated_share(plan), busiest_work(plan))


def nbytes(count: float) -> str:
    """`1536` → `1.54 kB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
