"""Decides how an operator on tensors that are laid out over ranks runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from autotp.errors import AutoTPError
from autotp.rewrite.parameters.data_parallel import NO_DDP
from autotp.rewrite.parameters.dtensor_operators.elements import known_order, on_elements
from autotp.rewrite.parameters.dtensor_operators.fused import STEPS
from autotp.rewrite.parameters.dtensor_operators.lists import in_step, is_on_each, on_each, on_lists
from autotp.rewrite.parameters.dtensor_operators.mixed import keep_kinds, mark_activations, refuse_on_parts
from autotp.rewrite.parameters.dtensor_operators.sums import counts_once, norms_of, order_of, owned, summed, with_dims
from autotp.rewrite.parameters.dtensor_operators.views import PartView
from autotp.rewrite.parameters.dtensor_operators.wholes import on_whole
from autotp.rewrite.parameters.layout_dtensor import LayoutDTensor

_aten = torch.ops.aten
_detach, _copy_ = _aten.detach.default, _aten.copy_.default
# Operators in which an entry counts as often as it is there.
_COUNTING = frozenset(
    getattr(_aten, name)
    for name in ("linalg_vector_norm", "norm", "_foreach_norm", "linalg__powsum", "_foreach_powsum", "sum")
    if hasattr(_aten, name)
)
_NORMS = frozenset((_aten.linalg_vector_norm, _aten._foreach_norm))
# On elements too, though torch does not tag them so.
_ON_ELEMENTS = frozenset(
    getattr(_aten, name)
    for name in ("copy_", "fill_", "zero_", "masked_fill_", "_to_copy", "zeros_like", "ones_like", "empty_like", "full_like", "alias")
)
# Lists that DTensor reduces rightly.
_REDUCED = frozenset(
    getattr(_aten, name)
    for name in ("_foreach_norm", "_foreach_powsum", "_amp_foreach_non_finite_check_and_unscale_")
    if hasattr(_aten, name)
)
_RESHAPES = frozenset((_aten.view, _aten._unsafe_view, _aten.expand))
_COLLECTIVES = frozenset(("c10d", "_c10d_functional", "_c10d_functional_autograd"))
_LISTS = ("aten::_foreach_", "aten::_fused_", "aten::_amp_")


@lru_cache(maxsize=4096)
def _kind(func: Any) -> tuple[bool, bool]:
    """Returns whether an operator draws random numbers, and whether it works on each element alone."""
    random = torch.Tag.nondeterministic_seeded in func.tags
    return random, (torch.Tag.pointwise in func.tags and not random) or func.overloadpacket in _ON_ELEMENTS


#: Whole layers of torch in evaluation without gradients. They take what their module got, which is whole at its boundary.
_LAYERS = (torch.ops.aten._transformer_encoder_layer_fwd.default, torch.ops.aten._native_multi_head_attention.default)


def operate(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Runs `func(*args, **kwargs)`, some of whose arguments are laid out over ranks."""
    if func is _detach and type(args[0]) is not PartView:
        return args[0]._like(args[0]._local_tensor, args[0]._spec)
    if func.namespace in _COLLECTIVES:
        raise AutoTPError(
            f"{NO_DDP}. Other collectives ({func}) on a tensor that is laid out over tensor-parallel ranks: give them to_local(), this "
            "rank's part, over a group that does not hold other parts of it"
        )
    beside_plain = func in _LAYERS or refuse_on_parts(args, kwargs)
    result = _run(func, args, kwargs)
    if beside_plain:
        mark_activations(result)
    return result


def _run(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if torch.is_grad_enabled():
        keep_kinds(args, kwargs)
    if func is _copy_:
        known_order(args[0], args[1])
    packet = func.overloadpacket
    random, works_on_elements = _kind(func)
    if works_on_elements:
        if (result := on_elements(func, args, kwargs)) is not NotImplemented:
            return result
    elif packet in _RESHAPES and isinstance(x := args[0], LayoutDTensor) and type(x) is not PartView and tuple(args[1]) == tuple(x.shape):
        return x._like(x._local_tensor, x._spec)
    counts = packet in _COUNTING
    if packet in _NORMS and type(args[0]) is not PartView and (result := norms_of(func, args, kwargs)) is not NotImplemented:
        return result
    if func._schema.name.startswith(_LISTS) and in_step(args):
        if (packet in STEPS or is_on_each(packet)) and (result := on_each(func, args, kwargs)) is not NotImplemented:
            return result
        if packet in _REDUCED and not (counts and order_of(func, args, kwargs) < 0):
            return on_lists(func, args, kwargs, counts)
    if counts and counts_once(func, args, kwargs):
        args, kwargs = with_dims(func, args, kwargs)
        return summed(func(owned(args[0]), *args[1:], **kwargs))
    return on_whole(func, args, kwargs, random)
