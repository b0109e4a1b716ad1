"""Writes a plan as one HTML file: no network, light and dark. Its one script is the search of the table."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autotp.errors import InputError
from autotp.pages.render import render
from autotp.plan.kinds import Kind, kinds
from autotp.plan.page.changes import difference
from autotp.plan.page.figures import figures, nbytes
from autotp.plan.page.outline import outline, shortened
from autotp.plan.rows import table
from autotp.plan.sections import padded
from autotp.plan.spec import PlanSpec

#: Rows of the table, and of the blocks. A plan with more of them, alike ones once, is cut off, and the page says so: it stays below 1 MB.
MOST_ROWS, MOST_BLOCKS = 900, 900
#: A model with more blocks and parameters than this, alike ones once, opens only its outer levels.
_OPEN, _SHALLOW, _DEEP = 120, 4, 99


def page(plan: PlanSpec, against: Mapping[str, PlanSpec], dtype: torch.dtype) -> str:
    """Returns the page: see `Plan.to_html`.

    Raises:
        InputError: jinja2 is not installed, dtype is no torch.dtype, or `against` holds something else than plans.
    """
    if not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype is {dtype!r}, wanted a torch.dtype, as torch.bfloat16")
    if not isinstance(against, Mapping) or not all(isinstance(other, PlanSpec) for other in against.values()):
        raise InputError("against is no mapping of names to plans")
    found, kind_of = table(plan), kinds(plan)
    numbers = figures(plan, kind_of, dtype)
    root = shortened(outline(plan, found, dtype), MOST_BLOCKS)
    folder = Path(__file__).parent
    return render(
        folder / "plan.html.j2",
        script=(folder / "search.js").read_text(encoding="utf-8"),
        plan=plan,
        figures=numbers,
        dtype=str(dtype).removeprefix("torch."),
        bars=_bars(numbers.whole, numbers.held),
        padded=padded(plan),
        root=root,
        open_to=_DEEP if root.size <= _OPEN else _SHALLOW,
        rows=found.rows[:MOST_ROWS],
        more=max(len(found.rows) - MOST_ROWS, 0),
        reasons=found.reasons,
        reason_names=[list(found.names(number))[:40] for number in range(1, len(found.reasons) + 1)],
        present=[kind for kind in Kind if numbers.whole[kind]],
        names={kind: kind.name.lower() for kind in Kind},
        differences=[difference(plan, other, str(label), dtype) for label, other in against.items()],
        nbytes=nbytes,
    )


def _bars(whole: Mapping[Kind, int], held: Mapping[Kind, int]) -> list[dict[str, Any]]:
    """Two bars, in thousandths of the longer one: one device, and each rank."""
    most = max(sum(whole.values()), sum(held.values()), 1)
    found = []
    for label, parts in (("one device", whole), ("each rank", held)):
        at, pieces = 0.0, []
        for kind, size in parts.items():
            if size:
                pieces.append({"kind": kind, "x": round(at, 2), "width": round(1000 * size / most, 2), "text": nbytes(size)})
                at += 1000 * size / most
        found.append({"label": label, "total": nbytes(sum(parts.values())), "pieces": pieces})
    return found
