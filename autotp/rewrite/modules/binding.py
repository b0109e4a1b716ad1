"""Finds arguments in the calls of a forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from autotp.errors import PlanError
from autotp.plan.items import Path


class Binding:
    """Finds where an argument stands in a call of `forward`. rest: the path of a tensor inside of the argument.

    every: it is `*args`, and what is at `rest` in each of them.
    """

    __slots__ = ("every", "index", "name", "rest")

    def __init__(self, path: Path, forward: Callable[..., Any], where: str) -> None:
        if not path or not isinstance(path[0], str):
            raise PlanError(f"{where}: an input slot starts with an argument's name, got path {path}")
        name, rest = path[0], path[1:]
        parameters = list(inspect.signature(forward).parameters.values())
        if parameters and parameters[0].name == "self":
            parameters = parameters[1:]
        index: int | None = None
        takes_any = self.every = False
        for i, p in enumerate(parameters):
            if p.kind is p.VAR_POSITIONAL and p.name == name:
                self.every = not rest or not isinstance(rest[0], int)
                index, rest = (i, rest[1:]) if self.every else (i + int(rest[0]), rest[1:])
                break
            if p.kind is p.VAR_KEYWORD:
                takes_any = True
                if p.name == name and rest and isinstance(rest[0], str):
                    name, rest = rest[0], rest[1:]
            elif p.name == name and p.kind is not p.KEYWORD_ONLY:
                index = i
                break
            elif p.name == name:
                takes_any = True
        if index is None and not takes_any:
            raise PlanError(f"{where}: forward has no argument {name!r}; it takes {[p.name for p in parameters]}")
        self.index, self.name, self.rest = index, name, rest

    def given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Returns the argument in a call, all of `*args` together; None where it is left out."""
        if self.every:
            return tuple(args[self.index :])
        return args[self.index] if self.index is not None and self.index < len(args) else kwargs.get(self.name)
