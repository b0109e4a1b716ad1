"""Tags the plain ints that a module holds, wherever it holds them: in attributes, tuples, settings, dicts and bound arguments.

A path says where an int is: `num_heads`, `config.n_embd`, `sizes.0`, `axes.h`, `split.keywords.h`. The rewrite
makes the int at that path local (`autotp.rewrite.attributes`), for this module alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autotp.trace.counter import Counter
from autotp.trace.ints import AttrRef, Life, TaggedInt
from autotp.trace.keep import Undo

_DEEPEST = 3  # settings in settings in settings
_LONGEST = 16  # items of a list or tuple
_MOST = 64  # items of a dict
_PLAIN = (int, float, str, bool, type(None))


class Tagger:
    """Makes tagged ints of plain ones. `counters`: (module path, attribute) → the function to call when module code computes with it.

    Tuples, lists and settings are copied. Dicts are changed where they are, and put back by `undo`: other holders see what a forward
    writes into them. Variables of closures and defaults of functions are left alone, as no guard watches them afterwards.
    """

    def __init__(self, life: Life, counters: Mapping[tuple[str, str], Callable[[], None]], undo: Undo) -> None:
        self.life, self.counters, self.undo = life, counters, undo

    def tag(self, value: Any, module: str, path: str, depth: int = 0) -> Any:
        """Returns `value` with its ints tagged; the object itself where it holds none, or holds them in a dict."""
        if type(value) is int:
            used = self.counters.get((module, path))
            ref = AttrRef(module, path, value)
            return TaggedInt(value, ref, self.life) if used is None else Counter.of(value, ref, self.life, used)
        if isinstance(value, (tuple, list)):
            return self._items(value, module, path, depth)
        if depth >= _DEEPEST:
            return value
        if type(value) is dict:
            self._dict(value, module, path, depth)
        elif type(value) is partial:
            return self._partial(value, module, path, depth)
        elif _is_config(value):
            return self._settings(value, module, path, depth)
        return value

    def _items(self, value: Any, module: str, path: str, depth: int) -> Any:
        named = hasattr(value, "_fields")
        if not 0 < len(value) <= _LONGEST or (type(value) not in (tuple, list) and not named):
            return value
        nested = type(value) is not list and depth < _DEEPEST  # the lists in a list are shared with whoever holds them, too
        items = [
            self.tag(v, module, f"{path}.{i}", depth + 1) if type(v) is int or (nested and isinstance(v, tuple)) else v
            for i, v in enumerate(value)
        ]
        if all(a is b for a, b in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if named else type(value)(items)

    def _dict(self, value: dict[Any, Any], module: str, path: str, depth: int) -> None:
        if not 0 < len(value) <= _MOST or not all(type(k) is int or (type(k) is str and "." not in k) for k in value) or not _plain(value):
            return
        for key, item in list(value.items()):
            tagged = self.tag(item, module, f"{path}.{key}", depth + 1)
            if tagged is not item:
                value[key] = tagged
                self.undo.append(partial(value.__setitem__, key, item))

    def _partial(self, value: partial[Any], module: str, path: str, depth: int) -> Any:
        arguments = self.tag(value.args, module, f"{path}.args", depth + 1)
        self._dict(value.keywords, module, f"{path}.keywords", depth + 1)
        return value if arguments is value.args else partial(value.func, *arguments, **value.keywords)

    def _settings(self, value: Any, module: str, path: str, depth: int) -> Any:
        held = {n: get(value, n) for n in names_of(value) if not n.startswith("__")}
        changes = {n: self.tag(v, module, f"{path}.{n}", depth + 1) for n, v in held.items()}
        if all(changes[n] is held[n] for n in changes):
            return value
        twin = copy.copy(value)
        for name, new in changes.items():
            put(twin, name, new)
        return twin


def names_of(value: Any) -> list[str]:
    """Returns the names of what an object of settings holds: its `__dict__`, or the fields of a dataclass with slots."""
    if hasattr(value, "__dict__"):
        return list(value.__dict__)
    return [f.name for f in dataclasses.fields(value) if hasattr(value, f.name)]


def get(value: Any, name: str) -> Any:
    """Returns what settings hold under one of `names_of`: some refuse to be read by an attribute that their layers have otherwise."""
    return value.__dict__[name] if hasattr(value, "__dict__") else getattr(value, name)


def put(value: Any, name: str, new: Any) -> None:
    """Sets an attribute of settings, frozen ones too."""
    if hasattr(value, "__dict__"):
        value.__dict__[name] = new
    else:
        object.__setattr__(value, name, new)


def _is_config(value: Any) -> bool:
    """True for a plain bag of settings: an object with a `__dict__` of its own, or a dataclass with slots, that is neither module,
    tensor, class nor function.
    """
    return (
        (hasattr(value, "__dict__") or (dataclasses.is_dataclass(value) and not isinstance(value, type)))
        and not isinstance(value, (nn.Module, Tensor, type, torch.device, torch.dtype))
        and not callable(value)
        and not isinstance(value, (dict, list, tuple, str))
        and type(value).__module__.split(".")[0] not in ("torch", "builtins", "functools")
    )


def _plain(item: Any) -> bool:
    """True for settings: numbers, texts, and containers of them."""
    if isinstance(item, dict):
        return len(item) <= _MOST and all(map(_plain, item.values()))
    if isinstance(item, (tuple, list)):
        return len(item) <= _MOST and all(map(_plain, item))
    return isinstance(item, _PLAIN)
