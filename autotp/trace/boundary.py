"""Finds the tensors that cross a module boundary, in a call's arguments and in its result, each with a path.

A path of an argument starts with the parameter's name in `forward`; further steps are keys or indices. The walk enters tuples,
lists, dicts, dataclasses and the dict-like outputs of transformers. Anything else (a KV cache) is opaque.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

from autotp.plan.items import Path, step_of

OnTensor = Callable[[Path, Tensor], Tensor]
OnOther = Callable[[Path, Any], None]


@lru_cache(maxsize=4096)
def positional_names(forward: Callable[..., Any]) -> tuple[tuple[str, ...], str | None]:
    """Returns the names of the positional parameters of a class's `forward` without self, and of its *args parameter if it has one."""
    try:
        parameters = list(inspect.signature(forward).parameters.values())[1:]
    except (TypeError, ValueError):
        return (), "args"
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return names, next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)


def argument_path(module: nn.Module, position: int) -> Path:
    """Returns the path of the `position`-th positional argument of a call of `module`."""
    names, rest = positional_names(type(module).forward)
    return (names[position],) if position < len(names) else (rest or "args", position - len(names))


def flatten_arguments(module: nn.Module, args: Any, kwargs: Any, on_tensor: OnTensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with every tensor replaced by `on_tensor(path, tensor)`."""
    new_args = tuple(_walk(argument_path(module, i), a, on_tensor, None) for i, a in enumerate(args))
    return new_args, {k: _walk((k,), v, on_tensor, None) for k, v in kwargs.items()}


def flatten_result(result: Any, on_tensor: OnTensor, on_other: OnOther | None = None) -> Any:
    """Returns a call's result with every tensor replaced by `on_tensor(path, tensor)`; `on_other` gets the leaves that are no tensors."""
    return _walk((), result, on_tensor, on_other)


class Handed:
    """Copies lists and dicts of a call's arguments for the callee, to find its changes to them.

    `before`, `after`: the arguments as the caller gave them, and as the callee gets them.
    """

    def __init__(self, before: Any, after: Any) -> None:
        self._outer: dict[int, Tensor] = {}
        self._pairs: list[tuple[Any, Any, Any]] = []
        self._objects: list[tuple[Any, Any, dict[str, Any]]] = []
        self._compare(before, after)

    def _compare(self, a: Any, b: Any) -> None:
        if a is b:
            return
        if isinstance(b, Tensor):
            self._outer[id(b)] = a
            return
        if isinstance(a, dict):
            for key in a:
                self._compare(a[key], b[key])
        elif isinstance(a, (tuple, list)):
            for x, y in zip(a, b, strict=True):
                self._compare(x, y)
        elif is_dataclass(a):
            before = fields_of(a)
            for name, value in fields_of(b).items():
                self._compare(before[name], value)
            self._objects.append((a, b, fields_of(b)))
        if type(a) is type(b) and type(a) in (list, dict, OrderedDict):
            self._pairs.append((a, b, b.copy()))

    def back(self) -> bool:
        """Repeats the callee's changes of its containers on the caller's; True where there were any."""
        changed = False
        for theirs, own, before in self._objects:
            for name, value in fields_of(own).items():
                if before.get(name, self) is not value:
                    changed = True
                    object.__setattr__(theirs, name, self._outer.get(id(value), value))
        for outer, inner, items in self._pairs:
            mine = list(inner) if isinstance(inner, list) else list(inner.items())
            kept = list(items) if isinstance(items, list) else list(items.items())
            if len(mine) == len(kept) and all(_same(x, y) for x, y in zip(mine, kept, strict=True)):
                continue
            changed = True
            outer.clear()
            if isinstance(inner, list):
                outer.extend(self._outer.get(id(x), x) for x in inner)
            else:
                outer.update({k: self._outer.get(id(x), x) for k, x in inner.items()})
        return changed


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):  # an item of a dict
        return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))
    return a is b


def _walk(path: Path, item: Any, on_tensor: OnTensor, on_other: OnOther | None) -> Any:
    if isinstance(item, Tensor):
        return on_tensor(path, item)
    if isinstance(item, tuple):
        parts = [_walk((*path, i), x, on_tensor, on_other) for i, x in enumerate(item)]
        if all(a is b for a, b in zip(parts, item, strict=True)):
            return item
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    if type(item) is list:
        parts = [_walk((*path, i), x, on_tensor, on_other) for i, x in enumerate(item)]
        return item if all(a is b for a, b in zip(parts, item, strict=True)) else parts
    if isinstance(item, dict):
        changed = {k: _walk((*path, step_of(k)), v, on_tensor, on_other) for k, v in item.items()}
        if all(changed[k] is v for k, v in item.items()):
            return item
        if type(item) in (dict, OrderedDict):
            return type(item)(changed)
        made = copied(item)
        for key, value in changed.items():
            made[key] = value
        return made
    if is_dataclass(item) and not isinstance(item, type):
        found = {name: _walk((*path, name), value, on_tensor, on_other) for name, value in fields_of(item).items()}
        if all(found[name] is value for name, value in fields_of(item).items()):
            return item
        made = copy.copy(item)
        for name, value in found.items():
            object.__setattr__(made, name, value)  # a frozen one too
        return made
    if on_other is not None:
        on_other(path, item)
    return item


def copied(mapping: Any) -> Any:
    """Returns a copy of a mapping with its items in the same order.

    A copy of an output of transformers has them in the order of its class's fields. But code adds items in an order of its own, and
    reads them by their positions.
    """
    made = copy.copy(mapping)
    if isinstance(made, OrderedDict) and list(made) != list(mapping):
        for key in mapping:
            made.move_to_end(key)
    return made


def fields_of(item: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass instance that are there."""
    return {f.name: getattr(item, f.name) for f in fields(item) if hasattr(item, f.name)}
