"""Parameters that a user makes of others after parallelize: laid out too, but whole, and perhaps of another shape."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autotp
from tests.support.ranks import Pool, mesh
from tests.support.slow import swept

ROWS = torch.arange(39, -1, -1)
IDS = (torch.arange(12).view(2, 6) * 7) % 40


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.up, self.down, self.head = nn.Embedding(40, 24), nn.Linear(24, 48), nn.Linear(48, 24), nn.Linear(24, 40)
        self.norm, self.scale = nn.LayerNorm(24), nn.Parameter(torch.rand(48))

    def forward(self, ids: Tensor) -> Tensor:
        x: Tensor = self.emb(ids)
        x = x + self.down(F.gelu(self.up(x)) * self.scale)
        return self.head(self.norm(x))  # type: ignore[no-any-return]


def _put(path: str, value: Callable[[Any], Tensor]) -> Callable[[Any], None]:
    owner, _, name = path.rpartition(".")
    return lambda m: setattr(m.get_submodule(owner), name, nn.Parameter(value(m)))


EQUAL: dict[str, Callable[[Any], None]] = {
    "other rows": _put("emb.weight", lambda m: m.emb.weight.detach()[ROWS]),
    "other rows of the head": _put("head.weight", lambda m: m.head.weight.detach()[ROWS]),
    "a sum": _put("head.weight", lambda m: m.head.weight.detach() + m.emb.weight.detach()),
    "flipped": _put("down.weight", lambda m: m.down.weight.detach().flip(1)),
    "transposed": _put("down.weight", lambda m: m.up.weight.detach().t()),
    "a bias": _put("up.bias", lambda m: m.up.bias.detach()[torch.arange(47, -1, -1)]),
    "of a module": _put("scale", lambda m: m.scale.detach()[torch.arange(47, -1, -1)] * 2),
    "of a norm": _put("norm.weight", lambda m: m.norm.weight.detach()[torch.arange(23, -1, -1)] * 2),
    "put together": _put("up.weight", lambda m: torch.cat([m.up.weight.detach()[24:], m.up.weight.detach()[:24]])),
}
REFUSED: dict[str, Callable[[Any], None]] = {
    "more rows": _put("emb.weight", lambda m: torch.cat([m.emb.weight.detach(), torch.full((4, 24), 0.1).double()])),
    "fewer rows": lambda m: _rows_of_the_head(m, slice(0, 20)),
    "some rows": lambda m: _rows_of_the_head(m, torch.arange(20) * 2),
}


def _rows_of_the_head(m: Any, rows: Any) -> None:
    m.head.weight, m.head.bias = nn.Parameter(m.head.weight.detach()[rows]), nn.Parameter(m.head.bias.detach()[rows])


def _pruned(m: Any) -> None:
    """Half of the neurons, as structured pruning does it."""
    kept = torch.arange(24) * 2 + 1
    for path, dim in (("up.weight", 0), ("up.bias", 0), ("down.weight", 1), ("scale", 0)):
        owner, _, name = path.rpartition(".")
        module = m.get_submodule(owner)
        setattr(module, name, nn.Parameter(getattr(module, name).detach().index_select(dim, kept)))


REFUSED["structured pruning"] = _pruned


def after(change: Callable[[Any], None], model: Any, frozen: bool) -> dict[str, Tensor]:
    change(model)
    model.requires_grad_(not frozen)
    out = model(IDS)
    found = {"out": out.detach()}
    if not frozen:
        out.sin().sum().backward()
        found |= {n: p.grad for n, p in model.named_parameters()}
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in found.items()}


def compared(table: str) -> dict[str, str]:
    """Change → "" or the error: where they differ, an assertion."""
    said = {}
    for name, change in (EQUAL if table == "equal" else REFUSED).items():
        for frozen in (False, True):
            torch.manual_seed(0)
            plain = Net().double()
            model = copy.deepcopy(plain)
            autotp.parallelize(model, mesh(), example_inputs={"ids": IDS}, check="graph")
            assert autotp.plan_of(model).local_share < 0.6
            wanted = after(change, plain, frozen)
            try:
                got = after(change, model, frozen)
            except autotp.AutoTPError as error:
                said[f"{name} {frozen}"] = str(error)
                continue
            assert got.keys() == wanted.keys()
            worst = max(float((got[n] - w).abs().max() / (w.abs().max() + 1e-12)) for n, w in wanted.items())
            said[f"{name} {frozen}"] = "" if worst < 1e-9 else f"differs: {worst}"
    return said


@pytest.mark.parametrize("world", swept([2, 3], 2))
def test_made_of_others(pool: Pool, world: int) -> None:
    for said in pool.run(compared, "equal", world=world):
        assert not any(said.values()), said
    for said in pool.run(compared, "refused", world=world):
        assert all("was replaced after parallelize" in text and "change shapes before parallelize" in text for text in said.values()), said
