"""Code that changes tensors in place: what a parallel module returns, what it is given, and what outlives the call."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.ranks import Pool
from tests.support.side_by_side import equal

X = torch.randn(2, 6, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
IDS = torch.arange(12).view(2, 6)


def set_first(h: Tensor) -> None:
    h[:, 0] = 0


def set_width(h: Tensor) -> None:
    h[..., 0] = 0


#: Changes of a tensor of three dims; they return nothing.
CHANGES: dict[str, Callable[[Tensor], object]] = {
    "relu": lambda h: F.relu(h, inplace=True),
    "mul_": lambda h: h.mul_(2),
    "set_first": set_first,
    "set_width": set_width,
    "clamp_ of a view": lambda h: h.view(-1, h.shape[-1]).clamp_(-1, 1),
    "mul_ of some": lambda h: h[:, :3].mul_(2),
    "masked_fill_": lambda h: h.masked_fill_(h > 0, 0.1),
    "copy_": lambda h: h[:, 0].copy_(h[:, 1].detach()),
    "add_ transposed": lambda h: h.transpose(0, 1).add_(1),
    "index_add_": lambda h: h.index_add_(1, torch.tensor([0]), h.new_ones(2, 1, h.shape[-1])),
    "add_ of a narrow part": lambda h: h.narrow(1, 0, 2).add_(h.narrow(1, 2, 2).detach()),
    "dropout": lambda h: F.dropout(h, 0.0, True, inplace=True),
}


class Changed(nn.Module):
    """`change` what a column-parallel Linear, a row-parallel one and an embedding return, and logits."""

    def __init__(self, change: Callable[[Tensor], object], bias: bool, width: int = 24) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(64, 16), nn.Linear(16, 64, bias)
        self.a, self.b = nn.Linear(16, width, bias), nn.Linear(width, 16, bias)
        self.change = change

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        self.change(x)
        h = self.a(x)
        self.change(h)
        y = self.b(h)
        self.change(y)
        logits = self.head(y)
        self.change(logits)
        return logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_results_are_changed(name: str, bias: bool) -> None:
    tp = 2 if bias else 3
    assert equal(lambda: Changed(CHANGES[name], bias), {"ids": IDS}, tp, train=True)


def rectified(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(16, width), nn.ReLU(inplace=True), nn.Linear(width, 16))


@pytest.mark.parametrize("tp", [2, 3])
def test_the_commonest_idiom_in_processes(pool: Pool, tp: int) -> None:
    assert equal(functools.partial(rectified, 12 * tp), {"input": X}, tp, train=True, pool=pool)


class Attention(nn.Module):
    """Scores are changed before the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.width = 4

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (m(x).view(*x.shape[:2], -1, self.width).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2)
        scores.div_(2.0)
        scores += torch.ones(6, 6, dtype=x.dtype).triu(1) * -9
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Partial(nn.Module):
    """Partial sums in the middle of a forward are changed, by themselves and through another name."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 16)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.function(F.linear(self.a(x), self.b.weight), x))  # type: ignore[no-any-return]


def doubled(p: Tensor, x: Tensor) -> Tensor:
    p.mul_(2)
    return p


def rectified_partial(p: Tensor, x: Tensor) -> Tensor:
    p.relu_()
    return p


def accumulated(p: Tensor, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    total.add_(p)
    return total


def written_into(p: Tensor, x: Tensor) -> Tensor:
    x = x * 1.0
    x[:, 0] = p[:, 0]
    return x


def under_two_names(p: Tensor, x: Tensor) -> Tensor:
    other = p.view(2, 6, 4, 4)
    p.mul_(2)
    return other.flatten(2).relu()


@pytest.mark.parametrize("function", [doubled, rectified_partial, accumulated, written_into, under_two_names])
def test_partial_sums_are_changed(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    equal(lambda: Partial(function), {"x": X}, train=True)


def test_scores_are_changed() -> None:
    assert equal(Attention, {"x": X}, train=True)


class Taker(nn.Module):
    """Changes its argument, which enters a sharded region afterwards."""

    def __init__(self, change: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)
        self.change = change

    def forward(self, x: Tensor) -> Tensor:
        self.change(x)
        return self.b(self.a(x).relu())  # type: ignore[no-any-return]


class Giver(nn.Module):
    """Uses what it gave away, or does not."""

    def __init__(self, change: Callable[[Tensor], object], again: bool) -> None:
        super().__init__()
        self.n, self.taker, self.c = nn.Linear(16, 16), Taker(change), nn.Linear(16, 16)
        self.again = again

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        y = self.taker(h)
        return y + self.c(h) if self.again else y  # type: ignore[no-any-return]


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("name", ["mul_", "set_width", "clamp_ of a view"])
def test_an_argument_is_changed(name: str, again: bool) -> None:
    assert equal(lambda: Giver(CHANGES[name], again), {"x": X}, train=True)


def test_the_caller_sees_its_argument_changed() -> None:
    assert equal(lambda: Taker(CHANGES["mul_"]), {"x": X})  # `equal` compares the arguments afterwards


class OwnPart(nn.Module):
    """Writes activations that would be sharded into its argument."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        h = self.a(x)
        kept.copy_(h.detach())
        return self.b(h.relu())  # type: ignore[no-any-return]


def test_an_argument_is_not_given_a_part() -> None:
    assert not equal(OwnPart, {"x": X, "kept": torch.zeros(2, 6, 24, dtype=torch.float64)})
