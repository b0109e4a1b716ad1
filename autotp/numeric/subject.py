"""Calls a model and records the results.

Dropout does nothing, in training mode too, since a rank's part of a mask is not a part of the mask of one device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from autotp.numeric.exact import Precision
from autotp.trace.boundary import flatten_result
from autotp.trace.example import Example


class CannotRun(Exception):
    """The model cannot be run for its numbers; says why."""


_WIDE = {torch.float16: torch.float64, torch.bfloat16: torch.float64, torch.float32: torch.float64, torch.complex64: torch.complex128}


def in_precision(tree: Any, precision: Precision) -> Any:
    """Fresh tensors on the CPU, floating-point ones in the precision's dtype; one that is there twice stays one."""
    made: dict[int, Tensor] = {}

    def once(t: Tensor) -> Tensor:
        if id(t) not in made:
            made[id(t)] = cast(t)
            made[id(made[id(t)])] = made[id(t)]
        return made[id(t)]

    def cast(t: Tensor) -> Tensor:
        dtype = t.dtype
        if precision.dtype is torch.float64:
            dtype = _WIDE.get(dtype, dtype)
        elif dtype.is_floating_point:
            dtype = precision.dtype
        return t.detach().to(device="cpu", dtype=dtype, copy=True)

    return flatten_result(tree_map_only(Tensor, once, tree), lambda _, t: once(t))  # in dataclasses too


_DROPOUTS = frozenset(
    (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout, torch.alpha_dropout)
)


class NoDropout(TorchFunctionMode):
    """Dropout hands its argument on."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            args = (*args[:4], 0.0, *args[5:]) if len(args) > 4 else args
            if "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **kwargs)


@contextmanager
def without_dropout(precision: Precision) -> Iterator[None]:
    """The context in which both models run."""
    with NoDropout(), precision.mode():
        yield


@dataclass(slots=True)
class Seen:
    """The record of one run of a model, by path: results of its `calls`, gradients of arguments, and of parameters by name."""

    calls: tuple[Example, ...] = ()

    results: dict[str, Tensor] = field(default_factory=dict)
    arguments: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    buffers: dict[str, Tensor] = field(default_factory=dict)


def run(model: nn.Module, examples: tuple[Example, ...], precision: Precision, seconds: float = math.inf) -> Seen:
    """Every example without gradients and with them; `model` is changed.

    `seconds`: of CPU time, after which nothing but the first call in training mode is made.
    """
    seen = Seen()
    until = time.thread_time() + seconds
    with without_dropout(precision):
        for at, example in enumerate(examples):
            trained = not example.training or any(e.training for e in seen.calls)
            if at and trained and time.thread_time() > until:
                continue
            seen.calls += (example,)
            model.train(example.training)
            if at == 0 or example.decode is not None:
                _without_gradients(model, example, precision, seen)
            _with_gradients(model, example, precision, seen)
    seen.gradients = {n: _plain(p.grad) for n, p in model.named_parameters() if p.grad is not None}
    seen.buffers = {n: _plain(b) for n, b in model.named_buffers()}
    return seen


def _plain(tensor: Tensor) -> Tensor:
    """A dense copy of what this rank holds of a tensor."""
    local = (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()
    return local.clone() if local.layout is torch.strided else local.to_dense()


def _without_gradients(model: nn.Module, example: Example, precision: Precision, seen: Seen) -> None:
    with torch.no_grad():
        torch.manual_seed(0)
        result = example.call(model, in_precision(example.make(), precision))
        _keep(result, f"{example.name} without gradients", seen)
        more = example.decode(result) if example.decode is not None else None
        if more is not None:
            _keep(example.call(model, _cast_new(more, precision)), f"{example.name}+decode", seen)


def _cast_new(inputs: Mapping[str, Any], precision: Precision) -> dict[str, Any]:
    """The keywords of a second call: what the first returned is there as it is."""
    return {k: in_precision(v, precision) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def _with_gradients(model: nn.Module, example: Example, precision: Precision, seen: Seen) -> None:
    try:
        leaves, found = _called(model, example, precision, seen, of_inputs=True)
    except RuntimeError as error:
        if "requires_grad flags of leaf" not in str(error):
            raise
        # code that asks for gradients of its own inputs (`x.requires_grad = True`) takes none that have some already
        leaves, found = _called(model, example, precision, seen, of_inputs=False)
    total = weighted(found)
    if total is not None:
        total.backward()  # type: ignore[no-untyped-call]
    seen.arguments |= {path: t.grad for path, t in leaves.items() if t.grad is not None}


def _called(
    model: nn.Module, example: Example, precision: Precision, seen: Seen, *, of_inputs: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(the inputs whose gradients are wanted, the results) of a call, by path."""
    leaves: dict[str, Tensor] = {}
    given: dict[int, Tensor] = {}

    def leaf(where: tuple[str | int, ...], t: Tensor) -> Tensor:
        if of_inputs and t.is_floating_point():
            leaves[f"{'.'.join(map(str, where))} of {example.name}"] = t.requires_grad_()
            given[id(t)] = given[id(t)] if id(t) in given else t * 1  # a leaf must not be changed in place
            return given[id(t)]
        return t

    inputs = flatten_result(dict(in_precision(example.make(), precision)), leaf)
    torch.manual_seed(0)
    return leaves, _keep(example.call(model, inputs), example.name, seen)


def _keep(result: Any, name: str, seen: Seen) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}

    def keep(where: tuple[str | int, ...], t: Tensor) -> Tensor:
        found[".".join(map(str, where)) or "result"] = t
        return t

    flatten_result(result, keep)
    seen.results |= {f"{path} of {name}": _plain(t) for path, t in found.items()}
    return {path: t for path, t in found.items() if t.layout is torch.strided}


def weighted(results: Mapping[str, Tensor]) -> Tensor | None:
    """Σ results × fixed random weights: a number whose gradient reaches every entry differently. None where nothing has a gradient."""
    total: Tensor | None = None
    generator = torch.Generator().manual_seed(0)
    for t in results.values():
        if t.requires_grad and (t.is_floating_point() or t.is_complex()):
            t = torch.view_as_real(t) if t.is_complex() else t
            weights = torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
            term = (torch.where(t.isfinite(), t, 0) * weights).sum()
            total = term if total is None else total + term
    return total
