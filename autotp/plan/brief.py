"""Writes a plan for notebooks: its costs, a table folded up by kind, the rest behind a fold. Needs no template engine."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from autotp.plan.kinds import Kind
from autotp.plan.rows import table
from autotp.plan.sections import Section, costs, sections
from autotp.plan.spec import PlanSpec

_ROWS = 200  # more of them make a notebook slow


def brief(plan: PlanSpec) -> str:
    """Returns the piece of HTML; all text of the plan is escaped."""
    found = table(plan)
    title, *rest = costs(plan)
    out = [f"<div><strong>{escape(title)}</strong>", *(f"<br>{escape(line.strip())}" for line in rest)]
    for kind in Kind:
        rows = [row for row in found.rows if row.kind is kind]
        if not rows:
            continue
        count = sum(row.count for row in rows)
        out.append(f"<details><summary>{kind}: {count} parameter{'s' if count > 1 else ''}</summary><table>")
        out.append(_row(("parameter", "×", "layout", "shape", "on each rank", "axis, or why"), "th"))
        cells = ((r.name, str(r.count), str(r.layout), r.shape, r.local_shape, r.note) for r in rows[:_ROWS])
        out += [_row(row, "td") for row in cells]
        out.append("</table>" + (f"{len(rows) - _ROWS} more rows" if len(rows) > _ROWS else "") + "</details>")
    reasons = Section("why parameters are whole", tuple(f"[{n}] {text}" for n, text in enumerate(found.reasons, 1)))
    lines = [line for s in sections(plan) for line in ("", *s.title.split("\n"), *(f"  {line}" for line in s.lines))]
    for section in (reasons, Section("sizes, collectives, checks", tuple(lines[1:]))):
        if section.lines:
            text = escape("\n".join(section.lines))
            out.append(f"<details><summary>{section.title}</summary><pre style='white-space: pre-wrap'>{text}</pre></details>")
    return "".join([*out, "</div>"])


def _row(cells: Iterable[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag} style='text-align: left'>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"
