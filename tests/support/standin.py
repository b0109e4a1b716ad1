"""Stand-ins for autotp that do nothing: they show that the harness passes what is equal and fails what is not."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tests.support.equivalence import Subject


def parallelize(model: nn.Module, mesh: object, **options: Any) -> nn.Module:
    return model


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def doubled_gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every bias gradient counted twice, as when a replicated parameter is reduced once too often."""
    return {n: g * 2 if n.endswith("bias") else g for n, g in gradients(model).items()}


def replicated() -> Subject:
    """Every rank runs the whole model: equal by construction."""
    return Subject(parallelize, lambda model: model.state_dict(), gradients)


def replicated_with_wrong_gradients() -> Subject:
    """Equal but for the gradients of biases."""
    return Subject(parallelize, lambda model: model.state_dict(), doubled_gradients)


def nudge(model: nn.Module) -> None:
    """Change one weight on the last rank by a millionth of its size."""
    if dist.get_rank() == dist.get_world_size() - 1:
        weight = max((p for p in model.parameters()), key=lambda p: p.numel())
        with torch.no_grad():
            weight.view(-1)[: weight.numel() // 2] *= 1 + 1e-6


def swap_heads(model: nn.Module) -> None:
    """Swap the first two eighths of the rows of each query projection, on every rank."""
    for name, parameter in model.named_parameters():
        if name.endswith("q_proj.weight"):
            rows = parameter.shape[0] // 8
            with torch.no_grad():
                parameter[: 2 * rows] = torch.cat([parameter[rows : 2 * rows], parameter[:rows]])


def rank_one_raises(model: nn.Module) -> None:
    """A rank that fails while the others go on."""
    if dist.get_rank() == 1:
        raise RuntimeError("rank one fails")
