"""Nodes stand for tensors that are not read yet: a node says how a tensor is made of parts of files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """Stands for a tensor of this shape and dtype that is not there. A node that is no `Op` is a source, whose boxes are read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


#: (source, box) → a tensor of the box's shape in the source's dtype; it may be a view that is copied from at once.
Read = Callable[[Node, Box], Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Op(Node):
    """Result `index` (of several) of an operator; tensors among the arguments are nodes."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int | None = None

    def operands(self) -> list[Node]:
        """Returns the nodes among the arguments."""
        return [x for x in tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Node)]


@dataclass(frozen=True, slots=True, eq=False)
class Memory(Node):
    """Holds a tensor that is there after all."""

    tensor: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A call of an operator whose result is (at `index`, of several) a view of its first argument."""

    func: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    index: int | None

    def of(self, tensor: Any) -> Any:
        """Returns the view of `tensor`."""
        made = self.func(tensor, *self.args, **self.kwargs)
        return made if self.index is None else made[self.index]


aten = torch.ops.aten


def overlay(base: Tensor, entries: Tensor, views: Sequence[View]) -> Tensor:
    """Returns `base` with a view of it replaced by `entries`."""
    base = base.clone()
    view = base
    for v in views:
        view = v.of(view)
    view.copy_(entries)
    return base


def whole_box(shape: Sequence[int]) -> Box:
    """Returns the box of all entries."""
    return tuple((0, n) for n in shape)


def sizes(box: Box) -> tuple[int, ...]:
    """Returns the shape of a box."""
    return tuple(b - a for a, b in box)


def sources(node: Node) -> Iterator[Node]:
    """Yields the sources that `node` is made of, each as often as it is used."""
    if not isinstance(node, Op):
        yield node
        return
    for operand in node.operands():
        yield from sources(operand)


def uncast(node: Node) -> Node:
    """Returns `node` without the changes of dtype in it: in the dtype of its sources."""
    if not isinstance(node, Op):
        return node
    if node.func is aten._to_copy.default:
        return uncast(node.args[0])
    args = tree_map_only(Node, uncast, node.args)
    changed = replace(node, args=args)
    return replace(changed, dtype=next((x.dtype for x in changed.operands()), node.dtype))
