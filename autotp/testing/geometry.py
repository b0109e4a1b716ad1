"""Holds the sizes of an attention block and an mlp."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Geometry:
    """`kv` key/value heads, `group` query heads for each, `size` entries of a head, mlp `width`, `vocab` tokens."""

    kv: int
    group: int
    size: int
    width: int
    vocab: int

    @property
    def heads(self) -> int:
        """Query heads."""
        return self.kv * self.group
