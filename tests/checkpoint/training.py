"""Tiny models in float64 that are trained for a few steps on some of the ranks of a pool, saved, and resumed on others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import autotp
from autotp.api import parallelize_as
from autotp.numeric.exact import DOUBLE
from autotp.plan.plan import Plan
from benchmarks.optimizers import build

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "AdamW": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=1e-2, amsgrad=True, fused=True),
}
_PLANS: dict[tuple[str, int], Plan] = {}
_MESHES: dict[int, DeviceMesh] = {}


def mesh_of(tp: int) -> DeviceMesh:
    """The mesh of the first `tp` ranks of the pool; made on every rank."""
    if tp not in _MESHES:
        _MESHES[tp] = DeviceMesh("cpu", torch.arange(tp), mesh_dim_names=("tp",))
    return _MESHES[tp]


def parallel(kind: str, tp: int, *, fresh: bool = False) -> nn.Module:
    """The parallel model `kind` over the first `tp` ranks; call on those. `fresh`: with other weights than `build` gives."""
    model = build(kind)
    if fresh:
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.123)
    mesh = mesh_of(tp)
    if tp > 1 and (kind, tp) in _PLANS:
        return parallelize_as(model, mesh, _PLANS[kind, tp])
    made = autotp.parallelize(model, mesh)
    _PLANS[kind, tp] = autotp.plan_of(made)
    return made


def grouped(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, as users make them: matrices, and the rest without decay."""
    params = list(model.parameters())
    return [{"params": [p for p in params if p.ndim > 1]}, {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0, "lr": 2e-3}]


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Steps on tokens that depend on the number of the step alone."""
    for step in steps:
        ids = torch.randint(0, 60, (2, 8), generator=torch.Generator().manual_seed(step))
        with DOUBLE.mode():
            loss: Tensor = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()


def apart(wanted: Any, got: Any) -> float:
    """max|a − b| / max|a| over the tensors of two dicts; inf where names differ."""
    if set(wanted) != set(got):
        return float("inf")
    return max(float((wanted[n] - got[n]).abs().max()) / max(float(wanted[n].abs().max()), 1e-6) for n in wanted)


def moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The state of each parameter, whole and in the model's order; numbers too. Collective over the model's ranks."""
    from autotp.parallel_state import state_of
    from autotp.rewrite.parameters.full import unshard

    state = state_of(model)
    found: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        for key, value in sorted(optimizer.state.get(p, {}).items()):
            same = isinstance(value, Tensor) and value.shape == p.shape
            found[f"{name}.{key}"] = unshard(value, state.plan.params[name].layout, state.comm) if same else torch.as_tensor(value)
    return found


def plain_moments(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """The same of a model on one device."""
    return {f"{n}.{k}": torch.as_tensor(v) for n, p in model.named_parameters() for k, v in optimizer.state.get(p, {}).items()}


def barrier() -> None:
    """Over the whole pool, also for ranks that had nothing to do."""
    dist.barrier()
