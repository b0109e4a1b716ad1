"""The parts of a recipe as plain values; each knows its place in the file, which does not count when recipes are compared."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from autotp.plan.plan import Plan
from autotp.recipe.problems import Pos


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


@dataclass(frozen=True)
class RecipeSpec:
    """What a `Recipe` says, as fields; what is done with one is functions over them.

    entries: parameters by pattern, with role and layout. sizes: names and what they stand for. shard: names that are cut.
    granules: name → number that local parts are multiples of. attributes, arguments, results: what changes at modules.
    trace: only a traced model can be rewritten by it. unsafe: it is used without proof, for `reason`. pinned: the exact plan that it
    was made from. See docs/recipes.md.
    """

    name: str = ""
    about: str = ""
    families: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    shard: tuple[Shard, ...] = ()
    granules: tuple[tuple[str, int], ...] = ()
    entries: tuple[Entry, ...] = ()
    attributes: tuple[Attribute, ...] = ()
    arguments: tuple[Boundary, ...] = ()
    results: tuple[Boundary, ...] = ()
    trace: bool = False
    unsafe: bool = False
    reason: str = ""
    pinned: Plan | None = None
    file: str = field(default="<recipe>", compare=False)

    def __post_init__(self) -> None:
        # In the order in which they are written, so that a recipe equals what is read back.
        object.__setattr__(self, "entries", tuple(e for role in Role for e in self.entries if e.role is role))
        for name in ("arguments", "results"):
            items: tuple[Boundary, ...] = getattr(self, name)
            modules = dict.fromkeys(b.module for b in items)
            object.__setattr__(self, name, tuple(b for m in modules for b in items if b.module == m))

    @property
    def place(self) -> Pos:
        """Where a problem is said to be that belongs to the whole file: its attributes, or its first line."""
        return self.attributes[0].pos if self.attributes else Pos(self.file, 0 if self.file.startswith("<") else 1, 1)
