"""Runs operators on tensors whose vocabulary is in parts.

An operator runs on the parts where that gives the part of its result: element by element, along other dims, or over the vocabulary by
a small collective. `of(function)` returns the way to do so. `NotImplemented` from it, or no way at all, means that the operator gets
the whole tensor: the result is right, and every rank holds it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from autotp.rewrite.collectives.conversions import copy, slice_part
from autotp.rewrite.in_parts.pointwise import CASTS, ELEMENTWISE, cast
from autotp.rewrite.in_parts.tensor import part, parted
from autotp.rewrite.logits.losses import cross_entropy, logsumexp_of, nll_loss, softmax_of
from autotp.rewrite.logits.parts import LogitsInParts
from autotp.rewrite.logits.sums import HALF, argmax, picked, total, wide
from autotp.rewrite.logits.vocabulary import Along

Way = Callable[..., Any]


def _again(x: LogitsInParts, local: Tensor, dim: int) -> LogitsInParts:
    return parted(type(x), Along(dim, x._vocabulary), local)  # type: ignore[return-value]


def _view(x: LogitsInParts, local: Tensor, dim: int) -> LogitsInParts:
    """The same for a result that shares its memory with `x` on one device: neither may be changed in place from now on."""
    result = _again(x, local, dim)
    x.shares = result.shares = True
    x.handed = result.handed = [] if x.handed is None else x.handed
    return result


def _from_right(x: LogitsInParts) -> int:
    return x.vocabulary_dim - x.ndim


# ---------------------------------------------------------------- element by element


def _elementwise(func: Callable[..., Any]) -> Way:
    """Other tensors are cut where they have the vocabulary, and broadcast where not; their gradients are then sums over the ranks."""

    def run(*args: Any, **kwargs: Any) -> Any:
        x = next(a for a in (*args, *kwargs.values()) if isinstance(a, LogitsInParts))
        at, vocabulary = _from_right(x), x._vocabulary

        def local(a: Any) -> Any:
            if isinstance(a, LogitsInParts):
                if _from_right(a) != at or a._vocabulary is not vocabulary:
                    raise _NoWay
                return part(a)
            if not isinstance(a, Tensor):
                return a
            if isinstance(a, DTensor):
                a = a.full_tensor()
            if a.ndim < -at or a.shape[at] == 1:
                return copy(a, vocabulary.comm)
            if a.shape[at] != vocabulary.size:
                raise _NoWay
            return slice_part(copy(a, vocabulary.comm), Along(a.ndim + at, vocabulary))

        try:
            result = func(*map(local, args), **{name: local(a) for name, a in kwargs.items()})
        except _NoWay:
            return NotImplemented
        if not isinstance(result, Tensor):
            return NotImplemented  # `where` of one argument gives indices
        return _again(x, result, result.ndim + at)

    return run


class _NoWay(Exception):
    """Two tensors have their vocabularies in different dims, or one has another size there."""


def _aliased(func: Callable[..., Any]) -> Way:
    """A result that is, or may be, the same memory on one device."""
    return lambda x, *args, **kwargs: _view(x, func(part(x), *args, **kwargs), x.vocabulary_dim)


# ---------------------------------------------------------------- along other dims


def _along_others(func: Callable[..., Any]) -> Way:
    """Operators that move entries, or leave some out, and never look at a dim that they do not name.

    Two tensors without data, of other sizes where the vocabulary is, show where it goes: the operator leaves it alone if one dim of
    each result has these sizes.
    """

    def run(x: LogitsInParts, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, LogitsInParts) or not all(map(_is_plain, (*args, *kwargs.values()))):
            return NotImplemented
        found = [_probed(func, x, size, args, kwargs) for size in (1009, 2003)]
        if found[0] is None or found[1] is None or len(found[0]) != len(found[1]):
            return NotImplemented
        dims = [_moved(a, b) for a, b in zip(*found, strict=True)]
        if any(d is None for d in dims):
            return NotImplemented
        results = func(part(x), *args, **kwargs)
        if isinstance(results, Tensor):
            return _view(x, results, dims[0])  # type: ignore[arg-type]
        return type(results)(_view(x, r, d) for r, d in zip(results, dims, strict=True))  # type: ignore[arg-type]

    return run


def _is_plain(value: Any) -> bool:
    """True for what a tensor without data may be indexed with: numbers, slices and tuples of them."""
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or value is Ellipsis or isinstance(value, int | slice | torch.memory_format)


def _probed(func: Callable[..., Any], x: LogitsInParts, size: int, args: Any, kwargs: Any) -> list[tuple[int, ...]] | None:
    shape = list(x.shape)
    shape[x.vocabulary_dim] = size
    try:
        results = func(torch.empty(shape, device="meta"), *args, **kwargs)
    except (RuntimeError, IndexError, TypeError, ValueError):
        return None
    return [tuple(r.shape) for r in ([results] if isinstance(results, Tensor) else results)]


def _moved(one: tuple[int, ...], other: tuple[int, ...]) -> int | None:
    if len(one) != len(other):
        return None
    differ = [i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return differ[0] if len(differ) == 1 and (one[differ[0]], other[differ[0]]) == (1009, 2003) else None


def _index(func: Callable[..., Any]) -> Way:
    """`x[…]`: as `_along_others`; tensors may choose among the dims before a vocabulary that comes last and is taken whole."""
    basic = _along_others(func)

    def run(x: LogitsInParts, index: Any) -> Any:
        items = index if isinstance(index, tuple) else (index,)
        if not isinstance(x, LogitsInParts) or any(isinstance(i, bool | DTensor) or _is_bytes(i) for i in items):
            return NotImplemented
        if not any(isinstance(i, Tensor | list) for i in items):
            return basic(x, _all_of(items, x))
        taken = sum(i.ndim if isinstance(i, Tensor) and i.dtype is torch.bool else i is not None and i is not Ellipsis for i in items)
        if x.vocabulary_dim != x.ndim - 1 or taken >= x.ndim or any(i is Ellipsis for i in items):
            return NotImplemented
        result = part(x)[index]
        return _again(x, result, result.ndim - 1)

    return run


def _is_bytes(item: Any) -> bool:
    return isinstance(item, Tensor) and item.dtype is torch.uint8  # a mask of old


def _all_of(items: tuple[Any, ...], x: LogitsInParts) -> tuple[Any, ...]:
    """`items` with `:` for a slice that takes all entries of a vocabulary in the last dim (`logits[..., :vocab_size]`)."""
    last, complete = items[-1], any(i is Ellipsis for i in items[:-1]) or 1 < len(items) == x.ndim
    if complete and isinstance(last, slice) and x.vocabulary_dim == x.ndim - 1:
        takes_all = last.indices(x._vocabulary.size) == (0, x._vocabulary.size, 1)
        return (*items[:-1], slice(None)) if takes_all else items
    return items


def _reshape(func: Callable[..., Any]) -> Way:
    """New shapes of the dims before a vocabulary that stays last."""

    def run(x: LogitsInParts, *sizes: Any, shape: Any = None) -> Any:
        wanted = shape if shape is not None else sizes[0] if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes
        if not isinstance(x, LogitsInParts) or isinstance(wanted, torch.dtype) or x.vocabulary_dim != x.ndim - 1 or not len(wanted):
            return NotImplemented
        full = torch.empty(x.shape, device="meta").reshape(*wanted)
        if full.ndim == 0 or full.shape[-1] != x._vocabulary.size:
            return NotImplemented
        return _view(x, part(x).reshape(*full.shape[:-1], x._vocabulary.held), full.ndim - 1)

    return run


def _squeeze(func: Callable[..., Any]) -> Way:
    """Of a named dim: a vocabulary of which a rank holds one entry, or none, stays."""
    others = _along_others(func)

    def run(x: LogitsInParts, dim: Any = None) -> Any:
        return others(x, dim) if isinstance(dim, int) and not _over(x, dim) else NotImplemented

    return run


def _joined(func: Callable[..., Any]) -> Way:
    """`cat` along another dim than the vocabulary, of tensors that all have it in parts."""

    def run(tensors: Any, dim: int = 0) -> Any:
        x = next(t for t in tensors if isinstance(t, LogitsInParts))
        same = all(
            isinstance(t, LogitsInParts) and t.vocabulary_dim == x.vocabulary_dim and t._vocabulary is x._vocabulary for t in tensors
        )
        if not same or _over(x, dim):
            return NotImplemented
        return _again(x, func([part(t) for t in tensors], dim), x.vocabulary_dim)

    return run


# ---------------------------------------------------------------- over the vocabulary


def _dims(x: LogitsInParts, dim: Any) -> tuple[int, ...]:
    """Counted from the left; all of them for None.

    Raises:
        TypeError: one is no dim of `x`, as torch will say.
    """
    every = [dim] if isinstance(dim, int) else dim or range(x.ndim)
    if not all(isinstance(d, int) and -x.ndim <= d < x.ndim for d in every):
        raise TypeError(f"{dim} is no dim of a tensor of {x.ndim} dims")
    return tuple(d % x.ndim for d in every)


def _sum(func: Callable[..., Any]) -> Way:
    mean = func.__name__ == "mean"

    def run(input: LogitsInParts, dim: Any = None, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
        dims = _dims(input, dim)
        local = part(input) if dtype is None else part(input).to(dtype)
        if mean and not (local.is_floating_point() or local.is_complex()):
            return NotImplemented
        if input.vocabulary_dim not in dims:
            before = sum(d < input.vocabulary_dim for d in dims)
            return _again(input, func(local, dims, keepdim=keepdim), input.vocabulary_dim - (0 if keepdim else before))
        summed = total(wide(local), dims, keepdim, input._vocabulary.comm)
        summed = summed / torch.tensor(prod(input.shape[d] for d in dims), dtype=summed.dtype, device=summed.device) if mean else summed
        return summed.to(local.dtype) if local.dtype in HALF else summed

    return run


def _over(x: LogitsInParts, dim: Any) -> bool:
    return isinstance(dim, int) and _dims(x, dim) == (x.vocabulary_dim,)


def _log_softmax(func: Callable[..., Any]) -> Way:
    def run(input: LogitsInParts, dim: Any = None, _stacklevel: int = 3, dtype: torch.dtype | None = None) -> Any:
        if not _over(input, dim):
            return NotImplemented
        local = part(input) if dtype is None else part(input).to(dtype)
        found = softmax_of(local, input.vocabulary_dim, input._vocabulary, logarithm=func.__name__ == "log_softmax")
        return _again(input, found, input.vocabulary_dim)

    return run


def _short(run: Way) -> Way:
    """Of `torch.log_softmax(x, dim, dtype)`, which has no `_stacklevel`."""
    return lambda input, dim=None, dtype=None: run(input, dim, dtype=dtype)


def _logsumexp(func: Callable[..., Any]) -> Way:
    def run(input: LogitsInParts, dim: Any = None, keepdim: bool = False) -> Any:
        dim = dim[0] if isinstance(dim, tuple | list) and len(dim) == 1 else dim
        if not _over(input, dim):
            return NotImplemented
        found = logsumexp_of(part(input), input.vocabulary_dim, input._vocabulary)
        return found.unsqueeze(input.vocabulary_dim) if keepdim else found

    return run


def _gather(func: Callable[..., Any]) -> Way:
    def run(input: LogitsInParts, dim: int, index: Tensor, *, sparse_grad: bool = False) -> Any:
        if not isinstance(input, LogitsInParts) or isinstance(index, LogitsInParts) or not _over(input, dim) or sparse_grad:
            return NotImplemented
        size = input._vocabulary.size
        if index.is_cpu and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            return NotImplemented  # torch says what is wrong
        return picked(part(input), dim, index, input._vocabulary.start, input._vocabulary.comm)

    return run


def _argmax(func: Callable[..., Any]) -> Way:
    def run(input: LogitsInParts, dim: Any = None, keepdim: bool = False) -> Any:
        if not _over(input, dim):
            return NotImplemented
        found = argmax(part(input).detach(), input.vocabulary_dim, input._vocabulary.start, input._vocabulary.comm)
        return found.unsqueeze(input.vocabulary_dim) if keepdim else found

    return run


def _kl_div(
    input: Any,
    target: Any,
    size_average: Any = None,
    reduce: Any = None,
    reduction: str = "mean",
    log_target: bool = False,
) -> Any:
    if size_average is not None or reduce is not None or reduction not in ("none", "sum", "batchmean", "mean"):
        return NotImplemented
    each = _elementwise(partial(F.kl_div, reduction="none", log_target=log_target))(input, target)
    if each is NotImplemented or reduction == "none":
        return each
    summed = _sum(torch.sum)(each)
    return summed if reduction == "sum" else summed / (input.shape[0] if reduction == "batchmean" else each.numel())


_OTHERS = (
    "transpose", "swapaxes", "swapdims", "permute", "t", "unsqueeze", "movedim", "moveaxis", "select", "narrow", "unbind",
    "split", "chunk", "tensor_split", "flatten", "unflatten", "expand",
)  # fmt: skip
_REST: Mapping[str, Callable[..., Way]] = {
    "contiguous": _aliased,
    "detach": _aliased,
    "__getitem__": _index,
    "view": _reshape,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "cat": _joined,
    "concat": _joined,
    "sum": _sum,
    "mean": _sum,
    "logsumexp": _logsumexp,
    "gather": _gather,
    "argmax": _argmax,
}


def _table() -> Mapping[Any, Way]:
    found: dict[Any, Way] = {}
    for names, make in ((ELEMENTWISE, _elementwise), (CASTS, cast), (_OTHERS, _along_others), *(((n,), m) for n, m in _REST.items())):
        for name in names:
            for owner in (torch, Tensor):
                if (func := getattr(owner, name, None)) is not None:
                    found[func] = make(func)
    of_functional: tuple[Any, ...] = (F.log_softmax, F.softmax)
    of_torch: tuple[Any, ...] = (torch.log_softmax, torch.softmax, Tensor.log_softmax, Tensor.softmax)
    found |= {function: _log_softmax(function) for function in of_functional}
    found |= {function: _short(_log_softmax(function)) for function in of_torch}
    found[F.kl_div] = _kl_div
    found |= {F.cross_entropy: cross_entropy, F.nll_loss: nll_loss}
    return MappingProxyType(found)


_WAYS = _table()


def of(function: Callable[..., Any]) -> Way | None:
    """Returns the way to run `function` on parts, None where there is none."""
    return _WAYS.get(function)
