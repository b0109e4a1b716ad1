"""Numbers that are batch × heads reach views of code; they become batch × local heads, whatever the batch is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.planner import local_ints
from autotp.testing.outcome import equal_or_refused
from tests.support.slow import swept

D, HEADS = 24, 6
X = torch.randn(3, 5, D, dtype=torch.float64)


class Folded(nn.Module):
    """Attention of which batch and heads are one dim; the number of heads is written in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, n, 6, 4).transpose(1, 2).reshape(b * 6, n, 4)

    def join(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, 6, n, 4).transpose(1, 2).reshape(b, n, D)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (self.split(f(x), b, n) for f in (self.q, self.k, self.v))
        return self.o(self.join(F.softmax(q @ k.transpose(-1, -2) / 2, -1) @ v, b, n))


class Flat(Folded):
    """All tokens and heads are one dim on the way."""

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return super().split(x.view(b * n * 6, 4).view(b, n, D), b, n)


class ByLength(Folded):
    """Steps come first, as torch's attention has them."""

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.transpose(0, 1).reshape(n, b * 6, 4).transpose(0, 1)

    def join(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.transpose(0, 1).reshape(n, b, D).transpose(0, 1)


class Torch(nn.Module):
    """Torch's own attention, of one tensor or of two."""

    def __init__(self, two: bool = False) -> None:
        super().__init__()
        self.two, self.attention = two, nn.MultiheadAttention(D, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = 2 * x.flip(1) if self.two else x
        return self.attention(x, y, y, need_weights=self.two)[0]


def two() -> nn.Module:
    return Torch(two=True)


@pytest.mark.parametrize(
    ("model", "tp"), swept([(Folded, 2), (Folded, 4), (Flat, 2), (ByLength, 3), (Torch, 2), (two, 3)], (Folded, 4), (ByLength, 3), (two, 3))
)
def test_another_batch(model: type[nn.Module], tp: int) -> None:
    more = {"of one row": {"x": X[:1]}, "of other steps": {"x": X[:2, :3]}}
    for x in (X, X[:1]):  # a batch of one has no axis that is folded with the heads
        found = equal_or_refused(model, inputs={"x": x}, tp=tp, more=more, steps=1)
        assert found.equal is not None, found.refused
        assert len([p for p in found.equal.aspects["outputs"].paths if p.startswith("output of") or p.endswith("row more")]) == 3
        assert found.equal.local_share < 0.7


class WithRest(Folded):
    """A view of which one size is what is left: it would take a whole tensor too."""

    def join(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, 6, -1, 4).transpose(1, 2).reshape(b, n, D)


def test_a_number_that_nothing_tells_keeps_its_region_whole() -> None:
    found = equal_or_refused(WithRest, inputs={"x": X}, tp=2)
    assert found.equal is not None and "no tensor of the call tells when" in found.equal.plan.replicated["q.weight"]


def test_another_batch_is_what_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a number that is planned for one batch is refused for others."""
    monkeypatch.setattr(local_ints, "_is_length", lambda *_: False)
    assert "the plan was made for" in equal_or_refused(Torch, inputs={"x": X}, tp=2).refused


def test_it_is_explained() -> None:
    plan = autotp.plan(Torch(), tp=2, example_inputs={"x": X.float()})
    assert "int 6 × n → 3 × n" in plan.explain("attention")
