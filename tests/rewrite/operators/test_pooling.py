"""Pools, patches and norms of images run over a rank's channels; over channels themselves they do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.testing import assert_equivalent

C = 32
X = torch.randn(2, 4, 8, 8)


class Image(nn.Module):
    """Something between two convolutions, which gives `made` channels."""

    def __init__(self, between: Callable[[], nn.Module], made: int) -> None:
        super().__init__()
        self.up, self.between, self.down = nn.Conv2d(4, C, 3, padding=1), between(), nn.Conv2d(made, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)).relu())  # type: ignore[no-any-return]


class Patches(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.fold(F.unfold(x, 2, stride=2) * 2, (8, 8), 2, stride=2)


class OverChannels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x.transpose(1, 3), 2).transpose(1, 3)


KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "max": (lambda: nn.MaxPool2d(2), C),
    "average": (lambda: nn.AvgPool2d(3, 2, 1), C),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d(2), C),
    "shuffled": (lambda: nn.PixelShuffle(2), C // 4),
    "unshuffled": (lambda: nn.PixelUnshuffle(2), C * 4),
    "patches": (Patches, C),
    "normed": (lambda: nn.InstanceNorm2d(C, affine=True), C),
    "normed by what was seen": (lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True), C),
}


@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_cut(kind: str) -> None:
    found = assert_equivalent(lambda: Image(*KINDS[kind]), tp=3, inputs={"x": X}, steps=1, certificate="graph")
    assert {"up.weight", "down.weight"} <= found.sharded


def test_neighbouring_channels_are_not() -> None:
    found = assert_equivalent(lambda: Image(OverChannels, C // 2), tp=2, inputs={"x": X}, certificate="graph")
    assert "mixes the elements of the dim" in found.plan.params["up.weight"].reason
