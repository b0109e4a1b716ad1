"""Matches keys of a recipe with names of a model.

A key matches a dotted name whose last parts it matches, part by part. `*` in a part stands for any characters of that part, so
``layers.*.mlp.down_proj.weight`` and ``down_proj.weight`` both match ``model.layers.0.mlp.down_proj.weight``. Where several keys
match a name, the most specific one has it: more parts first, then more letters that are no `*`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from autotp.plan.names import folded


class Pattern:
    """A key, compiled."""

    __slots__ = ("key", "length", "rank", "regex")

    def __init__(self, key: str) -> None:
        parts = key.split(".") if key else []
        self.key, self.length = key, len(parts)
        self.rank = (len(parts), len(key) - key.count("*"))
        body = r"\.".join("[^.]*".join(map(re.escape, part.split("*"))) for part in parts)
        self.regex = re.compile(body if not key else rf"(?:.*\.)?{body}")

    def matches(self, name: str) -> bool:
        """True where the key matches the name; the empty key matches the empty name (the model itself) only."""
        return self.regex.fullmatch(name) is not None


def best(patterns: Sequence[Pattern], name: str) -> list[int]:
    """Returns the indices of the most specific patterns that match: none, one, or several that are equally specific."""
    found = [i for i, p in enumerate(patterns) if p.matches(name)]
    top = max((patterns[i].rank for i in found), default=None)
    return [i for i in found if patterns[i].rank == top]


def nearest(key: str, names: Iterable[str]) -> str:
    """Returns the end of a name that is most like the key, as a hint; "" where none is near."""
    count = key.count(".") + 1
    ends = dict.fromkeys(".".join(folded(n).split(".")[-count:]) for n in names)
    near = difflib.get_close_matches(key, ends, n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else ""
