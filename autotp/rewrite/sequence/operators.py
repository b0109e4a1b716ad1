"""Runs operators that treat tokens one by one on the rows of a rank.

An operator runs on the rows where that gives the rows of its result: element by element, or along the last dim. `of(function)` returns
the way to do so. `NotImplemented` from it, or no way at all, means that the operator gets the whole tensor.

A plain tensor beside tokens is whole on every rank. Where it has rows of its own, each rank takes its rows, and their gradients are
gathered. Where it broadcasts over rows (a weight), its gradient is a sum over the ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from autotp.rewrite.collectives.conversions import copy, own
from autotp.rewrite.in_parts.pointwise import CASTS, ELEMENTWISE, cast
from autotp.rewrite.in_parts.tensor import InParts, part
from autotp.rewrite.sequence.rows import Rows

Way = Callable[..., Any]


class _NoWay(Exception):
    """An argument is of no form that runs on rows."""


def _again(x: InParts, local: Tensor, shape: tuple[int, ...] | None = None) -> InParts:
    return x.again(local, x._kind if shape is None else Rows(shape, x._kind.comm))


def _view(x: InParts, local: Tensor, shape: tuple[int, ...] | None = None) -> InParts:
    """The same for a result that shares its memory with `x` on one device: neither may be changed in place from now on."""
    result = _again(x, local, shape)
    x.shares = result.shares = True
    x.handed = result.handed = [] if x.handed is None else x.handed
    return result


def _first(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> InParts:
    return next(a for a in (*args, *kwargs.values()) if isinstance(a, InParts) and isinstance(a._kind, Rows))


def _rows_of(a: Any, kind: Rows) -> Any:
    """An argument as it stands beside the rows of a rank."""
    if isinstance(a, InParts):
        if a._kind != kind:
            raise _NoWay
        return part(a)
    if isinstance(a, DTensor):
        raise _NoWay
    if not isinstance(a, Tensor) or a.ndim == 0:
        return copy(a, kind.comm) if isinstance(a, Tensor) else a
    if a.shape[:-1] == kind.shape:
        rows = own(a, kind)
        return rows.clone() if rows.requires_grad else rows  # what is saved for the backward must not keep the whole
    found = kind.beside(copy(a, kind.comm))
    if found is None:
        raise _NoWay
    return found


def _elementwise(func: Callable[..., Any]) -> Way:
    def run(*args: Any, **kwargs: Any) -> Any:
        x = _first(args, kwargs)
        if kwargs.get("inplace"):
            return NotImplemented
        try:
            result = func(*(_rows_of(a, x._kind) for a in args), **{n: _rows_of(a, x._kind) for n, a in kwargs.items()})
        except _NoWay:
            return NotImplemented
        return _again(x, result) if isinstance(result, Tensor) else NotImplemented

    return run


def _aliased(func: Callable[..., Any]) -> Way:
    return lambda x, *args, **kwargs: _view(x, func(part(x), *args, **kwargs))


def _made(func: Callable[..., Any]) -> Way:
    """`x.new_zeros(…)` takes the dtype and the device of `x` and nothing else."""
    return lambda x, *args, **kwargs: func(x._local_tensor, *args, **kwargs)


def _like(func: Callable[..., Any]) -> Way:
    """`torch.zeros_like(x)`: a plain whole tensor, as code may write anything into it."""

    def run(x: InParts, *value: Any, **kwargs: Any) -> Any:
        if kwargs.get("memory_format") not in (None, torch.preserve_format, torch.contiguous_format):
            return NotImplemented
        return func(x._local_tensor.new_empty(()).expand(x.shape), *value, **kwargs | {"memory_format": torch.contiguous_format})

    return run


def _reshape(func: Callable[..., Any]) -> Way:
    """New shapes of the dims before the last: the rows stay."""

    def run(x: InParts, *sizes: Any, shape: Any = None) -> Any:
        wanted = shape if shape is not None else sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if not isinstance(x, InParts) or isinstance(wanted, torch.dtype) or len(wanted) < 2:
            return NotImplemented
        full = torch.empty(x.shape, device="meta").reshape(*wanted).shape
        return _with_leading(x, full)

    return run


def _with_leading(x: InParts, full: tuple[int, ...]) -> Any:
    width = x.shape[-1]
    if len(full) < 2 or full[-1] != width:
        return NotImplemented
    local = part(x)
    return _view(x, local.reshape(*(1,) * (len(full) - 2), local.shape[-2], width), tuple(full[:-1]))


def _reshape_as(func: Callable[..., Any]) -> Way:
    def run(x: Any, other: Tensor) -> Any:
        return _with_leading(x, tuple(other.shape)) if isinstance(x, InParts) else NotImplemented

    return run


def _flatten(func: Callable[..., Any]) -> Way:
    def run(x: InParts, start_dim: int = 0, end_dim: int = -1) -> Any:
        full = torch.empty(x.shape, device="meta").flatten(start_dim, end_dim).shape
        return _with_leading(x, full)

    return run


def _last(dim: Any, x: InParts) -> bool:
    dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
    return isinstance(dim, int) and dim in (-1, x.ndim - 1)


def _reduced(func: Callable[..., Any]) -> Way:
    """Over the last dim, which stays as one of size 1."""

    spread = func.__name__ in ("var", "std")  # their second argument is another one

    def run(input: InParts, dim: Any = None, *flags: bool, keepdim: bool = False, **more: Any) -> Any:
        if (spread and flags) or len(flags) > 1:
            return NotImplemented
        keepdim = flags[0] if flags else keepdim
        if not _last(dim, input) or not keepdim or any(isinstance(v, Tensor) for v in more.values()):
            return NotImplemented
        local = part(input)
        if spread and not local.numel():
            return _again(input, local.sum(-1, keepdim=True))  # torch warns of a variance of nothing
        result = func(local, dim=-1, keepdim=True, **more)
        return _again(input, result) if isinstance(result, Tensor) else NotImplemented

    return run


def _norm(func: Callable[..., Any]) -> Way:
    def run(x: InParts, p: Any = "fro", dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Any:
        if not _last(dim, x) or not keepdim:
            return NotImplemented
        return _again(x, func(part(x), p, -1, True, dtype=dtype))

    return run


def _softmax(func: Callable[..., Any]) -> Way:
    def run(input: InParts, dim: Any = None, *more: Any, **named: Any) -> Any:
        return _again(input, func(part(input), -1, *more, **named)) if _last(dim, input) else NotImplemented

    return run


def _normalised(func: Callable[..., Any]) -> Way:
    """Layer and RMS norm over the last dim."""

    def run(input: InParts, normalized_shape: Any, *more: Any, **named: Any) -> Any:
        if isinstance(normalized_shape, int) or len(normalized_shape) != 1 or not isinstance(input, InParts):
            return NotImplemented
        kind = input._kind
        others = [copy(a, kind.comm) if isinstance(a, Tensor) else a for a in more]
        named = {n: copy(a, kind.comm) if isinstance(a, Tensor) else a for n, a in named.items()}
        return _again(input, func(part(input), normalized_shape, *others, **named))

    return run


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(input, InParts) or isinstance(weight, InParts) or isinstance(bias, InParts):
        return NotImplemented
    comm = input._kind.comm
    return _again(input, F.linear(part(input), copy(weight, comm), None if bias is None else copy(bias, comm)))


def _matmul(func: Callable[..., Any]) -> Way:
    """By a plain matrix."""

    def run(x: Any, other: Any) -> Any:
        if not isinstance(x, InParts) or isinstance(other, InParts | DTensor) or other.ndim != 2:
            return NotImplemented
        return _again(x, func(part(x), copy(other, x._kind.comm)))

    return run


def _dropout(func: Callable[..., Any]) -> Way:
    """All ranks draw the mask of all tokens, as one device does, and keep that of their rows."""

    def run(input: InParts, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
        if inplace or not isinstance(input, InParts):
            return NotImplemented
        if not training or p == 0:
            func(input._local_tensor.new_empty(0), p, training)  # refuses what is no probability
            return input
        kind, local = input._kind, part(input)
        with torch.no_grad():
            mask = F.dropout(local.new_ones(()).expand(input.shape).contiguous(), p, True)
            mask = kind.own(mask).clone()
        return _again(input, local * mask)

    return run


def _index(func: Callable[..., Any]) -> Way:
    """`x[…, a:b]`: a slice of the last dim, and all of the others."""

    def run(x: InParts, index: Any) -> Any:
        items = index if isinstance(index, tuple) else (index,)
        if not isinstance(x, InParts) or not all(i is Ellipsis or isinstance(i, slice) for i in items) or items.count(Ellipsis) > 1:
            return NotImplemented
        bounds = [b for i in items if isinstance(i, slice) for b in (i.start, i.stop, i.step)]
        if any(b is not None and not isinstance(b, int) for b in bounds):
            return NotImplemented
        at = items.index(Ellipsis) if Ellipsis in items else len(items)
        every = (*items[:at], *(slice(None),) * (x.ndim - len(items) + (Ellipsis in items)), *items[at + 1 :])
        if len(every) != x.ndim or any(s.indices(n) != (0, n, 1) for s, n in zip(every[:-1], x.shape[:-1], strict=True)):
            return NotImplemented
        return _view(x, part(x)[..., every[-1]])

    return run


def _pieces(func: Callable[..., Any]) -> Way:
    """`chunk` and `split` along the last dim."""

    def run(x: InParts, sizes: Any, dim: int = 0) -> Any:
        if not isinstance(x, InParts) or not _last(dim, x):
            return NotImplemented
        return tuple(_view(x, piece) for piece in func(part(x), sizes, -1))

    return run


def _joined(func: Callable[..., Any]) -> Way:
    """`cat` along the last dim."""

    def run(tensors: Any, dim: int = 0) -> Any:
        x = next(t for t in tensors if isinstance(t, InParts))
        if not _last(dim, x) or any(not isinstance(t, Tensor) or t.ndim != x.ndim or t.shape[:-1] != x.shape[:-1] for t in tensors):
            return NotImplemented
        try:
            return _again(x, func([_rows_of(t, x._kind) for t in tensors], -1))
        except _NoWay:
            return NotImplemented

    return run


_ACTIVATIONS = (
    "celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish", "relu", "relu6", "selu",
    "sigmoid", "silu", "softplus", "softsign", "tanh",
)  # fmt: skip
_REST: Mapping[str, Callable[..., Way]] = {
    "contiguous": _aliased, "detach": _aliased, "__getitem__": _index, "view": _reshape, "reshape": _reshape, "flatten": _flatten,
    "view_as": _reshape_as, "reshape_as": _reshape_as,
    "mean": _reduced, "sum": _reduced, "var": _reduced, "std": _reduced, "amax": _reduced, "amin": _reduced, "norm": _norm,
    "softmax": _softmax, "log_softmax": _softmax, "matmul": _matmul, "__matmul__": _matmul,
    "chunk": _pieces, "split": _pieces, "cat": _joined, "concat": _joined,
    "zeros_like": _like, "ones_like": _like, "empty_like": _like, "full_like": _like,
    "new_zeros": _made, "new_ones": _made, "new_empty": _made, "new_full": _made, "new_tensor": _made,
    "layer_norm": _normalised, "rms_norm": _normalised, "dropout": _dropout,
}  # fmt: skip


def _table() -> Mapping[Any, Way]:
    found: dict[Any, Way] = {}
    for names, make in ((ELEMENTWISE, _elementwise), (CASTS, cast), *(((n,), m) for n, m in _REST.items())):
        for name in names:
            for owner in (torch, Tensor):
                if (func := getattr(owner, name, None)) is not None:
                    found[func] = make(func)
    for name in _ACTIVATIONS:
        found[getattr(F, name)] = _elementwise(getattr(F, name))
    for functions, make in (((F.layer_norm, F.rms_norm), _normalised), ((F.softmax, F.log_softmax), _softmax), ((F.dropout,), _dropout)):
        for func in functions:
            found[func] = make(func)
    found.pop(torch.layer_norm)  # arguments of another order of the same meaning, and flags
    found.pop(torch.rms_norm)
    found.pop(torch.dropout)
    found[F.linear] = _linear
    return MappingProxyType(found)


_WAYS = _table()


def of(function: Callable[..., Any]) -> Way | None:
    """Returns the way to run `function` on rows, None where there is none."""
    return _WAYS.get(function)
