"""Collectives keep the order of strides: kernels choose their way by it, and the backward of batch norm may choose a wrong one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autotp.rewrite.collectives import conversions
from autotp.rewrite.collectives.strides import laid_out
from autotp.testing import NotEquivalent, assert_equivalent


class Spectrogram(nn.Module):
    """Normalizes each band of [batch, 1, time, BANDS]; what follows is wider, so its gradient is summed here."""

    BANDS = 8

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(self.BANDS)
        self.spread = nn.Conv2d(1, 16, (1, self.BANDS))
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x.transpose(1, 3)).transpose(1, 3)
        x = self.spread(F.interpolate(x, (4 * x.shape[2], self.BANDS), mode="bicubic", align_corners=True)).flatten(2).transpose(1, 2)
        return self.down(F.gelu(self.up(x)))  # type: ignore[no-any-return]


X = torch.randn(3, 1, 5, Spectrogram.BANDS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("certificate", ["graph", "numbers"])
def test_batch_norm_gets_gradients_in_its_order(certificate: str) -> None:
    found = assert_equivalent(Spectrogram, inputs={"x": X}, tp=2, certificate=certificate)
    assert found.plan.params["up.weight"].layout.dim == 0
    assert any(m.path == "norm" and m.outputs for m in found.plan.modules)


def test_contiguous_ones_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversions, "laid_out", lambda found, like: found)
    with pytest.raises(NotEquivalent, match=r"norm\.weight"):
        assert_equivalent(Spectrogram, inputs={"x": X}, tp=2, certificate="graph")


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 3, 1), (3, 0, 2, 1), (0, 3, 2, 1)])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 3, 4, 1), (2, 1, 4, 5), (0, 3, 4, 5)])
def test_the_order_of_memory_is_that_of_the_other(order: tuple[int, ...], shape: tuple[int, ...]) -> None:
    like = torch.randn([shape[dim] for dim in order]).permute([order.index(dim) for dim in range(4)])
    found = torch.randn(shape[0], 6, *shape[2:])
    kept = laid_out(found, like)
    assert torch.equal(kept, found)
    long = [d for d in range(4) if shape[d] > 1]
    assert kept.is_contiguous() or sorted(long, key=lambda d: -kept.stride(d)) == sorted(long, key=lambda d: -like.stride(d))
    assert laid_out(found, torch.zeros(1).expand(shape)).stride() == found.stride()
    assert like.is_contiguous() or laid_out(torch.randn(shape), like).stride() == like.stride()
