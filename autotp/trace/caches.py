"""Handles functions behind `functools.lru_cache` in a trace.

A cache that is keyed by sizes would answer with the result of another trace, or of other tensors of the same size: ints with the
tags of those, fake tensors. So while a model is traced, calls with tagged ints, tensors or modules among their arguments run the
function itself, and so do calls that the cache would answer with tensors. Entries that other calls left in a cache are dropped
afterwards, unless they are plain data.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CellType, FunctionType, ModuleType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autotp.trace.ints import TaggedInt

_CACHED: Any = type(functools.lru_cache(len))
#: No model's code: what is cached there holds nothing of a trace, or is keyed by what tags do not change.
_OTHERS = frozenset(("torch", "numpy", "sympy", "autotp")) | sys.stdlib_module_names
_DECORATORS = frozenset(("functools", "lru_cache", "cache"))
_PLAIN = (bool, int, float, str, bytes, type)
Put = Callable[[], None]


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Makes the cached functions that code of a model may call behave inside as the module describes."""
    used: dict[int, Any] = {}
    twins: dict[int, Any] = {}

    def twin(cached: Any) -> Any:
        if id(cached) not in twins:
            twins[id(cached)] = _twin(cached, used)
        return twins[id(cached)]

    back: list[Put] = []
    try:
        for holder, name, value in _held(model):
            cached = _function(value)
            new = twin(cached) if cached is value else type(value)(twin(cached))
            _set(holder, name, new)
            back.append(functools.partial(_set, holder, name, value))
        yield
    finally:
        for undo in reversed(back):
            undo()
        for cached in used.values():
            cached.cache_clear()


def _twin(cached: Any, used: dict[int, Any]) -> Any:
    function = cached.__wrapped__

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _traced((args, tuple(kwargs.values()))):
            return function(*args, **kwargs)
        before = cached.cache_info().misses
        result = cached(*args, **kwargs)
        if cached.cache_info().misses != before:
            if not _plain(result):
                used[id(cached)] = cached
        elif any(isinstance(x, Tensor) for x in tree_leaves(result)):  # an earlier path's, or a real one
            return function(*args, **kwargs)
        return result

    call.cache_info, call.cache_clear, call.cache_parameters = cached.cache_info, cached.cache_clear, cached.cache_parameters  # type: ignore[attr-defined]
    return call


def _traced(item: Any) -> bool:
    if isinstance(item, (TaggedInt, Tensor, nn.Module)):
        return True
    return isinstance(item, (tuple, frozenset)) and any(_traced(x) for x in item)


def _plain(item: Any) -> bool:
    """True for data that says nothing of a trace. None is not: a function that returns it is called for its effect, once in a lifetime."""
    if isinstance(item, tuple):
        return all(_plain(x) for x in item)
    return isinstance(item, _PLAIN) and not isinstance(item, TaggedInt)


def _held(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """Returns (holder, name, value) of cached functions: globals, attributes of classes and modules, and functions inside of wrappers."""
    found: list[tuple[Any, str, Any]] = []
    for name, file in list(sys.modules.items()):
        if not isinstance(file, ModuleType) or (name != "__main__" and name.partition(".")[0] in _OTHERS):
            continue
        space = file.__dict__
        # one pass: hundreds of thousands of names are looked at for each trace
        for k, v in [(k, v) for k, v in space.items() if (t := type(v)) is _CACHED or (t is FunctionType and v.__closure__)]:
            found += [(file, k, v)] if type(v) is _CACHED else _wrapped(v)
        if not _DECORATORS.isdisjoint(space):  # thousands of classes are not worth a look where no method can be cached
            classes = [v for v in space.values() if isinstance(v, type) and v.__module__ == name]
            found += [(c, k, v) for c in classes for k, v in c.__dict__.items() if type(_function(v)) is _CACHED]
    for module in model.modules():
        found += [(module, k, v) for k, v in module.__dict__.items() if type(v) is _CACHED]
    for cls in {cls for module in model.modules() for cls in type(module).__mro__}:
        found += [each for v in map(_function, cls.__dict__.values()) if type(v) is FunctionType for each in _wrapped(v)]
    return found


def _wrapped(function: FunctionType) -> Iterator[tuple[Any, str, Any]]:
    """Yields the cached function that a wrapper around one holds (`compile_compatible_method_lru_cache` of transformers)."""
    for cell in (function.__closure__ or ()) if hasattr(function, "__wrapped__") else ():
        try:
            value = cell.cell_contents
        except ValueError:  # it is empty yet
            continue
        if type(value) is _CACHED:
            yield cell, "cell_contents", value


def _function(value: Any) -> Any:
    return value.__func__ if isinstance(value, (staticmethod, classmethod)) else value


def _set(holder: Any, name: str, value: Any) -> None:
    if isinstance(holder, (type, CellType)):
        setattr(holder, name, value)
    else:
        holder.__dict__[name] = value
