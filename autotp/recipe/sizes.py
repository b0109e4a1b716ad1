"""Evaluates the sizes of names: numbers, or arithmetic over the fields of a model's config.

    num_attention_heads // num_key_value_heads
    head_dim or hidden_size // num_attention_heads        # the first that is there and not zero
    num_kv_heads if new_decoder_architecture else 1
    text_config.hidden_size, layers[0].n_heads            # nested; without a config, attributes of the model itself

Only names, whole numbers, + - * // %, comparisons, `and`, `or`, `not` and `if else` are read; nothing is called.
"""

from __future__ import annotations

import ast
import difflib
import operator
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from autotp.errors import InputError

#: Characters of an expression.
LONGEST = 500

_MATH: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Is: operator.is_,
    ast.IsNot: operator.is_not,
}
_NODES = (
    ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.BinOp, ast.BoolOp, ast.UnaryOp, ast.IfExp, ast.Compare, ast.Load, ast.And,
    ast.Or, ast.Not, *_MATH, *_COMPARE,
)  # fmt: skip


class _Missing(InputError):
    """A name that the config does not have."""


def parse_size(text: str) -> ast.expr:
    """Parses the expression of a size.

    Raises:
        InputError: it is none, or it has something that sizes may not have.
    """
    if len(text) > LONGEST:
        raise InputError(f"size {text[:40]!r}…: {len(text)} characters, wanted at most {LONGEST}")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"size {text!r} is no expression: {getattr(error, 'msg', error)}") from error
    for node in ast.walk(tree):
        for part in (node, *(p for p in ast.iter_child_nodes(node) if isinstance(p, ast.operator | ast.unaryop | ast.cmpop))):
            constant = not isinstance(part, ast.Constant) or part.value is None or isinstance(part.value, int | str)
            if not isinstance(part, _NODES) or not constant:  # an operator has no text of its own
                shown = ast.unparse(node)
                raise InputError(f"size {text!r}: {shown} may not stand in a size; names, whole numbers, + - * // % and or if else may")
    return tree


def size_of(value: int | str, model: nn.Module) -> int:
    """Returns the size that a number or an expression stands for in `model`.

    Raises:
        InputError: a field that the config does not have, with the nearest one, or a value that is no positive int.
    """
    found = value
    if isinstance(value, str):
        try:
            found = _value(parse_size(value), model)
        except (TypeError, ZeroDivisionError, IndexError, KeyError, RuntimeError, ValueError) as error:  # tensors raise the last two
            if isinstance(error, InputError):
                raise
            raise InputError(f"size {value!r} cannot be computed: {error}") from error
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        shown = repr(found) if found is None or isinstance(found, int | float | str) else f"of type {type(found).__name__}"
        raise InputError(f"size {value!r} is {shown if len(shown) < 60 else type(found).__name__}, wanted a positive int")
    return found


def _value(node: ast.expr, model: nn.Module) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.BinOp():
            left, right = _value(node.left, model), _value(node.right, model)
            if not (isinstance(left, int) and isinstance(right, int)):
                raise TypeError(f"{ast.unparse(node)} is no arithmetic of whole numbers")
            return _MATH[type(node.op)](left, right)
        case ast.UnaryOp():
            return not _value(node.operand, model)
        case ast.IfExp():
            return _value(node.body if _value(node.test, model) else node.orelse, model)
        case ast.BoolOp():
            return _any(node, model) if isinstance(node.op, ast.Or) else all(_value(v, model) for v in node.values)
        case ast.Compare():
            return _compare(node, model)
        case ast.Subscript():
            return _value(node.value, model)[_value(node.slice, model)]
        case ast.Attribute():
            return _field(_value(node.value, model), node.attr, ast.unparse(node))
        case ast.Name():
            return _root(model, node.id)
    raise AssertionError(f"parse_size lets {type(node).__name__} through")


def _any(node: ast.BoolOp, model: nn.Module) -> Any:
    missing: _Missing | None = None
    for item in node.values:
        try:
            found = _value(item, model)
        except _Missing as error:
            missing = missing or error
            continue
        if found:
            return found
    if missing is not None:
        raise missing
    return found


def _compare(node: ast.Compare, model: nn.Module) -> bool:
    left = _value(node.left, model)
    for op, item in zip(node.ops, node.comparators, strict=True):
        right = _value(item, model)
        if not _COMPARE[type(op)](left, right):
            return False
        left = right
    return True


def _root(model: nn.Module, name: str) -> Any:
    config = getattr(model, "config", None)
    for place in (config, model):
        try:
            return _field(place, name, name)
        except _Missing:
            continue
    fields = sorted({*_names(config), *_names(model)})
    near = difflib.get_close_matches(name, fields, n=3)
    where = "the model" if config is None else type(config).__name__
    raise _Missing(f"{where} has no field {name!r}" + (f"; near it: {', '.join(near)}" if near else ""))


def _field(place: Any, name: str, text: str) -> Any:
    found = place.get(name) if isinstance(place, Mapping) else getattr(place, name, None)
    if found is None:
        raise _Missing(f"{type(place).__name__} has no field {name!r} ({text})")
    return found


def _names(place: Any) -> list[str]:
    if isinstance(place, Mapping):
        return list(map(str, place))
    named = [*getattr(place, "__dict__", {}), *getattr(type(place), "attribute_map", {})]
    return [n for n in named if not n.startswith("_")]
