"""Reads the schema of an operator for facts about its arguments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter


def named(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the arguments of a call by their names."""
    return {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)} | dict(kwargs)


def written_in(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yields the tensors among the arguments of a call that it writes into."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = kwargs.get(argument.name) if argument.kwarg_only or i >= len(args) else args[i]
            yield from (t for t in tree_iter(given) if isinstance(t, Tensor))
