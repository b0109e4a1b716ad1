"""Parameters that someone put in the place of the parallel ones: saved as what they are, loaded into as they lie."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autotp
from tests.support.ranks import Pool, mesh

X = torch.linspace(-1, 1, 2 * 3 * 16, dtype=torch.float64).sin().view(2, 3, 16)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down, self.norm = nn.Linear(16, 36), nn.Linear(16, 36), nn.Linear(36, 16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(self.norm(x))) * self.up(x))  # type: ignore[no-any-return]


def whole(t: Any) -> Tensor:
    t = t.detach()
    return (t.full_tensor() if isinstance(t, DTensor) else t).clone()  # type: ignore[no-any-return]


def _assigned(m: Any) -> None:
    m.load_state_dict({n: whole(t) for n, t in m.state_dict().items()}, assign=True)
    m.requires_grad_(True)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda m: None,  # the control
    "a whole one": lambda m: setattr(m.up, "weight", nn.Parameter(whole(m.up.weight))),
    "a whole bias": lambda m: setattr(m.gate, "bias", nn.Parameter(whole(m.gate.bias))),
    "all whole": _assigned,
    "made of another": lambda m: setattr(m.up, "weight", nn.Parameter(m.gate.weight.detach().flip(0))),
    "as another is cut": lambda m: setattr(m.up, "weight", nn.Parameter(m.gate.weight.detach() * 2)),
    "a view": lambda m: setattr(m.down, "weight", nn.Parameter(m.up.weight.detach().t())),
    "a view where one was whole": lambda m: setattr(m.norm, "weight", nn.Parameter(m.up.weight.detach()[3])),
}


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[Tensor]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(X).sin().sum()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [torch.stack(losses), *(whole(p) for p in model.parameters())]


def worst(wanted: list[Tensor], got: list[Tensor]) -> float:
    return max(float((a - b).abs().max() / (a.abs().max() + 1e-12)) for a, b in zip(wanted, got, strict=True))


def resumed(name: str, folder: str) -> dict[str, float]:
    """Trained, changed, saved, trained on, loaded, trained on again: how far both are from one device, and the files from the model."""
    change = CHANGES[name]
    torch.manual_seed(0)
    plain = Net().double()
    model = copy.deepcopy(plain)
    autotp.parallelize(model, mesh(), example_inputs={"x": X}, check="graph")
    assert autotp.plan_of(model).local_share < 0.6
    for m in (plain, model):
        change(m)
    wanted_by, got_by = (torch.optim.AdamW(m.parameters(), lr=0.01, foreach=True) for m in (plain, model))
    train(plain, wanted_by, 2)
    train(model, got_by, 2)
    wanted_state = {n: whole(t) for n, t in plain.state_dict().items()}
    wanted = train(plain, wanted_by, 2)
    autotp.checkpoint.save(model, got_by, f"{folder}/state")
    autotp.save_pretrained(model, f"{folder}/files")
    train(model, got_by, 3)
    autotp.checkpoint.load(model, got_by, f"{folder}/state")
    files = load_file(f"{folder}/files/model.safetensors")
    loaded = {n: whole(t) for n, t in model.state_dict().items()}
    errors = {"on": worst(wanted, train(model, got_by, 2))}
    errors |= {f"file {n}": worst([wanted_state[n]], [t]) for n, t in files.items()}
    errors |= {f"state {n}": worst([t], [loaded[n]]) for n, t in wanted_state.items()}
    return errors


@pytest.mark.parametrize("name", CHANGES)
def test_saved_and_resumed(pool: Pool, tmp_path: Path, name: str) -> None:
    for errors in pool.run(resumed, name, str(tmp_path)):
        assert all(error < 1e-9 for error in errors.values()), errors


def of_another_shape(folder: str) -> str:
    torch.manual_seed(0)
    model: Any = Net().double()
    autotp.parallelize(model, mesh(), example_inputs={"x": X}, check="graph")
    model.up.weight = nn.Parameter(model.up.weight.to_local().clone())
    with pytest.raises(autotp.AutoTPError) as error:
        autotp.checkpoint.save(model, None, folder)
    return str(error.value)


def test_a_part_says_what_to_put_there(pool: Pool, tmp_path: Path) -> None:
    for said in pool.run(of_another_shape, str(tmp_path / "state")):
        assert "up.weight" in said and "put a whole one there, of shape (36, 16)" in said, said
