"""Runs operators on lists of tensors: on the local parts where each element counts alone, DTensor's own for norms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter, tree_map_only

from autotp.rewrite.parameters.dtensor_operators.arguments import written_in
from autotp.rewrite.parameters.dtensor_operators.fused import STEPS, step_of
from autotp.rewrite.parameters.dtensor_operators.sums import owned, summed
from autotp.rewrite.parameters.dtensor_operators.views import PartView
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor, new_dtensor, same_layout
from autotp.rewrite.parameters.placements import in_dtype

_aten = torch.ops.aten
# Of `_foreach_…`: on each element too, though torch does not tag them so.
_MOVES = frozenset((_aten.copy, _aten.clone, _aten.zero))
_FOREACH = "_foreach_"


@lru_cache(maxsize=512)
def is_on_each(packet: Any) -> bool:
    """True for `_foreach_…` of an operator that works on each element alone."""
    name = packet.__name__
    base = getattr(_aten, name.removeprefix(_FOREACH).rstrip("_"), None) if name.startswith(_FOREACH) else None
    return base is not None and (base in _MOVES or any(torch.Tag.pointwise in getattr(base, o).tags for o in base.overloads()))


def _lists(args: tuple[Any, ...]) -> list[Any]:
    """The lists of tensors among `args`, without those that hold one number for each position, unless there are no others."""
    lists = [a for a in args if isinstance(a, list | tuple) and any(isinstance(t, Tensor) for t in a)]
    return [a for a in lists if any(t.ndim for t in a)] or lists


def in_step(args: tuple[Any, ...]) -> bool:
    """True for lists whose tensors at one position are placed alike, as an optimizer's are."""
    if any(type(t) is PartView for t in tree_iter(args)) or any(isinstance(a, LayoutDTensor) and not a._is_whole for a in args):
        return False
    lists = _lists(args)
    if any(len(a) != len(lists[0]) for a in lists):
        return False
    for at in zip(*lists, strict=True):
        first = at[0]
        for t in at:
            if not isinstance(t, DTensor):
                return False
            if isinstance(t, LayoutDTensor) and isinstance(first, LayoutDTensor) and not same_layout(t, first):
                return False
            if t._spec.placements != first._spec.placements or t.shape != first.shape:
                return False
    return bool(lists)


def on_lists(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], counts: bool) -> Any:
    """Runs DTensor's own operator, on the entries that each rank owns where an entry counts as often as it is there."""
    change = owned if counts else LayoutDTensor._plain
    result = func(*tree_map_only(LayoutDTensor, change, args), **tree_map_only(LayoutDTensor, change, dict(kwargs)))
    return summed(result) if counts else result


def on_each(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs an operator on the local tensors of lists that are in step; NotImplemented where the results are no parts (a maximum)."""
    local, options = tree_map_only(DTensor, _held, args), tree_map_only(DTensor, _held, dict(kwargs))
    result = step_of(func, local, options) if func.overloadpacket in STEPS else func(*local, **options)
    for t in written_in(func, args, kwargs):
        if isinstance(t, LayoutDTensor) and t._layout.is_padded:
            t._clear_padding_()
    if not isinstance(result, list | tuple):
        return result
    likes = _lists(args)[0]
    if any(r.shape != like._local_tensor.shape for r, like in zip(result, likes, strict=True)):
        return NotImplemented
    return type(result)(map(_relaid, result, likes))


def _held(x: DTensor) -> Tensor:
    """Returns the rank's part of a tensor in a list, or of a number that goes with one."""
    return x.full_tensor() if any(p.is_partial() for p in x._spec.placements) else x._local_tensor


def _relaid(result: Tensor, like: DTensor) -> DTensor:
    spec = in_dtype(like._spec, result.dtype)
    if not isinstance(like, LayoutDTensor):
        return new_dtensor(DTensor, result, spec, requires_grad=False)  # type: ignore[no-any-return]
    made = like._like(result, spec)
    if like._layout.is_padded:
        made._clear_padding_()
    return made
