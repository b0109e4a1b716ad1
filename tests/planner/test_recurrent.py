"""Recurrent layers stay whole, for one reason, and what is around them is sharded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp.testing import assert_equivalent
from tests.support.slow import in_turns

VOCABULARY, WIDTH, HIDDEN = 48, 12, 18
INPUTS = {"ids": torch.arange(10).view(2, 5) * 7 % VOCABULARY}


class Tagger(nn.Module):
    """A recurrent layer between two MLPs, an embedding and a head."""

    def __init__(self, layer: Callable[..., nn.Module], **more: Any) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, WIDTH)
        self.before = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))
        self.layer = layer(WIDTH, HIDDEN, batch_first=True, **more)
        width = (more.get("proj_size") or HIDDEN) * (2 if more.get("bidirectional") else 1)
        self.after = nn.Sequential(nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        h, _ = self.layer(self.before(self.table(ids)))
        return self.head(h + self.after(h))


class Steps(nn.Module):
    """A cell that the code steps."""

    def __init__(self, cell: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(VOCABULARY, WIDTH), cell(WIDTH, HIDDEN), nn.Linear(HIDDEN, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        state: Any = None
        out = []
        for x in self.table(ids).unbind(1):
            state = self.layer(x, state)
            out.append(state[0] if isinstance(state, tuple) else state)
        return self.head(torch.stack(out, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "LSTM": lambda: Tagger(nn.LSTM),
    "LSTM of projections": lambda: Tagger(nn.LSTM, proj_size=6, num_layers=2),
    "GRU": lambda: Tagger(nn.GRU, num_layers=2, bidirectional=True),
    "RNN": lambda: Tagger(nn.RNN, nonlinearity="relu"),
    "steps of an LSTM": lambda: Steps(nn.LSTMCell),
    "steps of a GRU": lambda: Steps(nn.GRUCell),
}


@pytest.mark.parametrize(("name", "tp"), in_turns(MODELS, (2, 3)))
def test_what_is_around_a_recurrent_layer_is_sharded(name: str, tp: int) -> None:
    found = assert_equivalent(MODELS[name], tp=tp, inputs=INPUTS, steps=1)
    recurrent = {n: p for n, p in found.plan.params.items() if n.startswith("layer.")}
    assert found.sharded == {n for n in found.plan.params if n not in recurrent and not n.endswith("2.bias")}
    assert all("each step of a recurrent layer needs all hidden units" in p.reason for p in recurrent.values())
    assert any(n in found.plan.replicated_products for n in recurrent)
