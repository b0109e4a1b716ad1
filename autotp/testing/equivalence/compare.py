"""How far two observations of one model are apart.

The error of a tensor is  max|a − b| / max(max|b|, floor); in float64 only the order of sums differs between a right parallel
model and the model itself, so an error above 1e-9 is a bug. A gradient counts as at least a millionth of the model's largest,
a parameter after a step as at least `Training.least`, a buffer in training as at least 1e-6: some are zero but for rounding. The
state dict must be equal bit by bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autotp.numeric.exact import Precision, largest, relative_error

#: What paths of gradients begin with, in an aspect of more than gradients.
GRADIENT = "gradient of "
#: What paths of buffers begin with.
BUFFER = "buffer "
_LEAST_BUFFER = 1e-6


@dataclass(frozen=True, slots=True)
class Aspect:
    """What comparing one aspect showed: the `paths` of all tensors, the largest `error` and `where` it is, every path that is `wrong`."""

    name: str
    paths: tuple[str, ...]
    error: float
    where: str
    wrong: tuple[str, ...]

    @property
    def compared(self) -> int:
        """How many tensors."""
        return len(self.paths)

    def worse(self, other: Aspect) -> Aspect:
        """This of one rank and `other` of another as one."""
        first = self if not other.error > self.error else other
        return Aspect(self.name, self.paths, first.error, first.where, tuple(dict.fromkeys((*self.wrong, *other.wrong))))


def compare(name: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], precision: Precision, least: float = 0.0) -> Aspect:
    """Compare one aspect. A tensor that only one side has is an error, but for a gradient of zeros. `least`: see `Training`."""
    gradient = precision.floor * max((largest(t) for path, t in wanted.items() if _is_gradient(name, path)), default=0.0)
    errors = {path: _error(name, path, wanted, got, gradient, least) for path in {**wanted, **got}}
    limit = 0.0 if name == "state" else precision.tolerance
    wrong = tuple(path for path, error in errors.items() if not error <= limit)
    where = max(errors, key=lambda path: errors[path], default="")
    return Aspect(name, tuple(errors), errors.get(where, 0.0), where, wrong)


def _error(name: str, path: str, wanted: Mapping[str, Tensor], got: Mapping[str, Tensor], gradient: float, least: float) -> float:
    """`gradient`, `least`: as how large a gradient, and a parameter after a step, count at least."""
    a, b = wanted.get(path), got.get(path)
    if a is None or b is None:
        there = b if a is None else a
        return 0.0 if _is_gradient(name, path) and there is not None and not there.count_nonzero() else float("inf")
    if isinstance(b, DTensor) or a.dtype != b.dtype or a.layout != b.layout:
        return float("inf")
    if a.layout is not torch.strided:
        a, b = a.to_dense(), b.to_dense()
    if name == "state":
        return 0.0 if a.shape == b.shape and torch.equal(_bits(a), _bits(b)) else max(relative_error(b, a), 1e-300)
    return error_of(a, b, gradient if _is_gradient(name, path) else _floor(name, path, least))


def error_of(wanted: Tensor, got: Tensor, floor: float = 0.0) -> float:
    """The error of one tensor (see the module docstring); inf for a DTensor, another dtype or shape, or unequal integers."""
    if isinstance(got, DTensor) or wanted.dtype != got.dtype:
        return float("inf")
    return relative_error(got, wanted, scale=max(largest(wanted), floor) if wanted.is_floating_point() else None)


def _is_gradient(name: str, path: str) -> bool:
    return name == "gradients" or path.startswith(GRADIENT)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _floor(name: str, path: str, least: float) -> float:
    if path.startswith(BUFFER):
        return _LEAST_BUFFER
    return least if name == "steps" and " of step " not in path else 0.0
