"""Finds the int attributes that become local: their modules, their value and a rank's part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from autotp.plan.expressions import Expr, size
from autotp.plan.notation import UNKNOWN
from autotp.plan.spec import LocalAttribute
from autotp.recipe.binding import BoundAttribute
from autotp.recipe.patterns import Pattern, nearest
from autotp.recipe.problems import Problems
from autotp.recipe.spec import Attribute

_ABSENT: Any = object()
#: Instead of a layout: the attribute stays as it is, although its number is that of something that is cut.
WHOLE = "whole"
#: Instead of a layout: it becomes local, and the traced model tells how.
LOCAL = "local"


def bind_attributes(
    items: Iterable[Attribute],
    modules: Mapping[str, nn.Module],
    cut: Callable[[str], tuple[Expr, ...]],
    tp: int,
    problems: Problems,
) -> Iterator[BoundAttribute]:
    """Finds the attributes that `items` name; `cut` gives a layout with its factors sized and cut."""
    found: dict[tuple[str, str], tuple[Pattern, BoundAttribute]] = {}
    for item in items:
        pattern = Pattern(item.key)
        for bound in _bound(item, modules, cut, tp, problems):
            before = found.get((bound.module, bound.local.path))
            if before is not None and before[0].rank == pattern.rank:
                text = f"{before[0].key} and {item.key} match it equally well; write one of them longer"
                problems.add(item.pos, f"{bound.module}.{bound.local.path}", text)
            if before is None or before[0].rank < pattern.rank:  # the most specific key has it, as for parameters
                found[bound.module, bound.local.path] = (pattern, bound)
    yield from (bound for _, bound in found.values())


def _bound(
    item: Attribute, modules: Mapping[str, nn.Module], cut: Callable[[str], tuple[Expr, ...]], tp: int, problems: Problems
) -> Iterator[BoundAttribute]:
    hits = list(_find(item.key, modules))
    if not hits and not item.optional:
        ends = [f"{path}.{name}" for path, m in modules.items() for name in vars(m) if not name.startswith("_")]
        text = f"no module has the attribute {item.key}{nearest(item.key, ends)} (a key that may be missing ends in ?)"
        problems.add(item.pos, "attributes", text)
        return
    if item.layout in (WHOLE, LOCAL):
        for path, name, value in hits:
            yield BoundAttribute(path, LocalAttribute(name, value, value if item.layout == WHOLE else UNKNOWN), item)
        return
    dims = cut(item.layout)
    if len(dims) != 1:
        problems.add(item.pos, f"attributes.{item.key}", f'"{item.layout}" must be one dim, as "(h d)"')
        return
    if not size(dims[0]):
        if not problems:
            problems.add(item.pos, f"attributes.{item.key}", f'"{item.layout}": the size of one of its names is not known (sizes:)')
        return
    for path, name, value in hits:
        whole, part = size(dims[0]), size(dims[0], tp)
        if value != whole or isinstance(value, bool):
            problems.add(item.pos, f"{path + '.' if path else ''}{name}", f'got {value!r} in the model, and "{item.layout}" is {whole}')
            continue
        yield BoundAttribute(path, LocalAttribute(name, whole, part), item)


def _find(key: str, modules: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, Any]]:
    """(module path, attribute path, value) for every way to read the key."""
    parts = key.split(".")
    for at in range(len(parts)):
        pattern, rest = Pattern(".".join(parts[:at])), parts[at:]
        for path, module in modules.items():
            if pattern.matches(path):
                value = reach(module, rest)
                if value is not _ABSENT and isinstance(value, int):
                    yield path, ".".join(rest), value


def reach(module: nn.Module, parts: Sequence[str]) -> Any:
    """Returns the value at an attribute path that does not lead through other modules; a marker where there is none."""
    found: Any = module
    for part in parts:
        if isinstance(found, list | tuple) and part.isdigit() and int(part) < len(found):
            found = found[int(part)]
        elif isinstance(found, Mapping):
            found = found.get(part, _ABSENT)
        else:
            found = getattr(found, part, _ABSENT)
        if found is _ABSENT or isinstance(found, nn.Module):
            return _ABSENT
    return found
