"""Tensors that are worked out when a part of them is asked for.

What stands between a file and a parameter (stacking experts, splitting a fused weight, a permutation for rotary embeddings, a cast)
is ordinary torch code written for whole tensors. It runs on `Deferred` tensors, which have a shape and a dtype and write down each
operator. `autotp.checkpoint.pullback` works out a part of the result from parts of the sources.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from autotp.errors import CheckpointError

Box = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """A tensor of this shape and dtype that is not there. What is no `Op` is a source, whose boxes are read."""

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
        """The nodes among the arguments."""
        return [x for x in tree_leaves((self.args, dict(self.kwargs))) if isinstance(x, Node)]


class Deferred(Tensor):
    """A tensor that holds no entries: a node, and its shape and dtype. It says that it is on the CPU.

    Code that asks for values (`equal`, `item`) gets them through `read`, if there is one.
    """

    _node: Node
    _read: Read | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, node: Node, read: Read | None = None) -> Deferred:
        made = torch.Tensor._make_wrapper_subclass(cls, node.shape, dtype=node.dtype, device=torch.device("cpu"))
        assert isinstance(made, Deferred)
        made._node, made._read = node, read
        return made

    def __init__(self, node: Node, read: Read | None = None) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Deferred)]
        read = given[0]._read
        if func._schema.is_mutable:
            raise CheckpointError(f"{func} changes a tensor of the checkpoint in place before it is read; that is not supported")
        if not all(isinstance(r.type, torch.TensorType | torch.ListType) for r in func._schema.returns):
            if read is None:
                raise CheckpointError(f"{func} asks for values of a tensor that no rank holds whole; that is not supported")
            return _values(func, args, kwargs, read)
        placed = {"device": "meta"} if "device" in kwargs else {}
        outcome = func(*tree_map_only(Deferred, hollow, args), **tree_map_only(Deferred, hollow, kwargs | placed))
        nodes = tree_map_only(Deferred, node_of, args), tree_map_only(Deferred, node_of, kwargs)
        if isinstance(outcome, Tensor):
            return Deferred(Op(tuple(outcome.shape), outcome.dtype, func, *nodes), read)
        return type(outcome)(Deferred(Op(tuple(o.shape), o.dtype, func, *nodes, i), read) for i, o in enumerate(outcome))


def _values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], read: Read) -> Any:
    """What is no tensor: the operator on values; `equal` row by row, so that no whole tensor is held."""
    from autotp.checkpoint.pullback import value

    def whole(x: Deferred) -> Tensor:
        return value(x._node, whole_box(x.shape), read)

    if func is torch.ops.aten.equal.default and isinstance(args[0], Deferred) and isinstance(args[1], Deferred) and args[0].ndim:
        a, b = args[0]._node, args[1]._node
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        rows = max(1, (1 << 22) // max(1, a.dtype.itemsize * args[0][0].numel()))
        boxes = [((i, min(i + rows, a.shape[0])), *whole_box(a.shape[1:])) for i in range(0, a.shape[0], rows)]
        return all(torch.equal(value(a, box, read), value(b, box, read)) for box in boxes)
    return func(*tree_map_only(Deferred, whole, args), **tree_map_only(Deferred, whole, dict(kwargs)))


def hollow(tensor: Tensor | Node) -> Tensor:
    """A meta tensor of the same shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def node_of(tensor: Deferred) -> Node:
    """What `tensor` stands for."""
    return tensor._node


def whole_box(shape: Sequence[int]) -> Box:
    """The box of all entries."""
    return tuple((0, n) for n in shape)


def sizes(box: Box) -> tuple[int, ...]:
    """The shape of a box."""
    return tuple(b - a for a, b in box)


def sources(node: Node) -> Iterator[Node]:
    """The sources that `node` is made of, each as often as it is used."""
    if not isinstance(node, Op):
        yield node
        return
    for operand in node.operands():
        yield from sources(operand)


def uncast(node: Node) -> Node:
    """`node` without the changes of dtype in it: in the dtype of its sources."""
    if not isinstance(node, Op):
        return node
    if node.func is torch.ops.aten._to_copy.default:
        return uncast(node.args[0])
    args = tree_map_only(Node, uncast, node.args)
    changed = replace(node, args=args)
    return replace(changed, dtype=next((x.dtype for x in changed.operands()), node.dtype))
