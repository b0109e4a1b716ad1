"""Notes how long the lists, tuples and dicts in arguments and results were, and where in them tensors were."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any

from torch import Tensor

from autotp.plan.items import DICT, Path, Step, step_of
from autotp.trace.boundary import fields_of


@dataclass(frozen=True, slots=True)
class Container:
    """A list, tuple or plain dict in some call: its length, `DICT` for a dict, and the steps to its tensors."""

    result: bool
    path: Path
    length: int
    steps: tuple[Step, ...]


def length_of(value: Any) -> int | None:
    """Returns the length of a list or tuple, `DICT` of a plain dict; None of what has named fields, and of all else."""
    if type(value) in (dict, OrderedDict):
        return DICT
    return len(value) if isinstance(value, (tuple, list)) and not hasattr(value, "_fields") else None


def items_of(value: Any) -> list[tuple[Step, Any]]:
    """Returns the items of what `autotp.trace.boundary` goes into, each with its step."""
    if isinstance(value, tuple) or type(value) is list:
        return list(enumerate(value))
    if isinstance(value, dict):
        return [(step_of(key), item) for key, item in value.items()]
    return list(fields_of(value).items()) if is_dataclass(value) and not isinstance(value, type) else []


def holds_tensors(value: Any) -> bool:
    """True for a tensor, and for what has one inside."""
    return isinstance(value, Tensor) or any(holds_tensors(item) for _, item in items_of(value))


def containers(value: Any, *, result: bool, path: Path = ()) -> Iterator[Container]:
    """Yields the containers of a value that have tensors inside."""
    found = [(step, item) for step, item in items_of(value) if holds_tensors(item)]
    length = length_of(value)
    if found and length is not None:
        yield Container(result, path, length, tuple(step for step, _ in found))
    for step, item in found:
        yield from containers(item, result=result, path=(*path, step))
