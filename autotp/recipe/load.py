"""Loads recipes: files and those that they extend, names, mappings, text."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from autotp.errors import RecipeError
from autotp.recipe import bundled
from autotp.recipe.parse import Layer, layer_of
from autotp.recipe.problems import Problem, error_of
from autotp.recipe.spec import RecipeSpec
from autotp.recipe.yaml_source import MOST, Source, from_data, read
from autotp.textfile import read_text, reason


def load(source: object) -> RecipeSpec:
    """Reads a recipe: see `Recipe.load`."""
    if isinstance(source, Mapping):
        return _of(from_data(source), None, ())
    if not isinstance(source, str | os.PathLike):
        raise RecipeError(f"a recipe is a path, a bundled name, a mapping or an autotp.Recipe, got {type(source).__name__}")
    if isinstance(source, str) and "\n" in source:
        return loads(source)
    return _read(bundled.find(os.fspath(source)), ())


def loads(text: str, file: str = "<text>") -> RecipeSpec:
    """Reads a recipe: see `Recipe.loads`."""
    if not isinstance(text, str):
        raise RecipeError(f"loads takes YAML text, got {type(text).__name__}; load takes more")
    return _of(read(text, file), None, ())


def merged(base: RecipeSpec, top: RecipeSpec) -> RecipeSpec:
    """Puts everything that `top` says over `base`; nothing is taken out."""
    return _merged(base, Layer(top, (), {}, bool(top.shard)), [])


def _read(path: Path, inside: tuple[Path, ...]) -> RecipeSpec:
    try:
        text = read_text(path, MOST)
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path}: cannot be read: {reason(error)}") from error
    return _of(read(text, str(path) if not bundled.is_bundled(path) else path.name), path, inside)


def _of(source: Source, path: Path | None, inside: tuple[Path, ...]) -> RecipeSpec:
    """Returns the recipe of a source: its layer over the recipe that it extends.

    `inside`: the files that are being read because they extend this one.
    """
    found: list[Problem] = []
    layer = layer_of(source, found)
    wrong = {p.pos for p in source.problems}  # a text that is wrong itself is not blamed for its form as well
    problems = [*source.problems, *(p for p in found if p.pos not in wrong)]
    base: RecipeSpec | None = None
    if layer is not None:
        for name, pos in layer.extends:
            try:
                parent = _parent(name, path, inside)
            except RecipeError as error:
                problems += [Problem(pos, f"extends {name!r}: {p}") for p in error.problems]
                continue
            base = parent if base is None else merged(base, parent)
    if layer is None or problems:
        raise error_of(sorted(problems, key=lambda p: p.pos))
    made = _merged(base or RecipeSpec(), layer, problems)
    if problems:
        raise error_of(problems)
    default = path.stem if path is not None else ""
    return replace(made, name=layer.recipe.name or default)


def _parent(name: str, path: Path | None, inside: tuple[Path, ...]) -> RecipeSpec:
    found = bundled.find(name, beside=None if path is None else path.parent)
    own = () if path is None else (path.resolve(),)
    if found.resolve() in (*inside, *own):
        raise RecipeError("it extends itself")
    return _read(found, (*inside, *own))


def _merged(base: RecipeSpec, layer: Layer, problems: list[Problem]) -> RecipeSpec:
    top = layer.recipe
    removed = layer.removed

    def pruned(kind: str, items: Sequence[Any], name: Any) -> list[Any]:
        gone = removed.get(kind, {})
        known = {name(item) for item in items}
        missing = {key: pos for key, pos in gone.items() if key not in known}
        problems.extend(Problem(pos, f"{kind}: takes out {key!r}, which is not inherited") for key, pos in missing.items())
        return [item for item in items if name(item) not in gone]

    return replace(
        top,
        about=top.about or base.about,
        sizes=_over(base.sizes, top.sizes, lambda s: s.name),
        shard=top.shard if layer.shards else base.shard,
        granules=_over(base.granules, top.granules, lambda g: g.name),
        entries=_over(pruned("parameters", base.entries, lambda e: e.key), top.entries, lambda e: e.key),
        attributes=_over(pruned("attributes", base.attributes, lambda a: a.key), top.attributes, lambda a: a.key),
        arguments=_over(pruned("arguments", base.arguments, lambda b: b.module), top.arguments, lambda b: (b.module, b.path)),
        results=_over(pruned("results", base.results, lambda b: b.module), top.results, lambda b: (b.module, b.path)),
        placements=base.placements | top.placements,
        trace=top.trace or base.trace,
        unsafe=top.unsafe or base.unsafe,
        reason=top.reason or base.reason,
    )


def _over(base: Sequence[Any], top: Sequence[Any], name: Any) -> tuple[Any, ...]:
    return tuple({**{name(item): item for item in base}, **{name(item): item for item in top}}.values())
