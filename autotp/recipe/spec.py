"""The parts of a recipe as plain values; each knows its place in the file, which does not count when recipes are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from autotp.recipe.yaml_source import Pos


class Role(Enum):
    """What a parameter is to the ranks; the sections of a recipe."""

    LOOKUP = "lookup"
    COLUMN = "column"
    ROW = "row"
    GATHERED = "gathered"
    PART = "part"
    INSIDE = "inside"
    WHOLE = "whole"

    @property
    def cut(self) -> bool:
        """True for parameters of which each rank holds a part."""
        return self not in (Role.INSIDE, Role.WHOLE)


@dataclass(frozen=True, slots=True)
class Entry:
    """Parameters whose names match `key`: their role and layout. `optional`: there may be none. `at`: place of the layout."""

    key: str
    role: Role
    layout: str
    optional: bool = False
    sizes: tuple[tuple[str, int], ...] = ()
    axis: str = ""
    reason: str = ""
    pos: Pos = field(default=Pos(), compare=False)
    at: Pos = field(default=Pos(), compare=False)


@dataclass(frozen=True, slots=True)
class Size:
    """The size of a name: a number, or an expression over the model's config."""

    name: str
    value: int | str
    pos: Pos = field(default=Pos(), compare=False)


@dataclass(frozen=True, slots=True)
class Shard:
    """Names that are cut together: one, or a major one and the one that is cut in pieces with it."""

    names: tuple[str, ...]
    pos: Pos = field(default=Pos(), compare=False)


@dataclass(frozen=True, slots=True)
class Attribute:
    """An int attribute that becomes local: module pattern and attribute path in `key`, its value as a layout."""

    key: str
    layout: str
    optional: bool = False
    pos: Pos = field(default=Pos(), compare=False)


@dataclass(frozen=True, slots=True)
class Boundary:
    """An argument or a part of the result of modules: `value` is enter, leave or a layout."""

    module: str
    path: str
    value: str
    optional: bool = False
    pos: Pos = field(default=Pos(), compare=False)
