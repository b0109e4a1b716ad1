"""Convolutions and products that are cut alone, between whole activations, beside FSDP2, checkpoints and whole state dicts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp import checkpoint
from tests.composition.training import adamw, apart, by_block, mesh_of
from tests.support.ranks import Pool


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift, self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 32), nn.Linear(32, 12)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x + self.shift(condition)[:, None])))  # type: ignore[no-any-return]


class Patches(nn.Module):
    """A patch embedding of an odd number of channels, and blocks with a shift by a condition."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).mT
        for block in self.blocks:
            x = block(x, condition)
        return x


def data(step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    return {
        "image": torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=g),
        "condition": torch.randn(2, 6, dtype=torch.float64, generator=g),
    }


def steps(model: Any, optimizer: Any, numbers: range) -> None:
    for step in numbers:
        optimizer.zero_grad()
        model(**data(step)).square().sum().backward()
        optimizer.step()


def cut(model: Any) -> list[str]:
    """The weights that are cut alone."""
    params = autotp.plan_of(model).params
    return [n for n in ("patch.weight", "blocks.0.shift.weight", "blocks.1.shift.weight") if params[n].layout.dim == 0]


def trained(folder: str, dp: int, tp: int) -> tuple[float, float, int]:
    """(how far from one device after four steps, the same of one that resumes after two, number of weights cut alone)"""
    torch.manual_seed(0)
    alone = Patches().double().train()
    before = copy.deepcopy(alone)
    mesh = mesh_of(dp, tp)

    def made() -> tuple[Any, Any]:
        model = autotp.parallelize(copy.deepcopy(before), mesh, example_inputs=data(0), check="graph")
        model = by_block(model, mesh) if dp > 1 else model
        return model, adamw(model)

    steps(alone, adamw(alone), range(4))
    model, optimizer = made()
    found = len(cut(model))
    steps(model, optimizer, range(2))
    checkpoint.save(model, optimizer, folder)
    steps(model, optimizer, range(2, 4))
    again, other = made()
    checkpoint.load(again, other, folder)
    steps(again, other, range(2, 4))
    wanted = alone.state_dict()
    return apart(wanted, autotp.full_state_dict(model)), apart(wanted, autotp.full_state_dict(again)), found


@pytest.mark.parametrize(("dp", "tp"), [(1, 3), (2, 2)])
def test_training_and_checkpoints(dp: int, tp: int, pool: Pool, tmp_path: Path) -> None:
    for far, resumed, found in pool.run(trained, str(tmp_path / "state"), dp, tp, world=dp * tp):
        assert far <= 1e-9 and resumed <= 1e-9 and found == 3
