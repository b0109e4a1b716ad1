"""A Linear that gives no features, as where two widths of a config are equal by chance, trains beside others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from autotp.rewrite.modules.matrix import matrix
from autotp.testing import assert_equivalent


class Extra(nn.Module):
    """Joins what one Linear gives with what another gives, which has no features; `bias`: these have biases."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.up, self.none, self.down = nn.Linear(8, 16, bias), nn.Linear(8, 0, bias), nn.Linear(16, 8, bias)
        self.down_none = nn.Linear(0, 8, bias)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.cat([self.up(x), self.none(x)], dim=-1).relu()
        return self.down(h) + self.down_none(self.none(x))


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize(("shape", "tp"), [((2, 3, 8), 2), ((3, 8), 3), ((8,), 2), ((2, 2, 2, 8), 2)])
def test_no_features(shape: tuple[int, ...], tp: int) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert_equivalent(Extra, tp=tp, inputs={"x": x}, steps=1)


@pytest.mark.parametrize("shape", [(4, 0), (2, 3, 0), (0,), (0, 3, 5), (2, 5), (7,)])
def test_rows(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    rows = matrix(x)
    assert rows.shape == (x.shape[:-1].numel(), shape[-1]) and torch.equal(rows.flatten(), x.flatten())
    if 0 in shape[-1:] and len(shape) != 2:
        with pytest.raises(RuntimeError, match="ambiguous"):
            x.reshape(-1, shape[-1])  # the control
