"""Proves properties of an `autograd.Function` by running it on real numbers.

    shown    apply(x).backward(g)  =  forward(x).backward(g), differentiated by autograd through the forward's own operators
    local    parts of outputs and gradients along a dim  =  outputs and gradients of the parts along it

It runs in float64, for several draws of numbers and scales. A function with the first property is planned as if it were plain
operators. One with the second can be sharded along that dim, whatever its backward computes. The rest has to stay whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import _is_setup_context_defined as _separate
from torch.nn.modules._functions import BackwardHookFunction
from torch.utils._pytree import tree_flatten

from autotp.trace.graph import Scope

LARGEST = 1 << 22  # elements of all arguments together that are still run
SCALES = (1.0, 1e3, 1e-3)  # of the incoming gradients: clipping shows at one of them
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class TensorLike:
    """Describes a tensor argument of a call: its form, and its numbers where they are known."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    known: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Applied:
    """A call of `function.apply`; `args` has a `TensorLike` for each tensor."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def prove(call: Applied) -> Scope:
    """Returns the properties that running the function shows; none where it cannot be run by itself."""
    name = call.function.__qualname__
    forms = [a for a in call.args if isinstance(a, TensorLike)]
    if call.function is BackwardHookFunction:  # an identity that hooks of a module hang on
        return Scope("a backward hook", False, frozenset())
    try:
        if not forms or sum(prod(f.shape) for f in forms) > LARGEST:
            return Scope(name, False, frozenset())
        draws = [_Draw(call, scale, seed) for seed, scale in enumerate(SCALES)]
        dims = range(1, 1 + max(len(f.shape) for f in forms))
        return Scope(name, all(d.is_shown() for d in draws), frozenset(-d for d in dims if all(w.is_local(-d) for w in draws)))
    except Exception:  # whatever the function needs that a call by itself does not give it
        return Scope(name, False, frozenset())


class _Context:
    """Stands in for `ctx` where forward runs by itself; other attributes can be set on it."""

    def __init__(self, count: int) -> None:
        self.needs_input_grad = (True,) * count

    def save_for_backward(self, *tensors: Tensor) -> None:
        """Nothing is saved."""

    mark_dirty = mark_non_differentiable = save_for_forward = save_for_backward

    def set_materialize_grads(self, value: bool) -> None:
        """Nothing is made."""


@dataclass(frozen=True, slots=True)
class _Run:
    """Outputs, and the gradients of the arguments (None: none)."""

    outputs: tuple[Tensor, ...]
    grads: tuple[Tensor | None, ...]


class _Draw:
    """One draw of numbers for the tensor arguments and for the gradients of the outputs."""

    def __init__(self, call: Applied, scale: float, seed: int) -> None:
        self.call, self.seed = call, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.tensors = [self._numbers(a, positive=seed == 1) for a in call.args if isinstance(a, TensorLike)]
        outputs = self._outputs(self._apply, self.tensors)
        self.grads = [scale * torch.randn(o.shape, dtype=torch.float64, generator=self.generator).to(o.dtype) for o in outputs]
        self.whole = self._run(self._apply, self.tensors, self.grads)
        if not all(bool(torch.isfinite(o).all()) for o in self.whole.outputs if o.is_floating_point()) and seed == 1:
            raise ValueError("the numbers drawn are not in the function's domain")

    def _numbers(self, form: TensorLike, positive: bool) -> Tensor:
        if form.dtype.is_complex:
            return torch.randn(form.shape, dtype=torch.complex128, generator=self.generator)
        if form.dtype.is_floating_point:
            drawn = torch.randn(form.shape, dtype=torch.float64, generator=self.generator)
            return drawn.abs() + 0.1 if positive else drawn
        if form.known is not None:
            return form.known
        return torch.randint(0, 2, form.shape, generator=self.generator).to(form.dtype)

    def is_shown(self) -> bool:
        """True where autograd through the forward's operators gives the same."""
        try:
            return _equal(self.whole, self._run(self._forward, self.tensors, self.grads))
        except Exception:  # a forward that autograd cannot differentiate
            return False

    def is_local(self, dim: int) -> bool:
        """True where the function treats each index of a dim by itself."""
        n = max(t.shape[dim] for t in self.tensors if t.dim() >= -dim)
        if n < 2 or any(o.dim() < -dim or o.shape[dim] != n for o in self.whole.outputs):
            return False
        cut = [t.dim() >= -dim and t.shape[dim] == n for t in self.tensors]
        if any(g is not None and bool(g.count_nonzero()) for g, c in zip(self.whole.grads, cut, strict=True) if not c):
            return False
        middle = (n + 1) // 2
        for start, stop in ((0, middle), (middle, n)):
            tensors = [t.narrow(dim, start, stop - start) if c else t for t, c in zip(self.tensors, cut, strict=True)]
            grads = [g.narrow(dim, start, stop - start) for g in self.grads]
            try:
                part = self._run(self._apply, tensors, grads)
            except Exception:  # it needs the whole size
                return False
            outputs = tuple(o.narrow(dim, start, stop - start) for o in self.whole.outputs)
            pairs = zip(self.whole.grads, cut, strict=True)
            whole = tuple(g.narrow(dim, start, stop - start) if g is not None and c else g for g, c in pairs)
            if not _equal(_Run(outputs, whole), part):
                return False
        return True

    def _apply(self, args: tuple[Any, ...]) -> Any:
        return self.call.function.apply(*args, **self.call.kwargs)

    def _forward(self, args: tuple[Any, ...]) -> Any:
        function = self.call.function
        first = () if _separate(function.setup_context) else (_Context(len(args)),)  # type: ignore[no-untyped-call]
        return function.forward(*first, *args, **self.call.kwargs)

    def _outputs(self, call: Callable[[tuple[Any, ...]], Any], tensors: Sequence[Tensor]) -> list[Tensor]:
        given = iter(tensors)
        args = tuple(next(given) if isinstance(a, TensorLike) else copy.copy(a) for a in self.call.args)
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return [o for o in tree_flatten(call(args))[0] if isinstance(o, Tensor)]

    def _run(self, call: Callable[[tuple[Any, ...]], Any], tensors: Sequence[Tensor], grads: Sequence[Tensor]) -> _Run:
        leaves = [t.detach().clone().requires_grad_(t.is_floating_point() or t.is_complex()) for t in tensors]
        outputs = self._outputs(call, [t.clone() for t in leaves])  # a function may write into its argument
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if o.requires_grad]
        wanted = [t for t in leaves if t.requires_grad]
        found = iter(_grads(pairs, wanted))
        return _Run(tuple(o.detach() for o in outputs), tuple(next(found) if t.requires_grad else None for t in leaves))


def _grads(pairs: Sequence[tuple[Tensor, Tensor]], wanted: Sequence[Tensor]) -> Sequence[Tensor | None]:
    if not pairs or not wanted:
        return [None] * len(wanted)
    return torch.autograd.grad([o for o, _ in pairs], list(wanted), [g for _, g in pairs], allow_unused=True)


def _equal(a: _Run, b: _Run) -> bool:
    if len(a.outputs) != len(b.outputs):
        return False
    pairs = list(zip(a.outputs, b.outputs, strict=True))
    for x, y in zip(a.grads, b.grads, strict=True):
        if x is not None or y is not None:
            pairs.append((_or_zeros(x, y), _or_zeros(y, x)))
    return all(_close(x, y) for x, y in pairs)


def _or_zeros(x: Tensor | None, like: Tensor | None) -> Tensor:
    if x is not None:
        return x
    assert like is not None
    return torch.zeros_like(like)


def _close(x: Tensor, y: Tensor) -> bool:
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not x.numel():
        return True
    scale = float(x.abs().nan_to_num().max())
    return torch.allclose(x, y, rtol=TOLERANCE, atol=TOLERANCE * scale, equal_nan=True)
