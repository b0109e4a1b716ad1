"""einops is cut like the reshapes that it makes, called as functions and as layers, whatever its caches hold."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.testing import assert_equivalent
from tests.support.slow import in_turns

einops = pytest.importorskip("einops", reason="einops is in the extra `dev`")
layers = pytest.importorskip("einops.layers.torch", reason="einops is in the extra `dev`")

D, HEADS = 24, 6
X = torch.randn(2, 5, D, dtype=torch.float64)
SPLIT, JOIN = "b n (k h d) -> k b h n d", "b h n d -> b n (h d)"


class Attention(nn.Module):
    """Attention with a fused projection; a class below splits it."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.sizes = HEADS, {"k": 3, "h": HEADS}
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D)
        self.hold()

    def hold(self) -> None:
        """Makes what splits and joins."""

    def split(self, x: Tensor) -> Any:
        return einops.rearrange(x, SPLIT, k=3, h=self.heads)

    def join(self, x: Tensor) -> Tensor:
        return einops.rearrange(x, JOIN)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(self.qkv(x))
        return self.out(self.join(F.scaled_dot_product_attention(q, k, v)))


class ByDict(Attention):
    def split(self, x: Tensor) -> Any:
        return einops.rearrange(x, SPLIT, **self.sizes)


class ByClosure(Attention):
    def hold(self) -> None:
        heads = HEADS
        self.by_heads = lambda x: einops.rearrange(x, SPLIT, k=3, h=heads)

    def split(self, x: Tensor) -> Any:
        return self.by_heads(x)


class ByPartial(Attention):
    def hold(self) -> None:
        self.by_heads = partial(einops.rearrange, pattern=SPLIT, k=3, h=HEADS)

    def split(self, x: Tensor) -> Any:
        return self.by_heads(x)


class IntoBatch(Attention):
    """Heads go into the batch, with einops' own einsum."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (einops.rearrange(t, "b n (h d) -> (b h) n d", h=self.heads) for t in self.qkv(x).chunk(3, -1))
        scores = einops.einsum(q, k, "b i d, b j d -> b i j").softmax(-1)
        return self.out(einops.rearrange(einops.einsum(scores, v, "b i j, b j d -> b i d"), "(b h) n d -> b n (h d)", h=self.heads))


class ByLayers(Attention):
    def hold(self) -> None:
        self.splits, self.joins = layers.Rearrange(SPLIT, k=3, h=HEADS), layers.Rearrange(JOIN)

    def split(self, x: Tensor) -> Any:
        return self.splits(x)

    def join(self, x: Tensor) -> Tensor:
        return self.joins(x)


class Grouped(nn.Module):
    """Keys and values are repeated for their queries."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.groups = HEADS, 2
        self.q, self.kv, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        q = einops.rearrange(self.q(x), "b n (h d) -> b h n d", h=self.heads)
        kv = einops.rearrange(self.kv(x), "b n (two h d) -> two b h n d", two=2, h=self.heads // self.groups)
        k, v = einops.repeat(kv, "two b h n d -> two b (h g) n d", g=self.groups)
        return self.out(einops.rearrange(F.scaled_dot_product_attention(q, k, v), JOIN))


class Reduced(nn.Module):
    """The sum of the heads, by a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.out = nn.Linear(D, HEADS * 4), nn.Linear(4, D)
        self.sum = layers.Reduce("b n (h d) -> b n d", "sum", h=HEADS)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.sum(torch.relu(self.up(x))))


class Mixed(nn.Module):
    """Attention of EinMix layers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"c": D, "h": HEADS, "d": D // HEADS}
        self.qkv = layers.EinMix("b n c -> k b h n d", weight_shape="k h d c", k=3, **sizes)
        self.out = layers.EinMix("b h n d -> b n c", weight_shape="h d c", bias_shape="c", **sizes)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x)
        return self.out(F.scaled_dot_product_attention(q, k, v))


MODELS = (Attention, ByDict, ByPartial, IntoBatch, ByLayers, Grouped, Reduced, Mixed)


@pytest.mark.parametrize(("model", "tp"), in_turns(MODELS, (2, 3, 4)))
def test_einops(model: type[nn.Module], tp: int) -> None:
    found = assert_equivalent(model, tp=tp, inputs=X, steps=1)
    assert set(found.plan.replicated) <= {"out.bias", "out.weight" if model is Reduced else "out.bias"}


def test_a_closure_is_not_followed() -> None:
    """No guard watches its variables: the attention stays whole, and equal."""
    assert "qkv.weight" in assert_equivalent(ByClosure, tp=2, inputs=X, steps=1).plan.replicated


@pytest.mark.parametrize("model", [Attention, ByLayers])
def test_what_ran_before_changes_no_plan(model: type[nn.Module]) -> None:
    """The caches of einops are keyed by patterns and sizes: a recipe that is found there shows nothing of the ints."""
    torch.manual_seed(0)
    made, x = model(), X.float()
    fresh = str(autotp.plan(made, tp=2, example_inputs={"x": x}))
    for tokens in range(1, 7):
        made(torch.randn(2, tokens, D))
    assert str(autotp.plan(made, tp=2, example_inputs={"x": x})) == fresh
    assert not autotp.plan(made, tp=3, example_inputs={"x": x}).replicated.keys() & {"qkv.weight", "out.weight"}
