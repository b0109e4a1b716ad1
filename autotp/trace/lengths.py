"""Runs operators whose result is as long as numbers in another argument say: packed sequences, the CTC loss, counts, distinct items.

torch's fake forms of them do not know these numbers, the recorder mostly does. Where it does not either, each sequence counts as
one of full length. Values that are made of lengths alone (the batch sizes of a packed sequence) are known again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from autotp.trace.values import Values

Made = tuple[Any, Any]
#: How many items of data that is not known count as distinct.
_SOME = 2


def like(source: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Makes the fake tensor that an operator makes of `source`: it has a gradient where `source` has one."""
    made = source.new_empty(tuple(shape), dtype=dtype)
    if source.requires_grad and torch.is_grad_enabled() and made.is_floating_point():
        return made.requires_grad_().clone()  # a clone, as leaves may not be changed in place
    return made


def _numbers(values: Values, lengths: Any) -> list[int] | None:
    """Returns the numbers in `lengths`; None where they are not known."""
    if not isinstance(lengths, Tensor):
        return [int(n) for n in lengths]
    known = values.real_of(lengths)
    if known is None:
        return None
    with unset_fake_temporarily():
        return [int(n) for n in known.flatten().tolist()]


def _pair(source: Tensor, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Returns a tensor of whole numbers: the fake one and the real one."""
    with unset_fake_temporarily():
        real = torch.tensor(list(numbers), dtype=torch.long)
    return source.new_empty((len(numbers),), dtype=torch.long, device="cpu"), real


def with_tensors(func: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...]]:
    """Turns a call that takes lengths in lists into one that takes them in tensors; any other stays as it is.

    The former makes tensors of the lists where no mode gets the call, and fills fake ones.
    """
    if func is not torch.ops.aten.ctc_loss.IntList:
        return func, args
    with unset_fake_temporarily():
        lengths = (torch.tensor(list(map(int, numbers)), dtype=torch.long) for numbers in args[2:4])
        return torch.ops.aten.ctc_loss.Tensor, (*args[:2], *lengths, *args[4:])


def _pack(values: Values, data: Tensor, lengths: Tensor, batch_first: bool) -> Made:
    batch, longest = (0, 1) if batch_first else (1, 0)
    known = _numbers(values, lengths)
    known = [data.shape[longest]] * data.shape[batch] if known is None else known
    sizes = [sum(n > step for n in known) for step in range(max(known))]
    fake, real = _pair(data, sizes)
    return (like(data, (sum(known), *data.shape[2:])), fake), (None, real)


def _pad(values: Values, data: Tensor, batch_sizes: Tensor, batch_first: bool, value: float, total_length: int) -> Made:
    known = _numbers(values, batch_sizes)
    sizes = [data.shape[0] // batch_sizes.shape[0]] * batch_sizes.shape[0] if known is None else known
    longest, batch = max(len(sizes), total_length), sizes[0]
    shape = (batch, longest) if batch_first else (longest, batch)
    fake, real = _pair(data, [sum(n > i for n in sizes) for i in range(batch)])
    return (like(data, (*shape, *data.shape[1:])), fake), (None, real)


def _ctc(values: Values, log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any, *_: Any) -> Made:
    known = _numbers(values, target_lengths)
    steps, batch = log_probs.shape[:2]
    longest = max(known, default=0) if known else targets.shape[-1] if targets.dim() > 1 else targets.numel() // max(batch, 1)
    return (like(log_probs, (batch,)), like(log_probs, (batch, steps, 2 * longest + 1))), (None, None)


def _bincount(values: Values, items: Tensor, weights: Tensor | None = None, minlength: int = 0) -> Made:
    known = _numbers(values, items)
    length = max(minlength, _SOME) if known is None else max(minlength, 1 + max(known, default=-1))
    if weights is None:
        return items.new_empty((length,), dtype=torch.long), None
    return like(weights, (length,), weights.dtype if weights.dtype is torch.float32 else torch.float64).detach(), None


def _unique(values: Values, items: Tensor, *_: Any, **__: Any) -> Made:
    return _distinct(items, (min(_SOME, items.numel()),), items.shape)


def _unique_dim(values: Values, items: Tensor, dim: int, *_: Any, **__: Any) -> Made:
    found = list(items.shape)
    found[dim] = min(_SOME, found[dim])
    return _distinct(items, found, items.shape[dim : dim + 1] if dim >= 0 else (items.shape[dim],))


def _unique_consecutive(
    values: Values, items: Tensor, return_inverse: bool = False, return_counts: bool = False, dim: int | None = None
) -> Made:
    return _unique(values, items) if dim is None else _unique_dim(values, items, dim)


def _distinct(items: Tensor, found: Sequence[int], inverse: Sequence[int]) -> Made:
    count = min(_SOME, items.numel())
    made = like(items, found), *(items.new_empty(tuple(shape), dtype=torch.long) for shape in (inverse, (count,)))
    return made, (None, None, None)


def repeated(
    values: Values, items: Tensor, repeats: Tensor | None = None, dim: int | None = None, *, output_size: int | None = None
) -> Tensor:
    """Returns the result of `repeat_interleave` on `items`: each one as often as `repeats` say, once where they are not known.

    Without `repeats` these are the `items`, and their indices are repeated.
    """
    if repeats is None:
        return items.new_empty((items.shape[0] if output_size is None else output_size,), dtype=torch.long)
    shape = [items.numel()] if dim is None else list(items.shape)
    at = 0 if dim is None else dim
    known = _numbers(values, repeats)
    if known is not None:
        shape[at] = sum(known) * (shape[at] if len(known) == 1 else 1)
    elif output_size is not None:
        shape[at] = output_size
    return like(items, shape)


#: Name of an operator → what it gives, fake and, where that is known, real.
BY_LENGTH: dict[str, Callable[..., Made]] = {
    "aten::_pack_padded_sequence": _pack,
    "aten::_pad_packed_sequence": _pad,
    "aten::_ctc_loss": _ctc,
    "aten::bincount": _bincount,
    "aten::_unique2": _unique,
    "aten::unique_dim": _unique_dim,
    "aten::unique_consecutive": _unique_consecutive,
}
