"""Writes a plan as text: its costs, a table of its parameters, why some are whole, and what follows."""

from __future__ import annotations

from autotp.plan.rows import table
from autotp.plan.sections import Section, costs, sections
from autotp.plan.spec import PlanSpec

WHY = "why parameters are whole:"
_HEAD = ("parameter", "", "shape", "layout (* is sharded)", "local shape", "cut", "axis, or why it is whole")


def render(plan: PlanSpec) -> str:
    """Writes the text that a person reads; lines are as long as they are."""
    found = table(plan)
    rows = [_HEAD]
    for row in found.rows:
        count = f"×{row.count}" if row.count > 1 else ""
        rows.append((row.name, count, row.shape, str(row.layout), row.local_shape, row.kind, row.note))
    widths = [min(max(len(r[i]) for r in rows), 60) for i in range(6)]
    lines = [*costs(plan), ""]
    for i, row_ in enumerate(rows):
        lines.append("  ".join([*(cell.ljust(w) for cell, w in zip(row_, widths, strict=False)), row_[6]]).rstrip())
        if i == 0:
            lines.append("  ".join("-" * w for w in widths))
    reasons = Section(WHY, tuple(f"[{number}] {text}" for number, text in enumerate(found.reasons, 1)))
    for section in (*([reasons] if reasons.lines else []), *sections(plan)):
        lines += ["", *([section.title] if section.title else []), *(f"  {line}" for line in section.lines)]
    return "\n".join(lines)
