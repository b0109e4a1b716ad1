"""Runs operators on elements on the local parts, to which a whole tensor among the arguments is cut first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autotp.errors import AutoTPError
from autotp.plan.boxes import is_even
from autotp.rewrite.parameters.data_parallel import DataParallelDTensor
from autotp.rewrite.parameters.dtensor_operators.views import PartView
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, same_layout
from autotp.rewrite.parameters.placements import in_dtype


def on_elements(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs an operator on the local tensors; NotImplemented where they are not parts alike."""
    like, local = _one_spec(args)
    if like is None or kwargs:
        like, local = _parts(func, args, kwargs)
    if like is None:
        return NotImplemented
    result = func(*local, **kwargs)
    if func._schema.name.endswith("_"):
        if like._layout.is_padded:
            args[0]._clear_padding_()
        return args[0]
    if like._is_whole and torch.is_grad_enabled() and any(_records(a) for a in args):
        return result  # a loss, to which a penalty is added
    if not isinstance(result, Tensor) or result.shape != like._local_tensor.shape:
        return like._everywhere(result) if isinstance(result, Tensor) and like._is_whole else NotImplemented
    made = like._like(result, in_dtype(like._spec, result.dtype))
    if like._layout.is_padded:  # it is not what it was made from: cos of it is 1, and a gradient would move the parameter's
        made._clear_padding_()
    return made


def _records(x: Any) -> bool:
    return isinstance(x, Tensor) and not isinstance(x, DTensor) and x.requires_grad


def _of_this_rank(args: tuple[Any, ...]) -> bool:
    """True where numbers may come of this data-parallel rank's own data: their gradient is a mean of whole ones, not of chunks."""
    if all(isinstance(a, DTensor) for a in args if isinstance(a, Tensor)):
        return False
    records = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)
    return records or torch._C._current_graph_task_id() != -1


def _one_spec(args: tuple[Any, ...]) -> tuple[LayoutDTensor | None, list[Any]]:
    """Returns one of the tensors and the local arguments where all tensors share one placement, as an optimizer's do."""
    one: LayoutDTensor | None = None
    local: list[Any] = []
    for a in args:
        if isinstance(a, Tensor):
            if one is None:
                if not isinstance(a, LayoutDTensor) or type(a) is PartView:
                    return None, local
                one = a
            elif type(a) is not type(one) or a._spec is not one._spec or a._layout is not one._layout:
                return None, local
            a = a._local_tensor
        local.append(a)
    return one, local


def _parts(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[LayoutDTensor | None, list[Any]]:
    """Returns the tensor in whose layout the operator runs, and the local arguments; None where they are not parts alike."""
    like: LayoutDTensor | None = None
    for a in args:
        if isinstance(a, LayoutDTensor):
            if type(a) is PartView:
                return None, []
            if like is None or (like._is_whole and not a._is_whole):
                like = a
    if like is None or any(isinstance(v, Tensor) for v in kwargs.values()):
        return None, []
    if func._schema.name.endswith("_") and not (isinstance(args[0], LayoutDTensor) and same_layout(args[0], like)):
        return None, []
    if isinstance(like, DataParallelDTensor) and _of_this_rank(args):
        return None, []
    local = [_local(a, like) if isinstance(a, Tensor) else a for a in args]
    if any(x is None and a is not None for x, a in zip(local, args, strict=True)):
        return None, []
    return like, local


def _local(x: Tensor, like: LayoutDTensor) -> Tensor | None:
    """Returns the operand that goes with the local tensor of `like`; None where it must be whole."""
    layout = like._layout
    if isinstance(x, LayoutDTensor):
        if x is like or same_layout(x, like):
            return x._local_tensor
        if not x._is_whole:
            return None
        x = x._local_tensor
    elif isinstance(x, DTensor):
        spec = x._spec
        if all(p.is_replicate() for p in spec.placements):
            x = x._local_tensor
        elif spec.placements == like._spec.placements and x.shape == like.shape and spec.mesh == like._spec.mesh:
            return x._local_tensor  # a gradient that compiled code made
        else:
            x = x.full_tensor()
    if x.ndim == 0 or like._is_whole:
        return x
    return like._part(x) if tuple(x.shape) == layout.shape else None


def known_order(into: Any, source: Any) -> None:
    """Raise where it cannot be told which elements `source` holds."""
    if not isinstance(into, LayoutDTensor) or isinstance(source, LayoutDTensor):
        return
    layout = into._layout
    if isinstance(source, DTensor):
        if not is_even(layout) and not all(p.is_replicate() for p in source._spec.placements):
            raise AutoTPError(
                f"a tensor in the order of the layout {layout} is not filled from a DTensor that says nothing of its order: load whole "
                "tensors, a parallel model's own state_dict, or what autotp.checkpoint.save wrote"
            )
    elif tuple(source.shape) not in ((), layout.shape) and tuple(source.shape) in (layout.local_shape, tuple(into._local_tensor.shape)):
        raise AutoTPError(
            f"a tensor of shape {layout.shape} that is laid out over ranks is filled from whole tensors, got {tuple(source.shape)}, the "
            "shape of a rank's part: write a part into to_local() of the parameter"
        )
