"""Flattens the arguments of an operator call into leaves in order, which the positions of a `Site` count.

Positional arguments come first, then keyword arguments in call order; lists, tuples (and `torch.Size`) and slices (start, stop,
step) are flattened. Int positions count the ints among the leaves (bools are no ints), tensor positions the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any


def map_leaves(value: Any, fn: Callable[[Any], Any]) -> Any:
    """Returns `value` rebuilt with `fn` applied to each leaf, in the order that positions count."""
    if isinstance(value, tuple):
        items = [map_leaves(item, fn) for item in value]
        if type(value).__module__ == "torch.return_types":  # the results of max, sort, …
            return type(value)(items)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, list):
        return [map_leaves(item, fn) for item in value]
    if isinstance(value, slice):
        return slice(map_leaves(value.start, fn), map_leaves(value.stop, fn), map_leaves(value.step, fn))
    return fn(value)


def map_call(args: tuple[Any, ...], kwargs: Mapping[str, Any], fn: Callable[[Any], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Applies `map_leaves` to a call's arguments."""
    return tuple(map_leaves(a, fn) for a in args), {k: map_leaves(v, fn) for k, v in kwargs.items()}


def is_int(value: object) -> bool:
    """True for the leaves that int positions count."""
    return isinstance(value, int) and not isinstance(value, bool)
