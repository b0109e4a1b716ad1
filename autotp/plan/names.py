"""Writes the names of blocks that are alike as one name, with `*` for numbers."""

from __future__ import annotations

import re

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)")


def folded(name: str) -> str:
    """Returns a dotted name, or a text with one at its end, with the numbers that are parts of it as `*`: ``layers.*.up``."""
    return _NUMBER.sub("*", name)
