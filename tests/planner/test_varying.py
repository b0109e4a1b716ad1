"""How much of a parameter is used may depend on a length: a rank's part for the traced one is none for others, so it is not cut."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autotp
from autotp.api import parallelize_as
from autotp.planner import placements
from autotp.testing.ranks.run import run
from tests.support.ranks import mesh
from tests.support.slow import in_turns, swept

ROWS, WIDTH, HEADS, VOCABULARY = 16, 16, 4, 50
#: name → what is added to the hidden states [batch, length, WIDTH]; `table` [ROWS, WIDTH] is a parameter, `up` a Linear of 3 · WIDTH rows.
TAKES: dict[str, Callable[[Tensor, Tensor, nn.Module], Tensor]] = {
    "first rows": lambda x, table, up: table[: x.shape[1]],
    "first rows in a batch of one": lambda x, table, up: table[None, : x.size(1)],
    "rows from the second": lambda x, table, up: table[1 : x.shape[1] + 1],
    "last rows": lambda x, table, up: table[-x.shape[1] :],
    "narrow": lambda x, table, up: table.narrow(0, 0, x.shape[1]),
    "split": lambda x, table, up: table.split([x.shape[1], ROWS - x.shape[1]])[0],
    "the mean of what is left": lambda x, table, up: table[x.shape[1] - 1 :].mean(0),
    "a length that is no number of the trace any more": lambda x, table, up: table[: len(x[0])],
    "a length made plain": lambda x, table, up: table[: int(str(x.shape[1]))],
    "elements": lambda x, table, up: table[: x.numel() // (x.shape[0] * x.shape[2])],
    "as many as data say": lambda x, table, up: table[: (x[..., 0] > 0).sum() % 8 + 1].mean(0),
    "an item of data": lambda x, table, up: table[: (x[..., 0] > 0).sum().item() % 8 + 1].mean(0),
    "as many as are chosen": lambda x, table, up: table[: len((x[0, :3, 0] > 0).nonzero())].sum(0),
    "columns that data count": lambda x, table, up: up(x).relu()[..., : (x[..., 0] > 0).sum() % 8 + 1].mean(-1, keepdim=True),
    "first rows, and tokens shifted by one": lambda x, table, up: table[: x.shape[1]] + torch.cat([x[:, 1:], x[:, :1]], 1),
    "first rows, and those from the second": lambda x, table, up: table[: x.shape[1]] + table[1 : x.shape[1] + 1],
    "a chunk of as many as the batch has": lambda x, table, up: table.chunk(x.shape[0])[0].mean(0),
    "each row after a batch": lambda x, table, up: table[:: x.shape[0]].mean(0),
    "the row of the last token": lambda x, table, up: table[torch.arange(x.shape[1])[-1:]],
    "rows by a list": lambda x, table, up: table[list(range(x.shape[1]))],
    "rows by numbers": lambda x, table, up: table[torch.arange(x.shape[1])],
    "columns of a product": lambda x, table, up: up(x).relu()[..., : x.shape[1]] @ x,
    "columns of a product of another number": lambda x, table, up: up(x).relu()[..., : len(x[0])] @ x,
    "both sides of a cut": lambda x, table, up: torch.cat([up(x)[..., : x.shape[1]].relu(), up(x)[..., x.shape[1] :].tanh()], -1).sum(
        -1, keepdim=True
    ),
}


class Decoder(nn.Module):
    """An embedding, something that depends on the length, attention and an MLP, and a head."""

    def __init__(self, takes: Callable[[Tensor, Tensor, nn.Module], Tensor]) -> None:
        super().__init__()
        self.takes = takes
        self.tokens, self.table = nn.Embedding(VOCABULARY, WIDTH), nn.Parameter(torch.randn(ROWS, WIDTH))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + self.takes(x, self.table, self.up)
        b, n, d = x.shape
        q, k, v = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d))
        return self.head(self.norm(x + self.down(F.gelu(self.up(x)))))  # type: ignore[no-any-return]


def error(name: str, length: int, check: str) -> tuple[float, int | None]:
    """The largest error of results and gradients of calls of other lengths than the traced one, and the dim of the heads that is cut."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Decoder(TAKES[name]).double()

    def ids(batch: int, n: int) -> Tensor:
        return torch.arange(batch * n).view(batch, n) * 7 % VOCABULARY

    def work(_: Any) -> tuple[float, int | None]:
        one, model = build(), build()
        plan = autotp.plan(model, tp=2, example_inputs={"ids": ids(2, length)}, check=check)
        parallelize_as(model, mesh(), plan)
        most = 0.0
        for shape in ((2, length), (3, 9), (1, 3), *([] if length == 5 else [(2, ROWS - 1)])):
            for each in (one, model):
                each.zero_grad()
                each(ids(*shape)).square().mean().backward()
            found = autotp.full_grads(model)
            gradients = [(found[n], p.grad) for n, p in one.named_parameters() if p.grad is not None]
            with torch.no_grad():
                for got, wanted in ((model(ids(*shape)), one(ids(*shape))), *gradients):
                    most = max(most, float((got - wanted).abs().max() / (wanted.abs().max() + 1e-6)))
        return most, plan.params["qkv.weight"].layout.dim

    found: tuple[float, int | None] = run("local", work, None, 2, 60)[0]
    return found


@pytest.mark.parametrize(("name", "length"), in_turns(TAKES, (5, ROWS - 1, 1)))
def test_other_lengths_are_equal(name: str, length: int) -> None:
    most, heads = error(name, length, "numbers" if length == 5 else "graph")
    assert most < 1e-9 and heads == 0, most


@pytest.mark.parametrize("name", swept([name for name in TAKES if "row" in name and "second" not in name], "first rows"))
def test_shorter_ones_than_all_rows_are_equal(name: str) -> None:
    most, heads = error(name, ROWS, "graph")
    assert most < 1e-9 and heads == 0, most


def test_without_the_rule_they_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placements, "varying", lambda *of: {})
    for name in ("first rows", "narrow", "a length made plain", "rows from the second", "a chunk of as many as the batch has"):
        assert error(name, 5, "graph")[0] > 1e-3, name
