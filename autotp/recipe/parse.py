"""Parses a source's data into one layer of a recipe: the contents of its own file, before anything is inherited."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from autotp.errors import InputError, RecipeError
from autotp.plan.codec import decode
from autotp.plan.notation import NotationError, parse
from autotp.plan.placements import Experts, Placements
from autotp.plan.plan import Plan
from autotp.recipe.problems import Pos, Problem
from autotp.recipe.schema import EntryForm, RecipeFile, validated
from autotp.recipe.sizes import parse_size
from autotp.recipe.spec import Attribute, Boundary, Entry, Granule, RecipeSpec, Role, Shard, Size
from autotp.recipe.yaml_source import Source

ENTER, LEAVE = "enter", "leave"
_NOTHING_BEHIND = re.compile(r"\|\s*\)")


@dataclass(frozen=True, slots=True)
class Layer:
    """The contents of one file. extends: (name, place). removed: table → inherited keys that are taken out. shards: it has its own list."""

    recipe: RecipeSpec
    extends: tuple[tuple[str, Pos], ...]
    removed: Mapping[str, Mapping[str, Pos]]
    shards: bool


def layer_of(source: Source, problems: list[Problem]) -> Layer | None:
    """Returns the layer of a source; problems are added with their places, None where its form is wrong."""
    form = validated(source, problems)
    if form is None:
        return None
    read = _Reading(source, problems)
    extends = form.extends if isinstance(form.extends, list) else [form.extends] if form.extends else []
    if form.unsafe and not form.reason.strip():
        text = "unsafe: true wants a reason: say why the recipe is right though it is not proven"
        problems.append(Problem(source.at(("unsafe",)), text))
    if form.reason and not form.unsafe:
        text = "reason: says why a recipe is unsafe, and this one is not (unsafe: true)"
        problems.append(Problem(source.at(("reason",), key=True), text))
    recipe = RecipeSpec(
        name=form.recipe or "",
        about=form.about,
        families=tuple(form.families),
        sizes=tuple(read.sizes(form)),
        shard=tuple(read.shard(form)),
        granules=tuple(read.granules(form)),
        entries=tuple(read.entries(form)),
        attributes=tuple(read.attributes(form)),
        arguments=tuple(read.boundaries("arguments", form.arguments)),
        results=tuple(read.boundaries("results", form.results)),
        placements=Placements(**dict(form.placements) | {"experts": Experts(form.placements.experts)}),
        trace=form.trace is not None,
        unsafe=form.unsafe,
        reason=form.reason,
        pinned=read.plan(form),
        file=source.file,
    )
    return Layer(recipe, tuple((name, source.at(("extends",))) for name in extends), read.removed, form.shard is not None)


class _Reading:
    def __init__(self, source: Source, problems: list[Problem]) -> None:
        self.source, self.problems = source, problems
        self.removed: dict[str, dict[str, Pos]] = {}

    def report(self, pos: Pos, text: str) -> None:
        """Add a problem."""
        self.problems.append(Problem(pos, text))

    def layout(self, text: str, path: tuple[str, ...]) -> None:
        """Report a text that is no layout."""
        try:
            parse(text)
            if (cut := _NOTHING_BEHIND.search(text)) is not None:  # an exact plan may hold a concatenation of one
                raise NotationError(text, cut.start(), "nothing stands behind the |")
        except NotationError as error:
            self.report(self.source.inside(path).after(error.at), f"{'.'.join(path[1:])}: layout {text!r}: {error.problem}")

    def plan(self, form: RecipeFile) -> Plan | None:
        try:
            return None if form.plan is None else decode(form.plan)
        except RecipeError as error:
            self.report(self.source.at(("plan",), key=True), str(error))
            return None

    def sizes(self, form: RecipeFile) -> list[Size]:
        for name, value in form.sizes.items():
            try:
                parse_size(str(value))
                if isinstance(value, int) and value < 1:
                    raise InputError(f"got {value}, wanted a positive number")
                if not name.isidentifier() or name == "_":
                    raise InputError(f"{name!r} cannot be the name of a factor: letters, digits and _, a letter first")
            except InputError as error:
                self.report(self.source.inside(("sizes", name)), f"sizes.{name}: {error}")
        return [Size(name, value, self.source.at(("sizes", name))) for name, value in form.sizes.items()]

    def shard(self, form: RecipeFile) -> list[Shard]:
        out: list[Shard] = []
        seen: dict[str, Pos] = {}
        for i, text in enumerate(form.shard or ()):
            pos, names = self.source.at(("shard", str(i))), tuple(text.split())
            if not 1 <= len(names) <= 2 or not all(n.isidentifier() for n in names):
                self.report(pos, f"shard: got {text!r}, wanted a name, or a major and a minor name as in `kv group`")
                continue
            for name in names:
                if name in seen:
                    self.report(pos, f"shard: {name} stands twice; first at {seen[name]}")
                seen[name] = pos
            out.append(Shard(names, pos))
        return out

    def granules(self, form: RecipeFile) -> list[Granule]:
        for name, value in form.granules.items():
            if value < 1:
                self.report(self.source.at(("granules", name)), f"granules.{name}: got {value}, wanted a positive number")
        return [Granule(name, value, self.source.at(("granules", name))) for name, value in form.granules.items()]

    def entries(self, form: RecipeFile) -> list[Entry]:
        out: dict[str, Entry] = {}
        for role in Role:
            section: Mapping[str, Any] = getattr(form, role.value)
            for text, value in section.items():
                pos = self.source.at((role.value, text), key=True)
                key, optional = _optional(text)
                self.key(key, pos)
                if value is None:
                    self.removed.setdefault("parameters", {})[key] = pos
                    continue
                if key in out:
                    self.report(pos, f"{key} stands in {out[key].role.value} and in {role.value}; first at {out[key].pos}")
                path: tuple[str, ...] = (role.value, text)
                if isinstance(value, EntryForm):
                    path = (*path, "layout")
                    entry = Entry(key, role, value.layout, optional, tuple(value.sizes.items()), value.axis, value.reason, pos)
                else:
                    entry = Entry(key, role, value, optional, pos=pos)
                self.layout(entry.layout, path)
                at = self.source.inside(path)
                out[key] = Entry(entry.key, role, entry.layout, optional, entry.sizes, entry.axis, entry.reason, pos, at)
        return list(out.values())

    def attributes(self, form: RecipeFile) -> list[Attribute]:
        out: list[Attribute] = []
        for text, value in form.attributes.items():
            pos = self.source.at(("attributes", text), key=True)
            key, optional = _optional(text)
            self.key(key, pos)
            if value is None:
                self.removed.setdefault("attributes", {})[key] = pos
                continue
            self.layout(value, ("attributes", text))
            out.append(Attribute(key, value, optional, pos))
        return out

    def boundaries(self, kind: str, table: Mapping[str, Mapping[str, str] | None]) -> list[Boundary]:
        out: list[Boundary] = []
        for text, items in table.items():
            module, none = _optional(text)
            if items is None:
                self.removed.setdefault(kind, {})[module] = self.source.at((kind, text), key=True)
                continue
            for path_text, value in items.items():
                path, missing = _optional(path_text)
                pos = self.source.at((kind, text, path_text), key=True)
                if kind == "arguments" and (value == LEAVE or not path):
                    self.report(pos, f"arguments: wanted an argument's name with `enter` or a layout, got {path!r}: {value!r}")
                elif value not in (ENTER, LEAVE):
                    self.layout(value, (kind, text, path_text))
                out.append(Boundary(module, path, value, none or missing, pos))
        return out

    def key(self, key: str, pos: Pos) -> None:
        if not key or key.startswith(".") or ".." in key or key.endswith(".") or any(c.isspace() for c in key):
            self.report(pos, f"{key!r} is no name: parts of a dotted name, * for any characters of a part")


def _optional(text: str) -> tuple[str, bool]:
    return (text[:-1], True) if text.endswith("?") else (text, False)
