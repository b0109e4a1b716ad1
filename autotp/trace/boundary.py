"""What crosses a module boundary: the tensors among a call's arguments and in its result, each with a path.

A path of an argument starts with the parameter's name in `forward`; further steps are keys or indices. Containers that are
walked into: tuples, lists, dicts and the dict-like outputs of transformers. Anything else (a KV cache) is opaque.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from torch import Tensor, nn

Path = tuple[str | int, ...]
OnTensor = Callable[[Path, Tensor], Tensor]
OnOther = Callable[[Path, Any], None]


@lru_cache(maxsize=4096)
def positional_names(cls: type) -> tuple[tuple[str, ...], str | None]:
    """Names of the positional parameters of `cls.forward` without self, and of its *args parameter if it has one."""
    try:
        parameters = list(inspect.signature(cls.forward).parameters.values())[1:]  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        return (), "args"
    names = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    return names, next((p.name for p in parameters if p.kind is p.VAR_POSITIONAL), None)


def argument_path(module: nn.Module, position: int) -> Path:
    """Path of the `position`-th positional argument of a call of `module`."""
    names, rest = positional_names(type(module))  # type: ignore[arg-type]  # classes are hashable
    return (names[position],) if position < len(names) else (rest or "args", position - len(names))


def flatten_arguments(module: nn.Module, args: Any, kwargs: Any, on_tensor: OnTensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with every tensor replaced by `on_tensor(path, tensor)`."""
    new_args = tuple(_walk(argument_path(module, i), a, on_tensor, None) for i, a in enumerate(args))
    return new_args, {k: _walk((k,), v, on_tensor, None) for k, v in kwargs.items()}


def flatten_result(result: Any, on_tensor: OnTensor, on_other: OnOther | None = None) -> Any:
    """A call's result with every tensor replaced by `on_tensor(path, tensor)`; `on_other` sees the leaves that are no tensors."""
    return _walk((), result, on_tensor, on_other)


def _walk(path: Path, item: Any, on_tensor: OnTensor, on_other: OnOther | None) -> Any:
    if isinstance(item, Tensor):
        return on_tensor(path, item)
    if isinstance(item, tuple):
        parts = [_walk((*path, i), x, on_tensor, on_other) for i, x in enumerate(item)]
        if all(a is b for a, b in zip(parts, item, strict=True)):
            return item
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    if type(item) is list:
        return [_walk((*path, i), x, on_tensor, on_other) for i, x in enumerate(item)]
    if isinstance(item, OrderedDict) or type(item) is dict:
        changed = {k: _walk((*path, k), v, on_tensor, on_other) for k, v in item.items()}
        if all(changed[k] is v for k, v in item.items()):
            return item
        if type(item) in (dict, OrderedDict):
            return type(item)(changed)
        return type(item)(**changed)
    if on_other is not None:
        on_other(path, item)
    return item
