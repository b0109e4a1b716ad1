"""Products between two whole activations are cut by their rows and gathered: what stays whole where that is not worth it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.testing import NotEquivalent, assert_equivalent, sabotage
from tests.support.slow import in_turns

W = 16
IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Region(nn.Module):
    """A region that begins and ends with the width, after a shift and a scale of its own where it has a condition."""

    def __init__(self, conditioned: bool = False) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(W), nn.Linear(W, 4 * W), nn.Linear(4 * W, W)
        self.modulation = nn.Linear(W, 3 * W) if conditioned else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        h = self.norm(x)
        if self.modulation is None or condition is None:
            return x + self.down(F.gelu(self.up(h)))
        shift, scale, gate = self.modulation(F.silu(condition))[:, None].chunk(3, -1)
        return x + gate * self.down(F.gelu(self.up(h * (1 + scale) + shift)))


class Patches(nn.Module):
    """A convolution makes tokens of an image."""

    def __init__(self, regions: int = 1) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, W, 4, 4)
        self.regions = nn.ModuleList(Region() for _ in range(regions))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        for region in self.regions:
            x = region(x)
        return x


class Stages(nn.Module):
    """Two widths, a convolution between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between = Region(), nn.Conv2d(W, W, 2, 2)
        self.second = Region()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).transpose(1, 2).unflatten(2, (2, 2))
        return self.second(self.between(x).flatten(2).transpose(1, 2))


class Conditioned(nn.Module):
    """A shift, a scale and a gate for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Region(conditioned=True) for _ in range(2))

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, condition)
        return x


class Unshardable(nn.Module):
    """Nothing is cut but what is around it: the middle of `a` and `b` is no width of a region."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.region = nn.Linear(W, 2 * W), nn.Linear(2 * W, W), Region()

    def forward(self, x: Tensor) -> Tensor:
        return self.region(self.b(self.a(x).cumsum(-1)))


class Read(nn.Module):
    """The weight is read by other code too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.region = nn.Linear(W, W), Region()

    def forward(self, x: Tensor) -> Tensor:
        return self.region(self.embed(x)) @ self.embed.weight.cumsum(0)


class OneProduct(nn.Module):
    """A residual block of one product, as in a U-Net."""

    def __init__(self, inside: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.product, self.beside = nn.Conv2d(inside, out, 3, stride, 1), nn.Conv2d(inside, out, 3, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.product(x)) + self.beside(x)


class Skips(nn.Module):
    """Widths that are added and concatenated; no region is between them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = OneProduct(3, W), OneProduct(W, 2 * W, 2)
        self.up, self.last = nn.ConvTranspose2d(2 * W, W, 2, 2), OneProduct(2 * W, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(torch.cat([x, self.up(self.down(x))], 1))


class Deep(nn.Module):
    """A product some modules inside of the layer that it is the first one of."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        act = nn.Sequential(nn.Conv2d(inside, out, 1), nn.Hardtanh())
        inner = nn.Sequential(nn.Sequential(act, nn.Hardtanh()), nn.Hardtanh())
        self.layer = nn.Sequential(inner, nn.Conv2d(out, out, 3, 1, 1, groups=out))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Layers(nn.Module):
    """Each layer's result is returned, too, and the next layer takes it in parts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Deep(i, o) for i, o in ((3, W), (W, 2 * W), (2 * W, 3 * W), (3 * W, W)))

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = []
        for layer in self.layers:
            x = layer(x)
            hidden.append(x)
        return {"last": x.mean((2, 3)), "hidden": tuple(hidden)}


X = torch.randn(2, 4, W, dtype=torch.float64)
CASES = {
    "patches": (Patches, {"x": IMAGE}, "embed.weight"),
    "stages": (Stages, {"x": X}, "between.weight"),
    "a condition": (Conditioned, {"x": X, "condition": torch.randn(2, W, dtype=torch.float64)}, "blocks.1.modulation.weight"),
    "the end of what is whole": (Unshardable, {"x": X}, "b.weight"),
    "sums without a region": (Skips, {"x": IMAGE}, "down.beside.weight"),
}


@pytest.mark.parametrize(("name", "tp"), in_turns(CASES, (2, 3)))
def test_is_cut_alone(name: str, tp: int) -> None:
    factory, inputs, weight = CASES[name]
    found = assert_equivalent(factory, tp=tp, inputs=inputs, steps=1, certificate="graph")
    assert weight in found.sharded
    layout = found.plan.params[weight].layout
    assert layout.dim == 0 and layout.local_shape[0] == -(-layout.shape[0] // tp)


@pytest.mark.parametrize("tp", [2, 3])
def test_hidden_states_of_layers_are_gathered_where_the_model_returns(tp: int) -> None:
    found = assert_equivalent(Layers, tp=tp, inputs={"x": IMAGE}, steps=1, certificate="graph")
    assert {"layers.0.layer.1.weight", "layers.2.layer.1.weight"} <= found.sharded  # between two products
    assert any(slot.conversions for m in found.plan.modules if not m.path for slot in m.outputs)
    mistakes = [m for m in sabotage.mutations(found.plan) if "<root>" in str(m)]
    assert mistakes
    with pytest.raises(NotEquivalent):
        assert_equivalent(Layers, tp=tp, inputs={"x": IMAGE}, sabotage=mistakes[0])


def test_stays_whole() -> None:
    plan = autotp.plan(Unshardable().double(), tp=2, example_inputs={"x": X})
    assert plan.params["a.weight"].layout.dim is None  # its rows are not what a region begins with
    plan = autotp.plan(Read().double(), tp=2, example_inputs={"x": X})
    assert plan.params["embed.weight"].layout.dim is None
    assert plan.params["region.up.weight"].layout.dim == 0


def test_small_ones_are_not_worth_a_gather() -> None:
    plans = {regions: autotp.plan(Patches(regions).double(), tp=2, example_inputs={"x": IMAGE}) for regions in (1, 24)}
    assert {regions: plan.params["embed.weight"].layout.dim for regions, plan in plans.items()} == {1: 0, 24: None}


def test_without_the_gather_it_is_another_model() -> None:
    """The check sees a rank's rows where all are expected."""
    factory, inputs, _ = CASES["a condition"]
    plan = autotp.plan(factory().double(), tp=2, example_inputs=inputs)
    mistakes = [m for m in sabotage.mutations(plan) if "modulation" in str(m)]
    assert mistakes
    for mistake in mistakes[:3]:
        with pytest.raises(NotEquivalent):
            assert_equivalent(factory, tp=2, inputs=inputs, sabotage=mistake)


class Stem(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.up, self.down = nn.Conv2d(3, 48, 4, 4), nn.Conv2d(48, 96, 1), nn.Conv2d(96, 48, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x)
        return y + self.down(torch.relu(self.up(y)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("side", [16, 32])
def test_tokens_of_an_image_are_its_positions(side: int) -> None:
    """What a convolution sends for each of them are its channels, whatever the size of the image."""
    plan = autotp.plan(Stem(), tp=2, example_inputs={"x": torch.randn(2, 3, side, side)}, check="graph")
    wanted = {("down", "forward"): 48, ("patch", "backward"): 3, ("patch", "forward"): 48, ("up", "backward"): 48}
    assert {(t.module, t.when.value): t.width for t in plan.traffic} == wanted
