"""Holds the problems of a recipe as values, place and text; they become text when a `RecipeError` lists them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from autotp.errors import RecipeError


@dataclass(frozen=True, slots=True, order=True)
class Pos:
    """A place in a recipe: 1-based line and column; line 0 for recipes that were not read from text."""

    file: str = "<recipe>"
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file

    def after(self, characters: int) -> Pos:
        """Returns the place some characters on in the same line."""
        return Pos(self.file, self.line, self.column + characters) if self.line else self


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake, and its place."""

    pos: Pos
    text: str

    def __str__(self) -> str:
        return f"{self.pos}: {self.text}"


class Problems(list[Problem]):
    """Collects mistakes, each once although many layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, str], int] = {}

    def add(self, pos: Pos, name: str, text: str) -> None:
        """Adds a problem with `name` in front of the text; names that differ in their numbers only are reported once."""
        key = (str(pos), re.sub(r"\.\d+\b", ".*", f"{name}: {text}"))
        self.seen[key] = self.seen.get(key, 0) + 1
        if self.seen[key] == 1:
            self.append(Problem(pos, f"{name + ': ' if name else ''}{text}"))


def error_of(problems: Iterable[Problem]) -> RecipeError:
    """Returns the error that lists problems, in their order."""
    return RecipeError([str(problem) for problem in problems])
