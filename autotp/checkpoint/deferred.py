"""Deferred tensors compute their entries when a part of them is asked for.

Between a file and a parameter runs ordinary torch code, written for whole tensors. It stacks experts, splits a fused weight,
permutes rows for rotary embeddings, or casts. That code runs on `Deferred` tensors, which have a shape and a dtype and record each
operator. `autotp.checkpoint.pullback` computes a part of the result from parts of the sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from autotp.checkpoint.nodes import Memory, Node, Op, Read, View, aten, overlay, whole_box
from autotp.checkpoint.pullback import value
from autotp.errors import CheckpointError


class Deferred(Tensor):
    """A tensor that holds no entries: a node, and its shape and dtype. It says that it is on the CPU.

    Code that asks for values (`equal`, `item`) gets them through `read`, if there is one. So does code that changes entries in
    place. All views of the tensor then have the change, as with other tensors.
    """

    _own: Node
    _viewed: Deferred | None
    _views: tuple[View, ...]
    _read: Read | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, node: Node, read: Read | None = None, base: Deferred | None = None, views: tuple[View, ...] = ()) -> Deferred:
        made = torch.Tensor._make_wrapper_subclass(cls, node.shape, dtype=node.dtype, device=torch.device("cpu"))
        assert isinstance(made, Deferred)
        made._own, made._read, made._viewed, made._views = node, read, base, views
        return made

    def __init__(self, *args: object) -> None:
        super().__init__()

    def __repr__(self, *, tensor_contents: object = None) -> str:  # type: ignore[override]
        return f"Deferred(shape={tuple(self.shape)}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in _UNCHANGED and len(args) == 1:  # most calls, of which a large checkpoint makes many
            return _unchanged(func, args[0], kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Deferred)]
        read = given[0]._read
        if func._schema.is_mutable:
            return _changed(func, args, kwargs, read)
        if not all(isinstance(r.type, torch.TensorType | torch.ListType) for r in func._schema.returns):
            return _values(func, args, kwargs, read)
        placed = {"device": "meta"} if "device" in kwargs else {}
        outcome = func(*tree_map_only(Tensor, hollow, args), **tree_map_only(Tensor, hollow, kwargs | placed))
        nodes = tree_map_only(Tensor, node_of, args), tree_map_only(Tensor, node_of, kwargs)
        is_view = isinstance(args[0], Deferred) and func._schema.returns[0].alias_info is not None

        def made(result: Tensor, index: int | None) -> Deferred:
            node = Op(tuple(result.shape), result.dtype, func, *nodes, index)
            if not is_view:
                return Deferred(node, read)
            base = args[0] if args[0]._viewed is None else args[0]._viewed
            return Deferred(node, read, base, (*args[0]._views, View(func, args[1:], kwargs, index)))

        if isinstance(outcome, Tensor):
            return made(outcome, None)
        return type(outcome)(made(o, i) for i, o in enumerate(outcome))


_UNCHANGED = frozenset((aten.alias.default, aten.detach.default, aten._to_copy.default))


def _unchanged(func: Any, x: Deferred, kwargs: Mapping[str, Any]) -> Deferred:
    """Runs operators that keep shape and order: aliases of `x`, and copies, perhaps in another dtype."""
    if func is not aten._to_copy.default:
        base = x if x._viewed is None else x._viewed
        return Deferred(x._own, x._read, base, (*x._views, View(func, (), kwargs, None)))
    node, dtype = node_of(x), kwargs.get("dtype") or x.dtype
    if dtype != node.dtype:
        node = Op(node.shape, dtype, func, (node,), {"dtype": dtype})
    return Deferred(node, x._read)


def node_of(tensor: Tensor) -> Node:
    """Returns the node that `tensor` stands for now; itself, for a tensor that is there."""
    if not isinstance(tensor, Deferred):
        return Memory(tuple(tensor.shape), tensor.dtype, tensor)
    base = tensor._viewed
    if base is None or not isinstance(base._own, Op) or base._own.func is not overlay:
        return tensor._own
    node = base._own
    for view in tensor._views:  # the tensor that this is a view of was changed
        node = view.of(Deferred(node))._own
    return node


def _changed(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], read: Read | None) -> Deferred:
    """Runs an operator that changes its first argument now, on that tensor alone; from then on its result lies over the node."""
    target = args[0]
    if not isinstance(target, Deferred) or sum(a.alias_info is not None for a in func._schema.arguments) != 1:
        raise CheckpointError(f"{func} changes a tensor of the checkpoint in place before it is read; that is not supported")
    entries = _there(target, read, func)
    func(entries, *tree_map_only(Deferred, lambda x: _there(x, read, func), args[1:]), **kwargs)
    made = Memory(tuple(entries.shape), entries.dtype, entries)
    base = target if target._viewed is None else target._viewed
    base._own = Op(base._own.shape, base._own.dtype, overlay, (base._own, made, target._views), {})
    return target


def _there(tensor: Deferred, read: Read | None, func: Any) -> Tensor:
    if read is None:
        raise CheckpointError(f"{func} asks for values of a tensor that no rank holds whole; that is not supported")
    return value(node_of(tensor), whole_box(tensor.shape), read)


def _values(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], read: Read | None) -> Any:
    """Runs an operator whose result is no tensor on values; `equal` row by row, so that no whole tensor is held."""
    if read is not None and func is aten.equal.default and isinstance(args[0], Deferred) and isinstance(args[1], Deferred):
        a, b = node_of(args[0]), node_of(args[1])
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if a.shape:
            rows = max(1, (1 << 22) // max(1, a.dtype.itemsize * args[0][0].numel()))
            boxes = [((i, min(i + rows, a.shape[0])), *whole_box(a.shape[1:])) for i in range(0, a.shape[0], rows)]
            return all(torch.equal(value(a, box, read), value(b, box, read)) for box in boxes)
    there = partial(_there, read=read, func=func)
    return func(*tree_map_only(Deferred, there, args), **tree_map_only(Deferred, there, dict(kwargs)))


def hollow(tensor: Tensor | Node) -> Tensor:
    """Returns a meta tensor of the same shape and dtype."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
