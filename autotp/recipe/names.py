"""Attributes that look as if they had to become local: where no trace tells, every one has to be named.

A module's forward that reads an int with the value of something that is cut (a number of heads, a width) may compute with it. Without a
trace nobody knows, so the recipe has to say: its layout, or `whole`.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType

from torch import nn

from autotp.recipe.bind import Bound, Problems
from autotp.recipe.check import cut_sizes, own_params


def unnamed_attributes(bound: Bound) -> list[str]:
    """A problem for every such attribute that the recipe does not name."""
    problems = Problems()
    named = {(a.module, a.local.path) for a in bound.attributes}
    sizes: dict[str, set[int]] = {}
    for path, params in own_params(bound).items():
        found = {n for p in params for d in p.layout.dims for n in cut_sizes(d)}
        for near in {path, path.rpartition(".")[0]}:
            sizes.setdefault(near, set()).update(found)
    for path, wanted in sizes.items():
        module = bound.model.get_submodule(path)
        if isinstance(module, nn.Linear | nn.Embedding):
            continue  # their rewritten forms read shapes only
        read = set(_names(getattr(type(module).forward, "__code__", None)))
        for name, value in vars(module).items():
            if name in read and isinstance(value, int) and not isinstance(value, bool) and value in wanted and (path, name) not in named:
                key = f"{path + '.' if path else ''}{name}"
                text = (
                    f"{value} is also the size of something that is cut, and the forward of {type(module).__name__} reads it: "
                    f"name it under attributes:, with its layout if it must become local, else as `whole`"
                )
                problems.add(bound.recipe.file, key, text)
    return list(problems)


def _names(code: CodeType | None) -> Iterator[str]:
    if code is None:
        return
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
