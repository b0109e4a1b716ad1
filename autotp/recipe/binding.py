"""Holds a recipe fitted to a model, as values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from autotp.plan.expressions import Expr, factors
from autotp.plan.layout import Layout
from autotp.plan.spec import LocalAttribute
from autotp.recipe.spec import Attribute, Boundary, Entry, RecipeSpec, Role


@dataclass(frozen=True, slots=True)
class BoundAttribute:
    """One attribute of one module."""

    module: str
    local: LocalAttribute
    attribute: Attribute


@dataclass(frozen=True, slots=True)
class BoundParam:
    """One covered parameter."""

    name: str
    entry: Entry
    layout: Layout

    @property
    def role(self) -> Role:
        """Returns the role that it plays for the ranks."""
        return self.entry.role

    @property
    def module(self) -> str:
        """Returns the path of the module that owns it."""
        return self.name.rpartition(".")[0]

    @property
    def names(self) -> frozenset[str]:
        """Returns the names of the factors that are sharded."""
        return frozenset(f.name for d in self.layout.dims for f in factors(d) if f.sharded)


@dataclass(frozen=True, slots=True)
class BoundBoundary:
    """One argument or result of one module; `dims` are None for enter and leave."""

    module: str
    path: tuple[str | int, ...]
    boundary: Boundary
    dims: tuple[Expr, ...] | None


@dataclass(frozen=True)
class Bound:
    """A recipe fitted to a model. `uncovered`: parameters that the recipe does not name. `aliases`: tied name → first name."""

    recipe: RecipeSpec
    model: nn.Module
    tp: int
    params: Mapping[str, BoundParam]
    uncovered: tuple[str, ...]
    aliases: Mapping[str, str]
    attributes: tuple[BoundAttribute, ...]
    arguments: tuple[BoundBoundary, ...]
    results: tuple[BoundBoundary, ...]

    @property
    def full(self) -> bool:
        """True when every parameter is covered."""
        return not self.uncovered

    @cached_property
    def layouts(self) -> dict[str, Layout]:
        """Returns the layouts of the covered parameters."""
        return {n: p.layout for n, p in self.params.items()}
