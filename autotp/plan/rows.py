"""Folds the parameters of a plan into the rows of a table: parameters alike but for the numbers in their names are one row.

A reason is said once for all rows that have it: the rows hold its number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from autotp.plan.kinds import Kind, kinds
from autotp.plan.layout import Layout
from autotp.plan.names import folded
from autotp.plan.spec import PlanSpec


@dataclass(frozen=True, slots=True)
class Row:
    """`count` parameters that are alike. `name` has `*` for numbers where they are several, and `first` is the first one's.

    axis: the axis that it is cut along. tied: the parameter that it is tied to. reason: the number of the reason why it is whole,
    from 1; 0 where it is cut or tied.
    """

    name: str
    count: int
    first: str
    layout: Layout
    kind: Kind
    axis: str = ""
    tied: str = ""
    reason: int = 0

    @property
    def shape(self) -> str:
        """Returns the whole shape, as `4096×1024`."""
        return _shape(self.layout.shape)

    @property
    def local_shape(self) -> str:
        """Returns the shape of each rank's part."""
        return _shape(self.layout.local_shape)

    @property
    def note(self) -> str:
        """Returns its axis, what it is tied to, or the number of its reason."""
        return f"tied to {self.tied}" if self.tied else f"[{self.reason}]" if self.reason else self.axis


@dataclass(frozen=True, slots=True)
class Table:
    """The rows in the order of the plan; reason `n` of a row is `reasons[n - 1]`. `row_of`: parameter → its row."""

    rows: tuple[Row, ...]
    reasons: tuple[str, ...]
    row_of: Mapping[str, Row]

    def names(self, reason: int) -> Iterator[str]:
        """Yields the names of the rows that have a reason, each with how many there are."""
        return (f"{row.name}{times(row.count)}" for row in self.rows if row.reason == reason)


def table(plan: PlanSpec) -> Table:
    """Returns the table of a plan. Reasons that are alike but for numbers in names are one, as the first parameter has it."""
    kind_of = kinds(plan)
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, p in plan.params.items():
        last = f"tied to {plan.aliases[name]}" if name in plan.aliases else p.axis or p.reason
        key = (folded(name), str(p.layout), str(p.layout.shape), kind_of[name], folded(last))
        groups.setdefault(key, []).append(name)
    numbers: dict[str, int] = {}
    reasons: list[str] = []
    rows: list[Row] = []
    row_of: dict[str, Row] = {}
    for names in groups.values():
        first, p = names[0], plan.params[names[0]]
        number, tied = 0, plan.aliases.get(first, "")
        if p.reason and not tied and p.layout.dim is None:
            number = numbers.setdefault(folded(p.reason), len(reasons) + 1)
            reasons += [p.reason] if number > len(reasons) else []
        name = folded(first) if len(names) > 1 else first
        rows.append(Row(name, len(names), first, p.layout, kind_of[first], p.axis, tied, number))
        row_of.update(dict.fromkeys(names, rows[-1]))
    return Table(tuple(rows), tuple(reasons), row_of)


def times(count: int) -> str:
    """` (×3)`, or nothing for one."""
    return f" (×{count})" if count > 1 else ""


def _shape(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape)) or "scalar"
