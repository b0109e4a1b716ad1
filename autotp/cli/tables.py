"""Makes the tables of the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.table import Table


def byte_count(count: float) -> str:
    """`1536` → `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def collectives_table(collectives: Iterable[Any], tokens: int) -> Table:
    """One line for each kind of collective and moment, alike ones counted."""
    counted: dict[tuple[str, str], list[int]] = {}
    for item in collectives:
        key = (str(getattr(item.kind, "value", item.kind)), str(getattr(item.when, "value", item.when)))
        entry = counted.setdefault(key, [0, 0])
        entry[0] += 1
        entry[1] += item.bytes
    table = Table(title=f"collectives for {tokens} token{'s' if tokens != 1 else ''}", title_justify="left", box=None, pad_edge=False)
    for column in ("kind", "when"):
        table.add_column(column)
    for column in ("count", "bytes"):
        table.add_column(column, justify="right")
    for (kind, when), (count, size) in counted.items():
        table.add_row(kind, when, str(count), byte_count(size))
    return table
