"""A dim of 1 that the code counts stands for a rank's part of a dim that is cut: a call with more of them is refused, never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autotp
from autotp.api import parallelize_as
from autotp.errors import AutoTPError
from autotp.testing.ranks.run import run
from tests.support.ranks import mesh
from tests.support.slow import in_turns

TOKENS, WIDTH, HEAD = 6, 16, 8


def data(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def several(count: int, *shape: int) -> list[Tensor]:
    return [data(*shape, seed=i) for i in range(count)]


Bias = Callable[["Attention", Any], Tensor]
#: name → (the bias of the scores by an argument, the argument for one head, the argument for a number of heads)
COUNTED: dict[str, tuple[Bias, Any, Callable[[int], Any]]] = {
    "a list joined": (lambda m, c: torch.cat(c, 1), several(1, 1, 1, 6, 6), lambda h: several(h, 1, 1, 6, 6)),
    "a list stacked": (lambda m, c: torch.stack(c, 1), several(1, 1, 6, 6), lambda h: several(h, 1, 6, 6)),
    "all but the first": (lambda m, c: c[:, 1:], data(1, 2, 6, 6), lambda h: data(1, 1 + h, 6, 6)),
    "each second": (lambda m, c: c[:, ::2], data(1, 2, 6, 6), lambda h: data(1, 2 * h, 6, 6)),
    "the second half": (lambda m, c: c[:, c.shape[1] // 2 :], data(1, 2, 6, 6), lambda h: data(1, 2 * h, 6, 6)),
    "a chunk": (lambda m, c: c.chunk(2, 1)[1], data(1, 2, 6, 6), lambda h: data(1, 2 * h, 6, 6)),
    "what a split leaves": (lambda m, c: c.split(4, 1)[-1], data(1, 5, 6, 6), lambda h: data(1, 4 + h, 6, 6)),
    "places of a window": (
        lambda m, c: F.conv2d(c, torch.full((6, 6, 2, 1), 0.1, dtype=torch.float64)).transpose(1, 2),
        data(1, 6, 2, 6),
        lambda h: data(1, 6, 1 + h, 6),
    ),
    "gated": (lambda m, c: F.glu(c, 1), data(1, 2, 6, 6), lambda h: data(1, 2 * h, 6, 6)),
    "as long as an argument": (
        lambda m, c: torch.linspace(1, 2, c.shape[1], dtype=torch.float64).view(1, -1, 1, 1) * torch.arange(6),
        data(1, 1, 1, 1),
        lambda h: data(1, h, 1, 1),
    ),
    "as long as a list": (
        lambda m, c: torch.linspace(1, 2, len(c), dtype=torch.float64).view(1, -1, 1, 1) * torch.arange(6),
        several(1, 1),
        lambda h: several(h, 1),
    ),
    "flat": (lambda m, c: c.view(1, -1, 6, 6), data(1, 1, 36), lambda h: data(1, 1, h * 36)),
    "a batch that is flattened": (lambda m, c: c.flatten(0, 1)[None], data(1, 1, 6, 6), lambda h: data(h, 1, 6, 6)),
    "one of each": (lambda m, c: F.one_hot(c, 6).double(), torch.arange(6).view(1, 1, 6), lambda h: torch.arange(6).repeat(1, h, 1)),
    "diagonals": (lambda m, c: torch.diag_embed(c), data(1, 1, 6), lambda h: data(1, h, 6)),
}
#: name → (a bias that is the same for all heads in any call, its argument)
SURE: dict[str, tuple[Bias, Any]] = {
    "a new dim": (lambda m, c: c[:, None], data(2, 6, 6)),
    "a new dim in a view": (lambda m, c: c.view(c.shape[0], 1, *c.shape[1:]), data(2, 6, 6)),
    "a mean that is kept": (lambda m, c: c.mean(1, keepdim=True), data(2, 3, 6, 6)),
    "one row": (lambda m, c: c[:, -1:] + c[:, 1:2], data(2, 3, 6, 6)),
    "a mask of positions": (
        lambda m, c: torch.zeros(1, 1, 6, 6, dtype=c.dtype).masked_fill((torch.arange(6) > torch.arange(6)[:, None])[None, None], -9.0),
        data(1),
    ),
    "a mask that is spread": (lambda m, c: c[:, None, None, :].expand(-1, 1, 6, -1).gt(0).double(), data(2, 6)),
    "a parameter": (lambda m, c: m.bias * c.mean(), data(1)),
}


class Attention(nn.Module):
    """Attention with a bias of its scores."""

    def __init__(self, heads: int, bias: Bias) -> None:
        super().__init__()
        self.make, self.bias = bias, nn.Parameter(torch.randn(1, 1, TOKENS, TOKENS))
        self.q, self.k, self.v = (nn.Parameter(torch.randn(WIDTH, heads, HEAD) * 0.2) for _ in range(3))
        self.o = nn.Parameter(torch.randn(heads, HEAD, WIDTH) * 0.2)

    def forward(self, x: Tensor, c: Any) -> Tensor:
        q, k, v = (torch.einsum("bte,ehd->bhtd", x, w) for w in (self.q, self.k, self.v))
        scores = q @ k.transpose(-1, -2) / 3 + self.make(self, c)
        return torch.einsum("bhts,bhsd,hde->bte", scores.softmax(-1), v, self.o)


def results(heads: int, bias: Bias, traced: Any, later: Any, check: str) -> tuple[float, str, int]:
    """The largest error of results and gradients of the traced call, what the later call raises, and the number of checks in the plan."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Attention(heads, bias).double()

    def work(_: Any) -> tuple[float, str, int]:
        one, model, x = build(), build(), data(2, TOKENS, WIDTH)
        plan = autotp.plan(model, tp=2, example_inputs={"x": x, "c": traced}, check=check)
        assert plan.params["q"].layout.dim == 1
        parallelize_as(model, mesh(), plan)
        most, said = 0.0, ""
        for c in (traced, later):
            for training in (False, True):
                one.zero_grad(), model.zero_grad()
                one.train(training)(x, c).sin().sum().backward()
                try:
                    got = model.train(training)(x, c)
                except AutoTPError as error:
                    said = str(error)
                    continue
                got.sin().sum().backward()
                grads = autotp.full_grads(model)
                pairs = [(grads[n], p.grad) for n, p in one.named_parameters() if p.grad is not None]
                with torch.no_grad():
                    for a, b in ((got, one(x, c)), *pairs):
                        most = max(most, float((a - b).abs().max() / (b.abs().max() + 1e-6)))
        return most, said, sum(bool(s.ones) for m in plan.modules for s in m.sites)

    found: tuple[float, str, int] = run("local", work, None, 2, 60)[0]
    return found


@pytest.mark.parametrize(("name", "heads"), in_turns(COUNTED, (2, 4)))
def test_a_call_with_more_is_refused(name: str, heads: int) -> None:
    bias, traced, later = COUNTED[name]
    most, said, _ = results(heads, bias, traced, later(heads), "numbers" if heads == 2 else "graph")
    wanted = "c as a list or tuple of" if name.startswith("a list ") else "had size 1"
    assert most < 1e-9 and wanted in said, (most, said)


@pytest.mark.parametrize("name", SURE)
def test_what_stays_one_costs_no_check(name: str) -> None:
    bias, c = SURE[name]
    most, said, checks = results(4, bias, c, c, "graph")
    assert most < 1e-9 and not said and not checks, (most, said, checks)
