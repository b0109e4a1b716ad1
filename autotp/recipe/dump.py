"""Writes a recipe as YAML text: sections in the order of the schema, layouts in quotes, one line for each parameter."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from enum import Enum
from typing import Any

import yaml

from autotp.plan.codec import encode
from autotp.plan.placements import AS_PLANNED, Placements
from autotp.recipe.spec import Boundary, Entry, RecipeSpec, Role

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*\??")
_KEYWORDS = ("whole", "local")
_WORDS = frozenset(("yes", "no", "on", "off", "y", "n", "true", "false", "null", "none"))


def text_of(recipe: RecipeSpec, *, head: str = "", comments: Mapping[str, str] | None = None) -> str:
    """Returns the YAML text. `head`: comment lines in front; `comments`: key of an entry, attribute or size → the comment behind it."""
    lines = [f"# {line}".rstrip() for line in head.splitlines()]
    data = data_of(recipe)
    notes = comments or {}
    for name in [n for n in data if n != "plan"]:
        value = data[name]
        if lines and isinstance(value, dict):
            lines.append("")
        if not isinstance(value, dict):
            lines.append(f"{name}: {_word(value) if isinstance(value, str) else _flow(value)}")
            continue
        lines.append(f"{name}:")
        for key, item in value.items():
            note = notes.get(key.removesuffix("?"))
            shown = _word(item) if name == "sizes" or item in _KEYWORDS else _flow(item)
            lines.append(f"  {_key(key)}: {shown}{f'  # {note}' if note else ''}")
    if "plan" in data:
        pinned = yaml.safe_dump({"plan": data["plan"]}, sort_keys=False, width=10**6, default_flow_style=None, allow_unicode=True)
        lines += ["", "# The exact plan that this was made from; take it out when you change anything.", pinned.rstrip()]
    return "\n".join(lines) + "\n"


def data_of(recipe: RecipeSpec) -> dict[str, Any]:
    """Returns the data of the YAML text."""
    out: dict[str, Any] = {}
    if recipe.name:
        out["recipe"] = recipe.name
    if recipe.about:
        out["about"] = recipe.about
    if recipe.families:
        out["families"] = list(recipe.families)
    if recipe.trace:
        out["trace"] = "required"
    if recipe.unsafe:
        out |= {"unsafe": True, "reason": recipe.reason}
    if recipe.sizes:
        out["sizes"] = {s.name: s.value for s in recipe.sizes}
    if recipe.shard:
        out["shard"] = [" ".join(s.names) for s in recipe.shard]
    if recipe.granules:
        out["granules"] = {g.name: g.value for g in recipe.granules}
    for role in Role:
        entries = [e for e in recipe.entries if e.role is role]
        if entries:
            out[role.value] = {_optional(e.key, e.optional): _entry(e) for e in entries}
    if recipe.attributes:
        out["attributes"] = {_optional(a.key, a.optional): a.layout for a in recipe.attributes}
    for name, items in (("arguments", recipe.arguments), ("results", recipe.results)):
        if items:
            out[name] = _boundaries(items)
    if placements := _placements(recipe.placements):
        out["placements"] = placements
    if recipe.pinned is not None:
        out["plan"] = encode(recipe.pinned)
    return out


def _placements(chosen: Placements) -> dict[str, Any]:
    asked = {name: value for name, value in asdict(chosen).items() if value != getattr(AS_PLANNED, name)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in asked.items()}


def _entry(e: Entry) -> Any:
    more = {k: v for k, v in (("sizes", dict(e.sizes)), ("axis", e.axis), ("reason", e.reason)) if v}
    return {"layout": e.layout, **more} if more else e.layout


def _boundaries(items: tuple[Boundary, ...]) -> dict[str, dict[str, str]]:
    out: dict[str, dict[str, str]] = {}
    for b in items:
        out.setdefault(b.module, {})[_optional(b.path, b.optional)] = b.value
    return out


def _optional(key: str, optional: bool) -> str:
    return key + "?" if optional else key


def _key(text: str) -> str:
    return text if _PLAIN.fullmatch(text) and text.lower() not in _WORDS else json.dumps(text, ensure_ascii=False)


def _flow(value: Any) -> str:
    """Writes a value on one line, in YAML that is JSON but for the quotes around simple keys."""
    if isinstance(value, dict):
        return "{" + ", ".join(_pairs(value)) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_word(v) for v in value) + "]"
    return json.dumps(value, ensure_ascii=False)


def _pairs(value: Mapping[str, Any]) -> Iterator[str]:
    for key, item in value.items():
        plain = _PLAIN.fullmatch(key) and key.lower() not in _WORDS and not key.endswith("?")
        yield f"{key if plain else json.dumps(key, ensure_ascii=False)}: {_flow(item)}"


def _word(value: Any) -> str:
    """Writes text without quotes where it is safe without."""
    text = str(value)
    plain = re.fullmatch(r"[A-Za-z_][A-Za-z0-9_ ()/*+%.-]*", text) and text.lower() not in _WORDS and text == text.strip()
    return text if plain else json.dumps(value, ensure_ascii=False)
