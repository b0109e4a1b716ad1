"""Computes in a precision in which rounding cannot hide a wrong result.

float64 is the rule. A few operators (grouped matrix products of experts) do not have it. A model that does not run in float64 is
compared in float32, where sums in another order differ more and the tolerance is wider.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

TOLERANCE = 1e-9

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_CASTS = {torch.Tensor.float: torch.Tensor.double, torch.Tensor.half: torch.Tensor.double, torch.Tensor.bfloat16: torch.Tensor.double}


class Float64(TorchFunctionMode):
    """Model code that asks for a narrower float gets float64; norms and softmaxes of transformers upcast to float32 by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        wide_kwargs = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return _CASTS.get(func, func)(*(_widen(value) for value in args), **wide_kwargs)


@dataclass(frozen=True, slots=True)
class Precision:
    """`tolerance` bounds relative errors; a gradient counts as at least `floor` of the model's largest: some are zero but for rounding."""

    dtype: torch.dtype
    tolerance: float
    floor: float

    def mode(self) -> AbstractContextManager[Any]:
        """The context in which the model runs."""
        return Float64() if self.dtype is torch.float64 else nullcontext()


DOUBLE = Precision(torch.float64, TOLERANCE, 1e-6)
SINGLE = Precision(torch.float32, 2e-5, 1e-2)


def _widen(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in _NARROW else value


def relative_error(got: Tensor, wanted: Tensor, *, scale: float | None = None) -> float:
    """Largest difference over the largest value of `wanted` (or over `scale`, where `wanted` is a part of something).

    inf where shapes or non-finite values differ, 0 for empty tensors; never NaN.
    """
    if got.shape != wanted.shape:
        return float("inf")
    if not wanted.numel():
        return 0.0
    if not wanted.is_floating_point() and not wanted.is_complex():
        return 0.0 if torch.equal(got, wanted) else float("inf")
    apart = _most(got - wanted) if got.dtype is wanted.dtype else None
    if apart is not None:  # then all of both is finite
        return _over(apart, largest(wanted) if scale is None else scale)
    finite = wanted.isfinite()
    same_rest = (got == wanted) | (got.isnan() & wanted.isnan())
    if not bool((finite & got.isfinite() | same_rest).all()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    difference = (got[finite] - wanted[finite]).abs().max().item()
    return _over(difference, wanted[finite].abs().max().item() if scale is None else scale)


def _over(difference: float, scale: float) -> float:
    return difference / scale if scale > 0 else (0.0 if difference == 0 else float("inf"))


def _most(tensor: Tensor) -> float | None:
    """Largest absolute value, None where some are not finite. One pass over the values: results may be logits of a whole vocabulary."""
    least, most = torch.aminmax(tensor.abs() if tensor.is_complex() else tensor)
    found = max(-least.item(), most.item(), 0.0)
    return found if math.isfinite(least.item()) and math.isfinite(most.item()) else None


def largest(tensor: Tensor) -> float:
    """Largest absolute value among the finite ones; 0 where there is none."""
    if tensor.is_floating_point() and tensor.numel() and (found := _most(tensor)) is not None:
        return found
    finite = tensor[tensor.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0
