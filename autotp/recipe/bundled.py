"""Lists the recipes that come with autotp, and finds the file that a recipe's name means."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import yaml

from autotp.errors import RecipeError
from autotp.textfile import is_file


def folder() -> Path:
    """Returns the folder of the bundled recipes: inside the package when it is installed, beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next((f for f in (package / "recipes", package.parent / "recipes") if f.is_dir()), package / "recipes")


def names() -> tuple[str, ...]:
    """Returns the names of the bundled recipes."""
    return tuple(sorted(path.stem for path in folder().glob("*.yaml")))


@cache
def families() -> Mapping[str, str]:
    """Returns model type → name of the bundled recipe that lists it."""
    found: dict[str, str] = {}
    for name in names():
        data = yaml.safe_load((folder() / f"{name}.yaml").read_text(encoding="utf-8"))
        for family in data.get("families", ()):
            found.setdefault(family, name)
    return found


def is_bundled(path: Path) -> bool:
    """True for a file of the bundled folder."""
    return path.parent == folder()


def find(source: str, *, beside: Path | None = None) -> Path:
    """Returns the file that a path, a bundled name or a model type means; relative paths are looked up in `beside`.

    Raises:
        RecipeError: there is none; lists the nearest names.
    """
    path = Path(source) if beside is None else beside / source
    if source.endswith((".yaml", ".yml")) or os.sep in source or is_file(path):
        if not is_file(path):
            raise RecipeError(f"{source}: no such recipe file")
        return path
    name = source if source in names() else families().get(source)
    if name is None:
        near = difflib.get_close_matches(source, dict.fromkeys([*names(), *families()]), n=3)
        hint = f"near it: {', '.join(near)}" if near else f"bundled are {', '.join(names())}"
        raise RecipeError(f"no recipe {source!r}: {hint}; a path ends in .yaml")
    return folder() / f"{name}.yaml"
