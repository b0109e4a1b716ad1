"""The table of operator rules, and what rules share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autotp.axes import atoms
from autotp.axes.analysis import Context, Rule
from autotp.axes.atoms import Dim
from autotp.trace.graph import Node, Value

RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule under the base names of operators."""

    def register(function: Rule) -> Rule:
        for name in names:
            RULES[name] = function
        return function

    return register


def arg(node: Node, position: int, name: str, default: Any = None) -> Any:
    """An argument of an ATen call by position or keyword."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def dim_of(index: int, value: Value) -> int:
    """A dim index counted from the front."""
    return index % max(len(value.shape), 1)


def dims_of(index: Any, value: Value) -> list[int]:
    """A dim index or list of them counted from the front; None or [] means all."""
    if index is None or index == []:
        return list(range(len(value.shape)))
    return [dim_of(i, value) for i in (index if isinstance(index, (list, tuple)) else [index])]


def broadcast(context: Context, values: list[Value], out: Value) -> None:
    """Join the operands' dims from the right; a size-1 dim constrains nothing."""
    dims: list[Dim] = []
    for i, size in enumerate(out.shape):
        carrying: list[tuple[Value, Dim]] = []
        for value in values:
            j = i - (len(out.shape) - len(value.shape))
            if j >= 0 and value.shape[j] == size and size != 1:
                carrying.append((value, context.of(value)[j]))
        for value, dim in carrying[1:]:
            context.join(*carrying[0], value, dim)
        dims.append(carrying[0][1] if carrying else atoms.new(size))
    context.set(out, dims)
