"""Stand-ins for autotp that do nothing, or one thing wrong: they show that a check passes what is equal and fails what is not.

Each is a context in which the public functions that a check calls are the stand-ins; pass it as `around` of `pooled.equivalent`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn

import autotp

Grads = Callable[[nn.Module], dict[str, torch.Tensor]]


@cache
def _some_plan() -> autotp.Plan:
    return autotp.plan(nn.Linear(4, 4), tp=1, example_inputs={"input": torch.ones(1, 4)})


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def doubled_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every bias gradient counted twice, as when a replicated parameter is reduced once too often."""
    return {n: g * 2 if n.endswith("bias") else g for n, g in gradients(model).items()}


@contextmanager
def _instead(change: Callable[[nn.Module], None], grads: Grads = gradients) -> Iterator[None]:
    plan = _some_plan()

    def parallelize(model: nn.Module, mesh: object, **options: Any) -> nn.Module:
        change(model)
        return model

    with ExitStack() as stack:
        for name, function in (
            ("parallelize", parallelize),
            ("full_state_dict", lambda model: model.state_dict()),
            ("full_grads", grads),
            ("plan_of", lambda model: plan),
        ):
            stack.enter_context(patch.object(autotp, name, function))
        yield


def replicated() -> Any:
    """Every rank runs the whole model: equal by construction."""
    return _instead(lambda model: None)


def wrong_gradients() -> Any:
    """Equal but for the gradients of biases."""
    return _instead(lambda model: None, doubled_gradients)


def nudged() -> Any:
    """One weight is changed on the last rank by a millionth of its size."""

    def nudge(model: nn.Module) -> None:
        if dist.get_rank() == dist.get_world_size() - 1:
            weight = max((p for p in model.parameters()), key=lambda p: p.numel())
            with torch.no_grad():
                weight.view(-1)[: weight.numel() // 2] *= 1 + 1e-6

    return _instead(nudge)


def swapped_heads() -> Any:
    """The first two eighths of the rows of each query projection are swapped, on every rank."""

    def swap(model: nn.Module) -> None:
        for name, parameter in model.named_parameters():
            if name.endswith("q_proj.weight"):
                rows = parameter.shape[0] // 8
                with torch.no_grad():
                    parameter[: 2 * rows] = torch.cat([parameter[rows : 2 * rows], parameter[:rows]])

    return _instead(swap)


def failing() -> Any:
    """A rank that fails while the others go on."""

    def fail(model: nn.Module) -> None:
        if dist.get_rank() == 1:
            raise RuntimeError("rank one fails")

    return _instead(fail)
