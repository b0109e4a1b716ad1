"""Makes plain attributes local: `num_heads`, `config.n_embd`, `split_sizes.0`, `axes.h`, `split.keywords.h`.

An object on the way (a config shared by all modules) is copied for the module, so no other module reads the local value.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import is_dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from autotp.errors import PlanError
from autotp.plan.spec import LocalAttribute
from autotp.rewrite.undo import Undo
from autotp.trace.tags import get, names_of, put

#: In the `__dict__` of a module with local attributes: what they are.
LOCAL = "_autotp_local"


def localise(module: nn.Module, attributes: Sequence[LocalAttribute], undo: Undo, where: str) -> None:
    """Set every attribute in `attributes` of `module` to its local value.

    Raises:
        PlanError: if an attribute is absent or does not hold the plan's global value.
    """
    copies: dict[int, Any] = {}
    undo.set_attribute(module, LOCAL, tuple(attributes))
    for attribute in attributes:
        head, *rest = attribute.path.split(".")
        if not hasattr(module, head):
            raise PlanError(f"{where}: no attribute {head!r} to make local ({attribute.path})")
        value = _changed(getattr(module, head), rest, attribute, copies, where)
        if isinstance(getattr(module, head), nn.Module):
            raise PlanError(f"{where}: {attribute.path} belongs to the module {head!r}; plan it there")
        undo.set_attribute(module, head, value)


@contextmanager
def localised(module: nn.Module, attributes: Sequence[LocalAttribute], where: str) -> Iterator[None]:
    """The attributes of `module` have their local values inside; whoever reads them outside gets the global ones.

    Raises:
        PlanError: as for `localise`.
    """
    copies: dict[int, Any] = {}
    held = module.__dict__
    saved = [(head, held[head]) for a in attributes if (head := a.path.partition(".")[0]) in held]
    try:
        for attribute in attributes:
            head, *rest = attribute.path.split(".")
            if head not in held:
                raise PlanError(f"{where}: no attribute {head!r} to make local ({attribute.path})")
            held[head] = _changed(held[head], rest, attribute, copies, where)
        yield
    finally:
        for head, value in reversed(saved):
            held[head] = value


def before(module: nn.Module, name: str, attributes: Sequence[LocalAttribute], where: str) -> Any:
    """Returns the attribute `name` of a module that was localised with `attributes`, with the global values; the module is left alone."""
    copies: dict[int, Any] = {}
    value = getattr(module, name)
    for attribute in attributes:
        head, *rest = attribute.path.split(".")
        if head == name:
            value = _changed(value, rest, replace(attribute, value=attribute.local, local=attribute.value), copies, where)
    return value


def _changed(value: Any, path: list[str], attribute: LocalAttribute, copies: dict[int, Any], where: str) -> Any:
    if not path:
        if value != attribute.value or isinstance(value, bool):
            raise PlanError(f"{where}: {attribute.path} is {value!r}, the plan was made for {attribute.value}")
        return attribute.local
    key, rest = path[0], path[1:]
    if isinstance(value, tuple | list):
        items = list(value)
        items[int(key)] = _changed(items[int(key)], rest, attribute, copies, where)
        if isinstance(value, list):
            return items
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, dict):
        actual = key if key in value else int(key)
        return {**value, actual: _changed(value[actual], rest, attribute, copies, where)}
    if type(value) is partial:
        parts: dict[str, Any] = {"args": value.args, "keywords": value.keywords}
        parts[key] = _changed(parts[key], rest, attribute, copies, where)
        return partial(value.func, *parts["args"], **parts["keywords"])
    clone = _private(value, copies, where, attribute)
    key = getattr(type(value), "attribute_map", {}).get(key, key)  # transformers' aliases: n_embd → hidden_size
    if key not in names_of(clone):
        raise PlanError(f"{where}: {type(value).__name__} holds no plain attribute {key!r} ({attribute.path})")
    put(clone, key, _changed(get(clone, key), rest, attribute, copies, where))
    return clone


def _private(value: Any, copies: dict[int, Any], where: str, attribute: LocalAttribute) -> Any:
    """Returns this module's own shallow copy of `value`: made once, found again by the original or by the copy itself."""
    if id(value) not in copies:
        if not (hasattr(value, "__dict__") or is_dataclass(value)) or isinstance(value, nn.Module):
            raise PlanError(f"{where}: cannot copy the {type(value).__name__} that holds {attribute.path}")
        clone = copy.copy(value)
        copies[id(value)] = copies[id(clone)] = clone
    return copies[id(value)]
