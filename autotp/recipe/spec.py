"""The parts of a recipe are plain values. Each knows its place in the file, which does not count when recipes are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from autotp.plan.placements import AS_PLANNED, Placements
from autotp.plan.plan import Plan
from autotp.recipe.problems import Pos


class Role(Enum):
    """The part that a parameter plays for the ranks; each role is a section of a recipe."""

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
    """Role and layout of the parameters whose names match `key`. `optional`: there may be none. `at`: place of the layout."""

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
    """Names that are sharded together: one, or a major one and the minor one that is cut in pieces with it."""

    names: tuple[str, ...]
    pos: Pos = field(default=Pos(), compare=False)


@dataclass(frozen=True, slots=True)
class Granule:
    """The number that each rank's part of a name is a multiple of."""

    name: str
    value: int
    pos: Pos = field(default=Pos(), compare=False)


@dataclass(frozen=True, slots=True)
class Attribute:
    """An int attribute that becomes local. `key` has the module pattern and attribute path, `layout` the value as a layout."""

    key: str
    layout: str
    optional: bool = False
    pos: Pos = field(default=Pos(), compare=False)


@dataclass(frozen=True, slots=True)
class Boundary:
    """An argument, or a part of the result, of modules; `value` is enter, leave or a layout."""

    module: str
    path: str
    value: str
    optional: bool = False
    pos: Pos = field(default=Pos(), compare=False)


@dataclass(frozen=True)
class RecipeSpec:
    """The fields of a `Recipe`; functions over them do the work.

    entries: parameters by pattern, with role and layout. sizes: names and the sizes that they stand for. shard: names that are
    sharded. granules: names and the numbers that local parts are multiples of. attributes, arguments, results: the changes at modules.
    placements: choices beside layouts. trace: only a traced model can be rewritten by it. unsafe: it is used without proof, for
    `reason`. pinned: the exact plan that it was made from. See docs/recipes.md.
    """

    name: str = ""
    about: str = ""
    families: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    shard: tuple[Shard, ...] = ()
    granules: tuple[Granule, ...] = ()
    entries: tuple[Entry, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    arguments: tuple[Boundary, ...] = ()
    results: tuple[Boundary, ...] = ()
    placements: Placements = AS_PLANNED
    trace: bool = False
    unsafe: bool = False
    reason: str = ""
    pinned: Plan | None = None
    file: str = field(default="<recipe>", compare=False)

    def __post_init__(self) -> None:
        # The order in which a dump writes them: a recipe then equals the one read back.
        object.__setattr__(self, "entries", tuple(e for role in Role for e in self.entries if e.role is role))
        for name in ("arguments", "results"):
            items: tuple[Boundary, ...] = getattr(self, name)
            modules = dict.fromkeys(b.module for b in items)
            object.__setattr__(self, name, tuple(b for m in modules for b in items if b.module == m))

    @property
    def place(self) -> Pos:
        """The place under which a problem of the whole file is reported: that of its first attribute, or the file's first line."""
        return self.attributes[0].pos if self.attributes else Pos(self.file, 0 if self.file.startswith("<") else 1, 1)
