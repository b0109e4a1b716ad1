"""Computes digests of tensors and of plain values, equal on two ranks only where the values are.

A tensor's bytes are read as 32-bit words v_i. Its digest is  Σ_i v_i · w_(i mod n)  mod 2⁶⁴  over each block of n words, with fixed
random 64-bit weights w, and the same again over the blocks' sums. So it depends on every word and its place. It runs on the
tensor's device.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_WORDS = 1 << 14  # of a block
_ROWS = 64  # blocks at a time


def digest(text: str) -> int:
    """A number of 63 bits for a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def tensor_digest(tensor: Tensor) -> str:
    """Dtype, shape and a digest of the values; of what has no values (the meta device) only the first two."""
    inner = list(_plain_parts(tensor.detach()))
    shape = "nested" if tensor.is_nested else tuple(tensor.shape)
    head = f"{type(tensor).__name__ if len(inner) != 1 else ''}{tensor.dtype}{shape}{tensor.layout}"
    return head + "".join(f" {t.dtype}{tuple(t.shape)}:{'' if t.is_meta else _bits(t)}" for t in inner)


def _plain_parts(t: Tensor) -> Iterator[Tensor]:
    """The strided tensors that a tensor is made of."""
    if is_traceable_wrapper_subclass(t):
        for name in t.__tensor_flatten__()[0]:
            part = getattr(t, name)
            if isinstance(part, Tensor):
                yield from _plain_parts(part)
    elif t.layout is torch.sparse_coo:
        t = t if t.is_coalesced() else t.coalesce()
        yield from (t.indices(), t.values())
    elif t.layout in (torch.sparse_csr, torch.sparse_bsr):
        yield from (t.crow_indices(), t.col_indices(), t.values())
    elif t.layout in (torch.sparse_csc, torch.sparse_bsc):
        yield from (t.ccol_indices(), t.row_indices(), t.values())
    elif t.is_nested:
        for part in t.unbind():
            yield from _plain_parts(part)
    elif t.is_quantized:
        yield t.int_repr()
        if t.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
            yield torch.tensor([t.q_scale(), float(t.q_zero_point())], dtype=torch.float64)
        else:
            yield from (t.q_per_channel_scales(), t.q_per_channel_zero_points())
    elif t.layout is torch.strided:
        yield t
    else:
        yield t.to_dense()


def _bits(t: Tensor) -> int:
    if not t.numel():
        return 0
    t = torch.view_as_real(t.resolve_conj()) if t.is_complex() else t
    data = t.resolve_neg().contiguous().reshape(-1).view(torch.uint8)
    left = -data.numel() % 4
    if left:
        data = torch.cat([data, data.new_zeros(left)])
    words = data.view(torch.int32)
    while words.numel() > 1:
        weights = _weights(words.device)
        whole = words.numel() // _WORDS * _WORDS
        sums = [(rows.to(torch.int64) * weights).sum(1) for rows in words[:whole].view(-1, _WORDS).split(_ROWS)]  # type: ignore[no-untyped-call]
        rest = words[whole:].to(torch.int64)
        total = torch.cat([*sums, (rest * weights[: rest.numel()]).sum().view(1)])
        if total.numel() == 1:
            return int(total)
        words = total.view(torch.int32)
    return int(words)


def _weights(device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0x5EED)
    low, high = (torch.randint(1 << 32, (_WORDS,), generator=generator, dtype=torch.int64) for _ in range(2))
    return (low | (high << 32)).to(device)


def is_log(value: Any) -> bool:
    """True for a logger and its like: its level, its cache and its handlers are no settings of a model, and each rank's own."""
    return isinstance(value, logging.Filterer | logging.LoggerAdapter)


def plain_text(value: Any, depth: int = 0) -> str | None:
    """A text for a value that is plain data, the same on every rank where the values are equal; None for anything else.

    Devices and loggers are not among it: they differ rightly. Of objects with attributes (configs) those count that do not begin with `_`.
    """
    if value is None or isinstance(value, bool | int | str | torch.dtype):
        return None if isinstance(value, str) and value.startswith(("cuda", "cpu", "xpu", "mps", "npu")) else repr(value)
    if isinstance(value, float):
        return repr(float(value))
    if depth > 4 or isinstance(value, Tensor | torch.nn.Module | torch.device) or is_log(value):
        return None
    if isinstance(value, tuple | list):
        return f"{type(value).__name__}{[plain_text(v, depth + 1) for v in value]}"
    if isinstance(value, set | frozenset):
        return f"{type(value).__name__}{sorted(map(str, (plain_text(v, depth + 1) for v in value)))}"
    if isinstance(value, dict):
        return f"dict{[(plain_text(k, depth + 1), plain_text(v, depth + 1)) for k, v in value.items()]}"
    if callable(value):
        return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', type(value).__qualname__)}"
    attributes = getattr(value, "__dict__", None)
    if isinstance(attributes, dict) and type(value).__module__.split(".")[0] not in ("torch", "builtins"):
        return (
            f"{type(value).__qualname__}{[(k, plain_text(v, depth + 1)) for k, v in sorted(attributes.items()) if not k.startswith('_')]}"
        )
    return None
