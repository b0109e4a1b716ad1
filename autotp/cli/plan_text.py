"""Shows a plan on a terminal: in colour, and nothing wider than the window. `str(plan)` is the text of everything else."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from types import MappingProxyType

from rich.console import Console
from rich.text import Text

from autotp.plan.kinds import Kind
from autotp.plan.report import WHY
from autotp.plan.rows import Row, Table, table
from autotp.plan.sections import costs, sections
from autotp.plan.spec import PlanSpec

_STYLES: Mapping[Kind, str] = MappingProxyType(
    {
        Kind.COLUMN: "blue",
        Kind.ROW: "magenta",
        Kind.VOCABULARY: "green",
        Kind.EXPERTS: "yellow",
        Kind.PART: "cyan",
        Kind.WHOLE: "dim",
    }
)
_GAP = "  "
_NAME = 36  # columns of a name that tell enough of it


def show(plan: PlanSpec, console: Console, *, why: bool = False) -> None:
    """Prints the plan in the width of the console.

    Args:
        plan: It.
        console: Where to.
        why: Say each reason in full, with the parameters that have it. Otherwise a reason has a line.
    """
    found = table(plan)
    lines = [*_wrapped(costs(plan), console.width), Text(), *_table(found, console.width)]
    if found.reasons:
        lines += [Text(), *_reasons(found, console.width, why)]
    for section in sections(plan, console.width - 2):
        lines += [Text(), *_wrapped(filter(None, section.title.split("\n")), console.width)]
        lines += _wrapped((f"  {line}" for line in section.lines), console.width)
    for line in lines:
        console.print(line, no_wrap=True, overflow="crop", highlight=False)


def _table(found: Table, width: int) -> Iterator[Text]:
    """A line for each row where the window is wide enough, else two or three."""
    head = ("parameter", "", "layout (* is sharded)", "shape → on each rank", "cut", "axis, or why")
    rows = [(r.name, f"×{r.count}" if r.count > 1 else "", str(r.layout), _shapes(r), r.kind.value, r.note) for r in found.rows]
    widths = [max(len(cells[i]) for cells in (head, *rows)) for i in range(6)]
    if sum(widths) + 5 * len(_GAP) > width:
        ends = max((len(f"{r.kind} {r.note}") for r in found.rows if not r.tied), default=0)
        for row in found.rows:
            yield from _stacked(row, widths[0] + len(_GAP) + widths[1], ends, width)
        return
    at = sum(widths[:4]) + 4 * len(_GAP)
    yield Text(_line(head, widths), style="bold")
    for row, cells in zip(found.rows, rows, strict=True):
        line = Text(_line(cells, widths))
        line.stylize(_STYLES[row.kind], at, at + widths[4])
        yield line


def _stacked(row: Row, names: int, ends: int, width: int) -> Iterator[Text]:
    """The name, beside it or below it how it is cut, below that its layout. `names` and `ends` are the widest of all rows."""
    count, end = f"{_GAP}×{row.count}" if row.count > 1 else "", f"{row.kind} {row.note}".rstrip()
    room = min(width - ends - len(_GAP), names)
    beside = room >= min(names, _NAME)
    name = _end(row.name, max((room if beside else width) - len(count), 8)) + count
    first = Text(name.ljust(room + len(_GAP)) if beside else name)
    lines = [first] if beside else [first, Text("    ")]
    lines[-1].append(end, style=_STYLES[row.kind])
    lines.append(Text(f"    {row.layout}{_GAP}{_shapes(row)}", style="dim"))
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        yield line


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    return _GAP.join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip()


def _shapes(row: Row) -> str:
    return row.shape if row.layout.dim is None else f"{row.shape} → {row.local_shape}"


def _end(name: str, width: int) -> str:
    """The end of a name tells more than its beginning."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def _reasons(found: Table, width: int, why: bool) -> Iterator[Text]:
    yield from _wrapped((WHY if why else f"{WHY.removesuffix(':')} (--why says it in full):",), width)
    for number, reason in enumerate(found.reasons, 1):
        if why:
            yield from _wrapped((f"  [{number}] {reason}", *(f"      {name}" for name in found.names(number))), width)
        else:
            line = Text(f"  [{number}] {reason}")
            line.truncate(width, overflow="ellipsis")
            yield line


def _wrapped(lines: Iterator[str] | tuple[str, ...], width: int) -> Iterator[Text]:
    for line in lines:
        indent = " " * (len(line) - len(line.lstrip()) + 2)
        for part in textwrap.wrap(line, max(width, len(indent) + 1), subsequent_indent=indent, break_on_hyphens=False) or [""]:
            yield Text(part)
