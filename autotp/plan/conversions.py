"""Defines the conversions between placements, one row each.

    COPY    R → R   identity / all-reduce                     (enters a region)
    REDUCE  P → R   all-reduce / identity                     (leaves a region)
    SCATTER P → R, kept in parts over tokens: reduce-scatter / all-gather    (leaves a region, `autotp.rewrite.sequence`)
    ENTER   R, kept in parts over tokens → R: all-gather / reduce-scatter    (enters a region; products gather again for weights)
    DISPATCH, COMBINE   the same for experts that are dealt whole: each token goes to the ranks of its experts alone, and their results
            come back: all-to-all / all-to-all  (`autotp.rewrite.sequence.dispatch`)
    GATHER  S → R   all-gather, model order / own part, zero where another copy of a shared index is the owner
    LAZY_GATHER  S → R, kept in parts: gathered by the first operator that needs the whole (`autotp.rewrite.logits`)
    SLICE   R → S   own part / zero-padded part (a P gradient: COPY stands before it where a gradient is needed)
    ONCE    R → P   value on rank 0, zeros elsewhere / identity   (a bias added to a partial sum)
    HOLD    P → R   zeros, the partial sum itself is kept for a JOIN / none
    JOIN    P → P   adds what was held / identity to each summand   (REDUCE follows)

(forward / backward), with R replicated, S sharded and P a partial sum. Code that counts collectives, orders conversions or follows a
sum reads `CONVERSIONS`; `autotp.rewrite.collectives.conversions` runs them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, StrEnum
from types import MappingProxyType

from autotp.plan.expressions import Expr


class Op(Enum):
    """Kinds of conversion."""

    COPY = "copy"
    REDUCE = "reduce"
    SCATTER = "scatter"
    ENTER = "enter"
    DISPATCH = "dispatch"
    COMBINE = "combine"
    GATHER = "gather"
    LAZY_GATHER = "lazy gather"
    SLICE = "slice"
    ONCE = "once"
    HOLD = "hold"
    JOIN = "join"


class CollectiveKind(StrEnum):
    """The kinds of collective."""

    ALL_REDUCE = "all_reduce"
    REDUCE_SCATTER = "reduce_scatter"
    ALL_GATHER = "all_gather"
    ALL_TO_ALL = "all_to_all"


class When(StrEnum):
    """The pass in which a collective runs."""

    FORWARD = "forward"
    BACKWARD = "backward"


@dataclass(frozen=True, slots=True)
class ConversionRow:
    """forward, backward: the collective on either way. sums: it is, or is a part of, the reduction of a partial sum."""

    forward: CollectiveKind | None = None
    backward: CollectiveKind | None = None
    sums: bool = False

    @property
    def collectives(self) -> tuple[tuple[CollectiveKind, When], ...]:
        """Returns the collectives that it runs, each with its pass."""
        both = ((self.forward, When.FORWARD), (self.backward, When.BACKWARD))
        return tuple((kind, when) for kind, when in both if kind is not None)


#: In the order in which conversions of one tensor run.
CONVERSIONS: Mapping[Op, ConversionRow] = MappingProxyType(
    {
        Op.JOIN: ConversionRow(sums=True),
        Op.HOLD: ConversionRow(sums=True),
        Op.REDUCE: ConversionRow(forward=CollectiveKind.ALL_REDUCE, sums=True),
        Op.SCATTER: ConversionRow(CollectiveKind.REDUCE_SCATTER, CollectiveKind.ALL_GATHER, sums=True),
        Op.COMBINE: ConversionRow(CollectiveKind.ALL_TO_ALL, CollectiveKind.ALL_TO_ALL, sums=True),
        Op.GATHER: ConversionRow(forward=CollectiveKind.ALL_GATHER),
        Op.LAZY_GATHER: ConversionRow(),
        Op.COPY: ConversionRow(backward=CollectiveKind.ALL_REDUCE),
        Op.ENTER: ConversionRow(CollectiveKind.ALL_GATHER, CollectiveKind.REDUCE_SCATTER),
        Op.DISPATCH: ConversionRow(CollectiveKind.ALL_TO_ALL, CollectiveKind.ALL_TO_ALL),
        Op.SLICE: ConversionRow(),
        Op.ONCE: ConversionRow(),
    }
)
_ORDER = tuple(CONVERSIONS)


@dataclass(frozen=True, slots=True)
class Conversion:
    """One conversion of one tensor. `dim` and `expr` describe the dim that is sliced or gathered (GATHER, SLICE only)."""

    op: Op
    dim: int | None = None
    expr: Expr | None = None

    @property
    def row(self) -> ConversionRow:
        """Returns its row of `CONVERSIONS`."""
        return CONVERSIONS[self.op]


def in_order(conversions: Iterable[Conversion]) -> tuple[Conversion, ...]:
    """Returns each of `conversions` once, in the order in which they run."""
    return tuple(sorted(dict.fromkeys(conversions), key=lambda c: _ORDER.index(c.op)))
