"""Ints that a plan changes: told from others of their call, for the tensors and for any lengths of the call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.api import parallelize_as
from autotp.planner import demands, local_ints
from autotp.rewrite.operators.call_sites import SiteMode
from autotp.testing import assert_equivalent
from autotp.testing.ranks.run import run
from tests.support.ranks import mesh
from tests.support.slow import in_turns

WIDTH = 32


class Gate(nn.Module):
    """The most tokens are as many as the width."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        return self.down(h[:, :32, :32] * h[:, :32, 32:].sigmoid())  # type: ignore[no-any-return]


class Convolution(nn.Module):
    """Its groups are as many as its padding and dilation."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mix = nn.Conv1d(WIDTH, WIDTH, 3, padding=4, dilation=4, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.mix(self.up(x).transpose(1, 2)).relu().transpose(1, 2))  # type: ignore[no-any-return]


class Written(Convolution):
    """The same with numbers in the code."""

    def forward(self, x: Tensor) -> Tensor:
        h = F.conv1d(self.up(x).transpose(1, 2), self.mix.weight, self.mix.bias, 1, 4, 4, 4)
        return self.down(h.relu().transpose(1, 2))  # type: ignore[no-any-return]


class Padded(nn.Module):
    """Pads the length to a multiple of its heads."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.heads = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), 4

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).unflatten(-1, (self.heads, 8)).softmax(-1).flatten(2)
        return F.pad(self.down(h), [0, 0, 0, -x.shape[1] % self.heads])


class Compared(Padded):
    """Short sequences weigh twice."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).unflatten(-1, (self.heads, 8)).softmax(-1).flatten(2)
        return self.down(h) * (2 if x.shape[1] > self.heads else 1)  # type: ignore[no-any-return]


class Least(Padded):
    """The smaller one of length and width."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        return self.down(h) * min(h.shape[-1], x.shape[1])  # type: ignore[no-any-return]


def half(x: Tensor) -> Tensor:
    return x[..., :16]


class Branch(nn.Module):
    """Longer sequences bring a whole tensor to the line that gets a part else."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).relu()
        y = self.down(torch.cat([half(h), h[..., 16:]], -1))
        return y + half(x).sum(-1, keepdim=True) if x.shape[1] > 5 else y  # type: ignore[no-any-return]


#: model → tokens of the traced call, and of the one that is compared
CASES: dict[type[nn.Module], tuple[int, int]] = {
    Gate: (6, 40),
    Convolution: (2, 6),
    Written: (2, 6),
    Padded: (8, 6),
    Compared: (6, 3),
    Least: (6, 40),
    Branch: (3, 9),
}


def given(tokens: int) -> Tensor:
    return torch.randn(2, tokens, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(tokens))


def outcome(make: type[nn.Module], check: str = "numbers") -> str:
    """ "equal", how far another length is off, or the refusal; the same on both ranks."""
    traced, tokens = CASES[make]

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().double()

    wanted, plan = build()(given(tokens)).detach(), autotp.plan(build(), tp=2, example_inputs={"x": given(traced)}, check=check)

    def rank(_: object) -> str:
        model = parallelize_as(build(), mesh(), plan)
        try:
            got: Any = model(given(tokens)).detach()
        except autotp.AutoTPError as error:
            return str(error)
        far = float((got - wanted).abs().max()) if got.shape == wanted.shape else float("inf")
        return "equal" if far <= 1e-9 else f"off by {far:.2g}"

    first, second = run("local", rank, None, 2, 120.0)
    assert first == second
    return str(first)


@pytest.mark.parametrize(("make", "check"), in_turns([m for m in CASES if m is not Branch], ("numbers", "graph")))
def test_numbers_that_are_equal_by_chance(make: type[nn.Module], check: str) -> None:
    assert outcome(make, check) == "equal"


class Checked(nn.Module):
    """Compares a size with its heads; training fails after that, so that only other calls count."""

    def __init__(self, of: int) -> None:
        super().__init__()
        self.q, self.o, self.heads, self.of = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), 4, of

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if q.shape[self.of] % self.heads != 0:
            raise ValueError("the heads have no equal parts")
        if self.training:
            raise ValueError("only for inference")
        h = q.view(*q.shape[:2], self.heads, -1).transpose(1, 2)
        return self.o(F.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Normed(nn.Module):
    """A norm compares the size of its argument with its number of features, or with a number of the code."""

    def __init__(self, literal: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Conv1d(4, WIDTH, 3), nn.Conv1d(WIDTH, 4, 1)
        self.norm, self.literal = nn.InstanceNorm1d(WIDTH, affine=True), literal

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x)
        if self.literal and h.shape[1] != 32:
            raise ValueError("other features")
        return self.down(self.norm(h).relu())  # type: ignore[no-any-return]


def test_a_number_that_a_size_is_compared_with() -> None:
    x = torch.randn(2, 4, 9, dtype=torch.float64)
    found = assert_equivalent(lambda: Normed(False), tp=2, inputs={"x": x}, steps=1, certificate="graph")
    assert {"up.weight", "norm.weight", "down.weight"} <= found.sharded
    found = assert_equivalent(lambda: Normed(True), tp=2, inputs={"x": x}, certificate="graph")
    assert "the code fails on a shard (ValueError: other features" in found.plan.params["up.weight"].reason


def test_a_path_that_failed_compared_nothing() -> None:
    plans = {of: autotp.plan(Checked(of), tp=2, example_inputs={"x": torch.randn(2, 4, WIDTH)}) for of in (-1, 1)}
    assert plans[-1].params["q.weight"].layout.dim == 0
    assert "the code compares (size[1] % heads) with 0" in plans[1].params["q.weight"].reason


def test_a_tensor_that_no_traced_call_brought_there() -> None:
    assert "no traced call took this path" in outcome(Branch)


def test_without_the_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The controls."""
    monkeypatch.setattr(demands, "_all_asked_for", lambda *_: True)
    monkeypatch.setattr(SiteMode, "_expect", lambda *_: None)
    monkeypatch.setattr(local_ints._Search, "same_for_other_lengths", lambda *_: True)
    assert all("off by" in outcome(make, "graph") for make in CASES)


class OfTorch(nn.Module):
    """Views of batch × heads, which no attribute holds."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


class Shaped(nn.Module):
    """Its heads have to be local where a size is compared with them, and all where the width of one is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o, self.heads = *(nn.Linear(WIDTH, WIDTH) for _ in range(4)), 4

    def forward(self, x: Tensor) -> Tensor:
        b, n, width = x.shape
        size = width // self.heads
        q, k, v = (f(x).view(b, n, self.heads, size).transpose(1, 2).reshape(b * self.heads, n, size) for f in (self.q, self.k, self.v))
        scores = q @ k.transpose(1, 2)
        if list(scores.shape) != [b * self.heads, n, n]:
            raise ValueError("scores of another shape")
        y = scores.softmax(-1) @ v
        return self.o(y.view(b, self.heads, n, size).transpose(1, 2).reshape(b, n, width))  # type: ignore[no-any-return]


#: Batches and lengths of the calls after the traced one, which has 2 and 6.
OTHERS = [(2, 6), (3, 6), (1, 9), (5, 1)]


def others(make: type[nn.Module], tp: int) -> list[str]:
    """For each of `OTHERS` "equal", how far results and gradients are off, or the refusal; on the first rank."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return make().double()

    def called(model: nn.Module, shape: tuple[int, int]) -> list[Tensor]:
        x = torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        result = model(x)
        result.square().sum().backward()
        assert x.grad is not None
        return [result.detach(), x.grad]

    def rank(_: object) -> list[str]:
        model = autotp.parallelize(build(), mesh(), example_inputs={"x": given(6)}, check="graph")
        assert autotp.plan_of(model).local_share < 0.6
        found = []
        for shape in OTHERS:
            try:
                far = max(float((a - b).abs().max()) for a, b in zip(called(build(), shape), called(model, shape), strict=True))
                found.append("equal" if far <= 1e-9 else f"off by {far:.2g}")
            except autotp.AutoTPError as error:
                found.append(str(error))
        return found

    return list(run("local", rank, None, tp, 120.0)[0])


@pytest.mark.parametrize(("make", "tp"), in_turns([OfTorch, Shaped], (2, 3, 4)))
def test_numbers_that_have_lengths_in_them_follow_these(make: type[nn.Module], tp: int) -> None:
    assert others(make, tp) == ["equal"] * len(OTHERS)


def test_without_following_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control."""
    monkeypatch.setattr(local_ints, "_is_length", lambda *_: False)
    first, *more = others(OfTorch, 2)
    assert first == "equal" and "the plan was made for" in more[0]
    monkeypatch.undo()
    monkeypatch.setattr(local_ints, "_factors", lambda *_: None)
    reason = autotp.plan(Shaped(), tp=2, example_inputs={"x": given(6).float()}).params["q.weight"].reason
    assert "it depends on a length" in reason
