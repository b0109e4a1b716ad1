"""A model on one device and its parallel form, in every mode that a user runs: eval and train, with gradients and without."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils._pytree import tree_leaves, tree_map_only

import autotp
from autotp.testing.ranks.run import run

LIMIT = 1e-9
MODES: tuple[tuple[bool, Callable[[], AbstractContextManager[Any]]], ...] = (
    (False, nullcontext),
    (True, nullcontext),
    (False, torch.no_grad),
    (True, torch.no_grad),
    (False, torch.inference_mode),
)


@dataclass(frozen=True, slots=True)
class _Job:
    model: nn.Module
    inputs: Mapping[str, Any]
    calls: tuple[Callable[[nn.Module, Mapping[str, Any]], Any], ...]


def call(model: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The usual call."""
    return model(**inputs)


def same_in_every_mode(
    factory: Callable[[], nn.Module], inputs: Mapping[str, Any], tp: int, backend: str = "local", also: Callable[..., Any] | None = None
) -> float:
    """Compare outputs and gradients at 1e-9 of their largest element; the share of the parameters that a rank holds.

    Elements below 1e-3 count as that: some gradients are zero but for rounding. `also`: another way to call the model.
    """
    torch.manual_seed(0)
    model = factory().double()
    calls = (call,) if also is None else (call, also)
    share: float = run(backend, _compare, _Job(model, inputs, calls), tp, 120.0)[0]
    return share


def _compare(job: _Job) -> float:
    one = copy.deepcopy(job.model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    several = autotp.parallelize(copy.deepcopy(job.model), mesh, example_inputs=dict(job.inputs), check="graph")
    for way in job.calls:
        for training, mode in MODES:
            results: list[Tensor] = []
            grads: list[dict[str, Tensor]] = []
            arguments: list[list[Tensor]] = []
            for model in (one, several):
                model.train(training)
                model.zero_grad()
                inputs = tree_map_only(Tensor, lambda t: t.clone().requires_grad_(t.is_floating_point()), dict(job.inputs))
                with mode():
                    result = way(model, inputs)
                results.append(result.detach())
                if result.requires_grad:
                    weights = torch.randn(result.shape, dtype=result.dtype, generator=torch.Generator().manual_seed(1))
                    (result * weights).sum().backward()
                    arguments.append([t.grad for t in tree_leaves(inputs) if isinstance(t, Tensor) and t.grad is not None])
            grads += [{n: p.grad for n, p in one.named_parameters() if p.grad is not None}, autotp.full_grads(several)]
            where = f"{'train' if training else 'eval'}, {mode.__name__}, {getattr(way, '__name__', way)}"
            _close(results[1], results[0], f"the result ({where})")
            if mode is nullcontext:
                assert grads[0].keys() == {n for n, g in grads[1].items() if g is not None}, where
                for name, grad in grads[0].items():
                    _close(grads[1][name], grad, f"the gradient of {name} ({where})")
                for number, (a, b) in enumerate(zip(*arguments, strict=True)):
                    _close(b, a, f"the gradient of argument {number} ({where})")
    return _share(several, one)


def _share(several: nn.Module, one: nn.Module) -> float:
    local = sum(getattr(p, "_local_tensor", p).numel() for p in several.parameters())
    return local / sum(p.numel() for p in one.parameters())


def _close(got: Tensor, wanted: Tensor, what: str) -> None:
    assert got.shape == wanted.shape, what
    error = float((got - wanted).abs().max() / wanted.abs().max().clamp_min(1e-3)) if wanted.numel() else 0.0
    assert error < LIMIT, f"{what} is off by {error:.1e}"
