"""Pools, patches, norms and convolutions of images run over a rank's channels or positions where they mix none of these."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.testing import assert_equivalent
from tests.support.slow import in_turns

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


class ChannelsLast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.contiguous(memory_format=torch.channels_last)


class Strided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x * 1).as_strided_(x.shape, (C * 64, 64, 8, 1))


class OverChannels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x.transpose(1, 3), 2).transpose(1, 3)


KINDS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "max": (lambda: nn.MaxPool2d(2), C),
    "average": (lambda: nn.AvgPool2d(3, 2, 1), C),
    "adaptive": (lambda: nn.AdaptiveAvgPool2d(2), C),
    "adaptive to one, channels last": (lambda: nn.Sequential(ChannelsLast(), nn.AdaptiveAvgPool2d(1)), C),
    "shuffled": (lambda: nn.PixelShuffle(2), C // 4),
    "unshuffled": (lambda: nn.PixelUnshuffle(2), C * 4),
    "patches": (Patches, C),
    "normed": (lambda: nn.InstanceNorm2d(C, affine=True), C),
    "normed by what was seen": (lambda: nn.InstanceNorm2d(C, affine=True, track_running_stats=True), C),
}


def test_strides_that_the_code_says_are_not_followed() -> None:
    found = assert_equivalent(lambda: Image(Strided, C), tp=2, inputs={"x": X}, certificate="graph")
    assert "as_strided_" in found.plan.params["up.weight"].reason


@pytest.mark.parametrize("kind", KINDS)
def test_channels_are_cut(kind: str) -> None:
    found = assert_equivalent(lambda: Image(*KINDS[kind]), tp=3, inputs={"x": X}, steps=1, certificate="graph")
    assert {"up.weight", "down.weight"} <= found.sharded


def test_neighbouring_channels_are_not() -> None:
    found = assert_equivalent(lambda: Image(OverChannels, C // 2), tp=2, inputs={"x": X}, certificate="graph")
    assert "mixes the elements of the dim" in found.plan.params["up.weight"].reason


class Positions(nn.Module):
    """A convolution whose positions, the last dim, a Linear makes and another one sums."""

    def __init__(self, between: Callable[[], nn.Module], made: int) -> None:
        super().__init__()
        self.up, self.between, self.down = nn.Linear(8, C), between(), nn.Linear(made, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x).relu()).relu())  # type: ignore[no-any-return]


#: Convolutions that pass each position of the last dim alone, and ones that mix them or leave some out
ALONE: dict[str, Callable[[], nn.Module]] = {
    "all": lambda: nn.Conv2d(4, 4, 1),
    "groups": lambda: nn.Conv2d(4, 4, 1, groups=2, bias=False),
    "each channel": lambda: nn.Conv2d(4, 4, 1, groups=4, padding="same"),
    "mixed in the other dim": lambda: nn.Conv2d(4, 4, (3, 1), stride=(2, 1), padding=(1, 0)),
}
MIXED: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "a kernel": (lambda: nn.Conv2d(4, 4, (1, 3)), C - 2),
    "a stride": (lambda: nn.Conv2d(4, 4, 1, (1, 2)), C // 2),
    "padding": (lambda: nn.Conv2d(4, 4, 1, padding=1), C + 2),
}


@pytest.mark.parametrize(("kind", "tp"), in_turns(ALONE, (2, 3)))
def test_positions_that_a_kernel_of_one_passes_are_cut(kind: str, tp: int) -> None:
    found = assert_equivalent(lambda: Positions(ALONE[kind], C), tp=tp, inputs={"x": X}, steps=1, certificate="graph")
    assert {"up.weight", "up.bias", "down.weight"} == found.sharded


@pytest.mark.parametrize("kind", MIXED)
def test_positions_that_are_mixed_are_not(kind: str) -> None:
    assert not assert_equivalent(lambda: Positions(*MIXED[kind]), tp=2, inputs={"x": X}, certificate="graph").sharded
