"""An output of transformers keeps the order of its items where one of them is converted: code reads them by their positions."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from autotp.testing import assert_equivalent
from autotp.trace.boundary import copied

outputs = pytest.importorskip("transformers.modeling_outputs")
X = torch.randn(2, 5, 12, dtype=torch.float64)


class Inner(nn.Module):
    """Adds items to its output in another order than that of the fields of the class."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(12, 16), nn.Linear(12, 16), nn.Linear(16, 12)

    def forward(self, x: Tensor):
        h = self.up(x).relu()
        out = outputs.BaseModelOutput(last_hidden_state=self.down(h) + self.down(self.gate(x).tanh()))
        out["attentions"] = (h * 2,)
        out["hidden_states"] = (x, h)
        return out


class Outer(nn.Module):
    """Reads an item by its position, and returns all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = Inner(), nn.Linear(16, 12)

    def forward(self, x: Tensor):
        out = self.inner(x)
        return self.last(out[1][0]), out.to_tuple()


def test_items_are_read_by_position() -> None:
    found = assert_equivalent(Outer, tp=2, inputs=X, steps=1)
    assert found.plan.local_share < 0.6 and "inner" in {m.path for m in found.plan.modules if m.outputs}


def test_a_copy_of_the_class_has_another_order() -> None:
    """The control."""
    out = Inner()(X.float())
    assert list(copied(out)) == list(out) == ["last_hidden_state", "attentions", "hidden_states"]
    assert list(copy.copy(out)) != list(out)
