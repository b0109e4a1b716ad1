"""Runs any other operator on whole tensors, on every rank alike; entries that it writes go back into the parts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_iter, tree_map_only

from autotp.errors import AutoTPError
from autotp.rewrite.parameters.dtensor_operators.arguments import written_in
from autotp.rewrite.parameters.dtensor_operators.fused import STEPS, step_of
from autotp.rewrite.parameters.dtensor_operators.mixed import is_plain
from autotp.rewrite.parameters.dtensor_operators.views import PartView, view
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor


class _Wholes:
    """Makes the whole tensors of one call's arguments, each once."""

    def __init__(self) -> None:
        self._sources: dict[Any, tuple[LayoutDTensor, Tensor]] = {}  # by what they hold: two may be one, as views are of one memory
        self.made: dict[int, tuple[Tensor, Tensor]] = {}  # id of a whole tensor → it and the argument that it stands for
        self._known: dict[int, Tensor] = {}

    def __call__(self, x: Tensor) -> Tensor:
        if not isinstance(x, DTensor):
            return x
        if id(x) not in self._known:
            whole = (
                x._of(self._source(x._source))
                if isinstance(x, PartView)
                else self._source(x)
                if isinstance(x, LayoutDTensor)
                else x.full_tensor()
            )
            self._known[id(x)] = whole
            self.made[id(whole)] = whole, x
        return self._known[id(x)]

    def _source(self, x: LayoutDTensor) -> Tensor:
        key = _memory(x)
        if key not in self._sources:
            self._sources[key] = x, x._whole()
        return self._sources[key][1]

    def write_back(self, x: Tensor) -> None:
        """Writes the values of `x`, which was changed in place, into the parts."""
        if isinstance(x, LayoutDTensor):
            source = x._source if isinstance(x, PartView) else x
            source._fill_(self._source(source))
        elif isinstance(x, DTensor):
            raise AutoTPError(
                "a DTensor that autotp did not make is not written from tensors that are laid out over ranks: use full_tensor()"
            )


def _memory(x: LayoutDTensor) -> Any:
    """Equal for tensors that are one: a detached one is another object over the same part."""
    local = x._local_tensor
    return local.untyped_storage()._cdata, local.storage_offset(), tuple(local.shape), local.stride(), local.dtype


def on_whole(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], random: bool) -> Any:
    """Runs an operator on whole tensors, on every rank alike."""
    written = list(written_in(func, args, kwargs))
    one = next(t for t in tree_iter((args, dict(kwargs))) if isinstance(t, LayoutDTensor))
    records = torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tree_iter((args, dict(kwargs))))
    wholes = _Wholes()
    new_args, new_kwargs = tree_map_only(Tensor, wholes, args), tree_map_only(Tensor, wholes, dict(kwargs))
    with torch.no_grad():
        result = (step_of if func.overloadpacket in STEPS else _call)(func, new_args, new_kwargs)
        if random:
            for t in (*map(wholes, written), *(tree_iter(result) if not written else ())):
                _same_everywhere(t, one)
    for t in written:
        wholes.write_back(t)
    joins = func.overloadpacket is torch.ops.aten.cat  # joined states stay laid out: what DDP would send is refused
    beside_plain = any(is_plain(t) and (records or (t.is_floating_point() and not joins)) for t in tree_iter((args, dict(kwargs))))

    def placed(at: int, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.layout is not torch.strided:  # a sparse one is whole, and plain as gradients are
            return x
        if id(x) in wholes.made:
            return wholes.made[id(x)][1]
        if any(x is t for t in tree_iter(args)):
            return x  # a plain tensor that was written
        if func.is_view and isinstance(args[0], LayoutDTensor) and (isinstance(args[0], PartView) or not args[0]._is_whole):
            return view(args[0], x, partial(_step, func, args[1:], dict(kwargs), at))
        return x if beside_plain else one._everywhere(x)

    if isinstance(result, list | tuple):
        return type(result)(placed(i, x) for i, x in enumerate(result))
    return placed(-1, result)


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _step(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], at: int, x: Tensor) -> Tensor:
    result = func(x, *args, **kwargs)
    return result if at < 0 else result[at]  # type: ignore[no-any-return]


def _same_everywhere(x: Any, one: LayoutDTensor) -> None:
    """Rank 0's random numbers."""
    if isinstance(x, Tensor) and not x.is_meta and x.numel():
        sent = one._broadcast_(x.contiguous())
        if sent is not x:
            x.copy_(sent)
