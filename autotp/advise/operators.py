"""Counts the work of one operator call: floating-point operations, and bytes that go from and to memory.

    flops   of products, convolutions and attention, by torch's own formulas (`torch.utils.flop_counter`); a causal attention of
            equally many queries and keys computes half of the scores. 0 for everything else, which memory bounds
    bytes   each tensor that is read, and each that is written, once; a view moves nothing
            rows that are looked up: as many as come out. Experts that tokens are routed to: at most one for each row

The operators are torch's, so no model is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Work:
    """One operator call: floating-point operations, bytes moved, and the dtype that it computes in."""

    flops: int
    bytes: int
    dtype: torch.dtype


def _half(flops: int, query: Tensor, key: Tensor, causal: Any) -> int:
    return flops // 2 if causal and query.shape[-2] == key.shape[-2] else flops


def _attention(args: tuple[Any, ...], flags: int) -> int:
    query, key, value = args[:3]
    causal = len(args) > flags and args[flags]
    return _half(sdpa_flop_count(query.shape, key.shape, value.shape), query, key, causal)  # type: ignore[no-untyped-call]


def _attention_backward(args: tuple[Any, ...], flags: int) -> int:
    grad, query, key, value = args[:4]
    causal = len(args) > flags and args[flags]
    count = sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape)  # type: ignore[no-untyped-call]
    return _half(count, query, key, causal)


def _grouped(args: tuple[Any, ...]) -> int:
    a, b = args[:2]
    rows, columns = (b.numel(), a.shape[-2]) if a.dim() == 3 and b.dim() == 2 else (a.numel(), b.shape[-1])
    return int(2 * rows * columns)


#: What torch's table lacks.
_MORE: dict[Any, Callable[[tuple[Any, ...]], int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: lambda args: _attention(args, 4),
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda args: _attention_backward(args, 7),
    _aten._grouped_mm: _grouped,
}
#: Operators that read the rows of their first tensor that are asked for, and no others.
_LOOKUPS = frozenset((_aten.embedding, _aten.index, _aten.index_select, _aten.gather))
#: Operators that say how a storage is looked at, or allocate one.
_FREE = frozenset((_aten.detach, _aten.alias, _aten.lift_fresh, _aten.empty, _aten.empty_like, _aten.new_empty, _aten._unsafe_view))


def flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Counts the floating-point operations of a call; a multiply-add counts as two."""
    packet = func._overloadpacket
    if packet in _MORE:
        return _MORE[packet](args)
    count = flop_registry.get(packet)
    return 0 if count is None else int(count(*args, **kwargs, out_val=out))


def moved(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """Counts the bytes that a call reads and writes."""
    packet = func._overloadpacket
    if packet in _FREE or _is_view(func):
        return 0
    written = sum(size(t) for t in tensors(out))
    read = [size(t) for t in (*tensors(args), *tensors(tuple(kwargs.values())))]
    if packet in _LOOKUPS and read:
        read[0] = min(read[0], written)
    if packet is _aten._grouped_mm and args[1].dim() == 3:
        experts, rows = args[1].shape[0], args[0].shape[-2]
        read[1] = read[1] * min(experts, rows) // max(experts, 1)
    return sum(read) + written


def _is_view(func: Any) -> bool:
    return bool(func.is_view)


def size(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor shows, those that it repeats (`expand`) once."""
    whole = tensor.numel() * tensor.element_size()
    return min(whole, tensor.untyped_storage().nbytes()) if tensor.layout is torch.strided else whole


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yields the tensors among arguments or results, which come alone or in lists."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors(item)


def products() -> list[Any]:
    """The operators that do floating-point work worth keeping: products, convolutions, attention."""
    packets = [p for p in (*flop_registry, *_MORE) if hasattr(p, "overloads")]
    return [getattr(packet, name) for packet in packets for name in packet.overloads()]
