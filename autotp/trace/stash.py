"""What forwards leave on modules and in their arguments: tensors that a later call or the model's user finds."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from autotp.trace.graph import Origin, Value

if TYPE_CHECKING:
    from autotp.trace.blocks import BlockRecorder

_NAMES = frozenset(nn.Module().__dict__) | {"forward"}
_DICTS = (dict, OrderedDict, defaultdict)
_DEPTH = 4


def left_on_modules(recorder: BlockRecorder) -> Iterator[tuple[str, str, Value]]:
    """(module path, attribute, value) of every tensor made by an operator that an attribute of a traced module holds now."""
    for path, module in recorder.every.items():
        if path in recorder.repeats or recorder.within(path) in recorder.repeats:
            continue
        for name, held in module.__dict__.items():
            if name not in _NAMES and name not in module._parameters and name not in module._buffers:
                for tensor in _tensors(held, _DEPTH, set()):
                    value = recorder._values.get(id(tensor))
                    if value is not None and value.origin is Origin.NODE:
                        yield path, name, value


def left_in(recorder: BlockRecorder, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str, Value]]:
    """("", argument, value) of every tensor made by an operator that a list, a dict or another object of the caller's holds now.

    A cache of transformers is left out: its model alone reads it, and may keep parts there.
    """
    for name, held in arguments.items():
        if not isinstance(held, Tensor) and not type(held).__module__.startswith("transformers."):
            for tensor in _tensors(held, _DEPTH, set()):
                value = recorder._values.get(id(tensor))
                if value is not None and value.origin is Origin.NODE:
                    yield "", f"argument {name}", value


def _tensors(item: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
        return
    if depth == 0 or isinstance(item, (str, int, float, type, nn.Module)) or item is None or id(item) in seen:
        return
    seen.add(id(item))
    if isinstance(item, (list, tuple, deque, set)):
        parts = list(item)
    elif type(item) in _DICTS:
        parts = list(item.values())
    else:
        attributes = getattr(item, "__dict__", None)
        parts = list(attributes.values()) if isinstance(attributes, dict) and not callable(item) else []
    for part in parts:
        yield from _tensors(part, depth - 1, seen)
