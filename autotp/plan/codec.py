"""Converts a plan to plain data and back, exactly: `decode(encode(plan)) == plan`.

Dataclasses become mappings without their fields that have default values. Layouts are spelled in full (`autotp.plan.notation`). The
annotations of the fields determine the rest.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

from autotp.errors import RecipeError
from autotp.plan.expressions import Concat, Expr, Factor, Product
from autotp.plan.layout import Layout
from autotp.plan.notation import parse, spelled
from autotp.plan.plan import Plan
from autotp.targets import MOST_RANKS


def encode(value: Any) -> Any:
    """Returns plain data of a plan, or of any value in one."""
    if isinstance(value, Factor | Product | Concat):
        return spelled(value)
    if isinstance(value, Layout):
        return {"layout": " ".join(map(spelled, value.dims)), "shape": list(value.shape), "tp": value.tp}
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value) if getattr(value, f.name) != f.default}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, frozenset):
        return sorted(encode(item) for item in value)
    return [encode(item) for item in value] if isinstance(value, tuple) else value


def decode(data: Any) -> Plan:
    """Returns the plan of its plain data.

    Raises:
        RecipeError: the data is not in the form that `encode` makes.
    """
    try:
        plan = _decode(data, Plan)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise RecipeError(f"plan: not what a plan is written as ({type(error).__name__}: {error}); take the key out") from error
    assert isinstance(plan, Plan)
    if plan.tp > MOST_RANKS:
        raise RecipeError(f"plan: it is for tp {plan.tp}, wanted at most {MOST_RANKS}; take the key out")
    return plan


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _decode(data: Any, kind: Any) -> Any:
    origin, inside = get_origin(kind), get_args(kind)
    if kind == Expr:
        (expr,) = parse(data)
        return expr
    if kind is Layout:
        return Layout(tuple(data["shape"]), parse(data["layout"]), data["tp"])
    if origin in (Union, types.UnionType):
        if set(inside) >= {Factor, Product, Concat}:
            return None if data is None else _decode(data, Expr)
        return data if data is None or type(data) in inside else _decode(data, inside[0])
    if origin is tuple:
        if inside[-1:] == (Ellipsis,):
            return tuple(_decode(item, inside[0]) for item in data)
        return tuple(_decode(item, t) for item, t in zip(data, inside, strict=True))
    if origin is frozenset:
        return frozenset(_decode(item, inside[0]) for item in data)
    if origin is not None and issubclass(origin, Mapping):
        return {key: _decode(item, inside[1]) for key, item in data.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(data)
    if is_dataclass(kind):
        hints = _hints(kind)  # type: ignore[arg-type]
        unknown = set(data) - set(hints)
        if unknown:
            raise ValueError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")  # type: ignore[union-attr]
        missing = [f.name for f in fields(kind) if f.name not in data and f.default is MISSING and f.default_factory is MISSING]
        if missing:
            raise ValueError(f"{kind.__name__} lacks {', '.join(missing)}")  # type: ignore[union-attr]
        return kind(**{name: _decode(item, hints[name]) for name, item in data.items()})  # type: ignore[operator]
    if type(data) is not kind:
        raise ValueError(f"got {data!r}, wanted {getattr(kind, '__name__', kind)}")
    return data
