"""Finds the tensors that forwards leave on modules and in their arguments, where a later call or the model's user reads them."""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, MappingView
from contextlib import suppress
from functools import partial
from types import FunctionType, ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from autotp.trace.graph import Origin, Value

if TYPE_CHECKING:
    from autotp.trace.blocks import BlockRecorder

_NAMES = frozenset(nn.Module().__dict__) | {"forward"}
_HOLDERS = (list, dict, set, deque, SimpleNamespace)
_DEPTH = 4


def left_on_modules(recorder: BlockRecorder) -> Iterator[tuple[str, str, Value]]:
    """Yields (module path, attribute, value) of every tensor made by an operator that an attribute of a traced module holds now."""
    for path, module in recorder.every.items():
        if path in recorder.repeats or recorder.within(path) in recorder.repeats:
            continue
        for name, held in module.__dict__.items():
            if name not in _NAMES and name not in module._parameters and name not in module._buffers:
                closed = isinstance(held, (FunctionType, partial))
                for tensor in _tensors(list(_reach(held, 1)) if closed else held, _DEPTH, set()):
                    value = recorder.values.known(tensor)
                    if value is not None and value.origin is Origin.NODE:
                        yield path, name, value


def left_in(recorder: BlockRecorder, arguments: Mapping[str, Any]) -> Iterator[tuple[str, str, Value]]:
    """Yields ("", name, value) of every tensor made by an operator that an argument or an opaque result holds now.

    A cache of transformers is left out: its model alone reads it, and may keep parts there.
    """
    for name, held in arguments.items():
        if not isinstance(held, Tensor) and not type(held).__module__.startswith("transformers."):
            for tensor in _tensors(held, _DEPTH, set()):
                value = recorder.values.known(tensor)
                if value is not None and value.origin is Origin.NODE:
                    yield "", name, value


def left_elsewhere(recorder: BlockRecorder) -> Iterator[tuple[str, str, Value]]:
    """Yields ("", name, value) of the tensors that hooks and forwards put where they can reach: globals, closures, classes."""
    held: dict[int, Any] = {}
    for module in recorder.every.values():
        for table in (module._forward_hooks, module._forward_pre_hooks):
            for hook in table.values():
                held.update((id(item), item) for item in _reach(hook, 2) if not callable(item))
    if recorder.questions.data_vary:  # the code of transformers leaves nothing there
        for kind in {type(module) for module in recorder.every.values()}:
            if not kind.__module__.startswith("torch."):
                found = [*_reach(inspect.unwrap(kind.forward), 1), *vars(kind).values()]
                held.update((id(item), item) for item in found if isinstance(item, (*_HOLDERS, Tensor)))
    for tensor in _tensors(list(held.values()), _DEPTH, set()):
        value = recorder.values.known(tensor)
        if value is not None and value.origin is Origin.NODE:
            yield "", "what code can reach", value


def _reach(function: Any, depth: int) -> Iterator[Any]:
    """Yields the values that a function holds: cells, defaults, the object that it is bound to, globals by name; of functions among
    these too.
    """
    if isinstance(function, partial):
        parts = [function.func, *function.args, *function.keywords.values()]
    else:
        parts = [getattr(function, "__self__", None), *(getattr(function, "__defaults__", None) or ())]
        function = getattr(function, "__func__", function)
        for cell in getattr(function, "__closure__", None) or ():
            with suppress(ValueError):  # it is empty
                parts.append(cell.cell_contents)
        code, names = getattr(function, "__code__", None), getattr(function, "__globals__", {})
        parts += [names[n] for n in (code.co_names if code is not None else ()) if n in names]
        if code is None and not isinstance(function, type):
            parts += list(getattr(function, "__dict__", {}).values())
    for part in parts:
        if isinstance(part, (ModuleType, type, nn.Module)) or part is None:
            continue
        yield part
        if callable(part) and depth:
            yield from _reach(part, depth - 1)


def _tensors(item: Any, depth: int, seen: set[int]) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
        return
    if depth == 0 or item is None or isinstance(item, (str, int, float, type, nn.Module)) or id(item) in seen:
        return
    seen.add(id(item))
    if isinstance(item, (list, tuple, deque, set, frozenset, MappingView)):
        parts = [*cast("Iterable[Any]", item)]
    elif isinstance(item, Mapping):
        parts = list(item.values())
    else:
        attributes = getattr(item, "__dict__", None)
        parts = list(attributes.values()) if isinstance(attributes, dict) and not callable(item) else []
    for part in parts:
        yield from _tensors(part, depth - 1, seen)
