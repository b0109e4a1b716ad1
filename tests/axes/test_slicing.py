"""Runs and pieces of a dim that have no index, or all of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autotp.testing import assert_equivalent


class Between(nn.Module):
    """A function of an activation between two linears, whose width of 12 may be cut."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up, self.down, self.function = nn.Linear(8, 12), nn.Linear(12, 8), function

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.function(torch.relu(self.up(x))))


def joined(piece: Callable[[Tensor], Tensor], dim: int = -1) -> Callable[[Tensor], Tensor]:
    return lambda h: torch.cat([h, piece(h)], dim)


CUT = {
    "narrow at the start": joined(lambda h: h.narrow(-1, 0, 0)),
    "narrow in the middle": joined(lambda h: h.narrow(-1, 5, 0)),
    "narrow from the end": joined(lambda h: h.narrow(-1, -2, 0)),
    "narrow behind the end": joined(lambda h: h.narrow(-1, h.shape[-1], 0)),
    "narrow of a batch": joined(lambda h: h.narrow(0, 0, 0), 0),
    "narrow to all": lambda h: h.narrow(-1, 0, h.shape[-1]),
    "slice at the start": joined(lambda h: h[..., 0:0]),
    "slice in the middle": joined(lambda h: h[..., 5:5]),
    "slice from the end": joined(lambda h: h[..., -2:-2]),
    "slice backwards": joined(lambda h: h[..., 5:2]),
    "slice past the end": joined(lambda h: h[..., 12:]),
    "slice with a step": joined(lambda h: h[..., 0:0:2]),
    "split of nothing": lambda h: torch.cat([h, *h[..., :0].split(3, -1)], -1),
    "split into one": lambda h: torch.cat(h.split(20, -1), -1),
    "split with an empty section": lambda h: torch.cat(h.split([0, h.shape[-1] // 2, 0, h.shape[-1] // 2], -1), -1),
    "chunk of nothing": lambda h: torch.cat([h, *h[..., :0].chunk(2, -1)], -1),
    "narrow at a number, which is changed there": joined(lambda h: h.narrow(-1, 12, 0)),
    "narrow to all by a number": lambda h: h.narrow(-1, 0, 12),
    "split by a number": lambda h: torch.cat(h.split(5, -1), -1),
    "zeros of no size": joined(lambda h: torch.zeros(h.shape[0], 0)),
}
WHOLE = {
    "slice whose ends cross on a shard": joined(lambda h: h[..., -6:6]),
    "narrow copy": joined(lambda h: torch.narrow_copy(h, -1, 0, 0)),
    "new tensor of no size": joined(lambda h: h.new_empty(0)),
}


def outcome(function: Callable[[Tensor], Tensor]) -> int | None:
    """The dim along which the first weight is cut, in a model that is the same on one device and on two ranks."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Between(function)

    return assert_equivalent(build, inputs={"x": torch.randn(3, 8)}, tp=2).plan.params["up.weight"].layout.dim


@pytest.mark.parametrize("name", CUT)
def test_no_index_is_no_reason_to_keep_a_dim_whole(name):
    assert outcome(CUT[name]) == 0


@pytest.mark.parametrize("name", WHOLE)
def test_a_number_that_is_wrong_on_a_shard_keeps_the_dim_whole(name):
    assert outcome(WHOLE[name]) is None
