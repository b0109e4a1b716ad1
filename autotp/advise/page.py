"""Writes advice as one HTML file: no network, no script, light and dark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autotp.advise.option import Option
from autotp.advise.spec import AdviceSpec
from autotp.advise.text import PARTS, memory_rows, speed_rows, title
from autotp.advise.words import gigabytes
from autotp.pages.render import render

_LEFT, _WIDTH = 150, 640  # of the bars, in the picture's units


def page(advice: AdviceSpec) -> str:
    """Returns the page.

    Raises:
        InputError: jinja2 is not installed.
    """
    room = advice.machine.room
    scale = _WIDTH / max(room, *(o.memory.total for o in advice.options))
    return render(
        Path(__file__).with_name("report.html.j2"),
        advice=advice,
        title=title(advice),
        parts=[p for p in PARTS if any(getattr(o.memory, p) for o in advice.options)],
        bars=[_bars(o, scale) for o in advice.options],
        room=round(_LEFT + room * scale, 1),
        room_text=f"room: {gigabytes(room)}",
        best=-1 if advice.best is None else advice.options.index(advice.best),
        tables=[{"title": "Memory in numbers", "rows": memory_rows(advice)}, {"title": "Time", "rows": speed_rows(advice)}],
    )


def _bars(option: Option, scale: float) -> list[dict[str, Any]]:
    found, at = [], float(_LEFT)
    for part in PARTS:
        nbytes = getattr(option.memory, part)
        if nbytes:
            found.append({"part": part, "x": round(at, 1), "width": round(nbytes * scale, 1), "text": gigabytes(nbytes)})
            at += nbytes * scale
    return found
