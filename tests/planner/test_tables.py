"""Tables that are looked up: long ones are cut by rows, whatever their ids are made of; short ones that are no vocabulary stay whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.planner.choice import LONG
from autotp.testing import NotEquivalent, assert_equivalent, sabotage

IDS = torch.randint(0, 50, (2, 6))


class Hashed(nn.Module):
    """Tokens by a hash of their ids, and positions."""

    def __init__(self, hashes: int = LONG + 1, positions: int = LONG) -> None:
        super().__init__()
        self.hashes, self.positions, self.out = nn.Embedding(hashes, 4), nn.Embedding(positions, 4), nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hashed = ((ids + 1) * 31) % self.hashes.num_embeddings
        x = self.hashes(hashed) + self.positions(torch.arange(ids.shape[1]))
        return x + self.out(x)


@pytest.mark.parametrize("tp", [2, 3])
def test_long_tables_are_cut_by_rows(tp: int) -> None:
    found = assert_equivalent(Hashed, tp=tp, inputs={"ids": IDS}, steps=1)
    assert {"hashes.weight", "positions.weight"} <= found.sharded
    assert all(found.plan.params[f"{name}.weight"].layout.dim == 0 for name in ("hashes", "positions"))


def test_short_ones_stay_whole() -> None:
    plan = autotp.plan(Hashed(512, LONG - 1), tp=2, example_inputs={"ids": IDS})
    assert [plan.params[f"{name}.weight"].layout.dim for name in ("hashes", "positions")] == [None, None]
    assert "short" in plan.params["positions.weight"].reason


def test_without_its_sum_a_table_gives_another_model() -> None:
    plan = autotp.plan(Hashed(), tp=2, example_inputs={"ids": IDS})
    mistake = next(m for m in sabotage.mutations(plan) if "hashes" in str(m) or "<root>" in str(m))
    with pytest.raises(NotEquivalent):
        assert_equivalent(Hashed, tp=2, inputs={"ids": IDS}, sabotage=mistake)
