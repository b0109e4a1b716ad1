"""Draws integers for operators that make them of unknown data, where code cannot be traced without any.

Code that cuts its tokens by counts of its experts (`split(counts.tolist())`), or repeats a row as often as a float says, fits only
numbers that belong together: counts that add up to the tokens. So the first integers are drawn, where floats become integers, and
everything that is made of them is computed. A place is drawn for an index (no two alike along a dim that is long enough), one for a
number, True for a condition; two floats are not equal. The numbers are one case of many: see `UnknownData`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotp.trace.values import SMALL

#: Operators whose integers are places along a dim of their first argument.
_PLACES = frozenset(("topk", "sort", "argsort", "argmax", "argmin", "max", "min", "multinomial", "kthvalue", "mode", "median", "msort"))


def drawn_result(func: Any, args: Any, result: Any) -> Any:
    """Returns real numbers for the integers and conditions among the results of a call, None where it makes none.

    A list of as many results as the call has, with None for those of floats; one tensor for one result.
    """
    if func._schema.is_mutable or not args or not isinstance(args[0], Tensor) or not isinstance(result, (Tensor, tuple, list)):
        return None
    flat = [result] if isinstance(result, Tensor) else [t for t in result if isinstance(t, Tensor)]
    drawn = [None if t.dtype.is_floating_point or t.numel() > SMALL else _numbers(func, args, t) for t in flat]
    if all(d is None for d in drawn):
        return None
    return drawn[0] if isinstance(result, Tensor) else drawn


def _numbers(func: Any, args: Any, made: Tensor) -> Tensor:
    shape, name = tuple(made.shape), func._schema.name.rsplit("::", 1)[-1]
    source = args[0]
    if name == "eq" and source.dtype.is_floating_point:  # code that asks which rows are all zero would find that all of them are
        return torch.zeros(shape, dtype=made.dtype)
    if name not in _PLACES:
        return torch.ones(shape, dtype=made.dtype)
    given = [a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)]
    dim = {"topk": given[1:2], "kthvalue": given[1:2], "multinomial": []}.get(name, given[:1])
    size = source.shape[dim[0]] if dim and source.dim() else source.shape[-1] if source.dim() else 1
    if not dim and made.dim() == 0:
        size = source.numel()
    places = torch.zeros(shape, dtype=made.dtype)
    for d, length in enumerate(shape):
        places = places + torch.arange(length, dtype=made.dtype).reshape(-1, *[1] * (len(shape) - d - 1))
    return places % max(size, 1)
