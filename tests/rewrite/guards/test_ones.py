"""A dim of an argument that was 1 when traced, and meets a dim that is cut, may not be longer later; all others may."""

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
from autotp.planner import realise
from autotp.rewrite import entry
from autotp.testing.ranks.run import run
from tests.support.ranks import mesh

HEADS, WIDTH = 2, 8
MASK = (2, HEADS, 5, 5)


#: What the model makes of its gate [batch, length, 1 or 16] before it meets the hidden states.
WAYS: dict[str, Callable[[Tensor], Tensor]] = {
    "reshaped": lambda g: g.unsqueeze(-1).squeeze(-1).reshape(g.shape),
    "moved": lambda g: g.transpose(1, 2).permute(2, 1, 0).permute(2, 0, 1),
    "the first of several": lambda g: torch.stack([g, 2 * g])[0],
    "a mean": lambda g: torch.stack([g, 2 * g], -1).mean(-1),
    "the first token's": lambda g: g[:, 0][:, None],
    "of whole numbers": lambda g: g.ceil().long(),
    "named": lambda g: torch.einsum("bnf->fbn", g).movedim(0, -1),
    "rows by ids": lambda g: g[torch.arange(len(g))],
}


class Attention(nn.Module):
    """Attention with a mask, and an MLP with a gate."""

    def __init__(self, way: str = "reshaped") -> None:
        super().__init__()
        self.way = way
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, gate: dict[str, Tensor]) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mask = mask.to(x.dtype) if mask.dim() == 4 else mask[:, None]
        scores = q @ k.transpose(-2, -1) + mask
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(x)) * WAYS[self.way](gate["all"]))  # type: ignore[no-any-return]


def call(batch: int = 2, length: int = 5, mask: tuple[int, ...] | None = None, gate: tuple[int, ...] | None = None) -> dict[str, Any]:
    """One call, with the shapes of the mask and the gate; those of the traced calls if they are left out."""
    generator = torch.Generator().manual_seed(batch + length)
    shapes = ((batch, length, WIDTH), mask or (batch, 1, length, length), gate or (batch, length, 1))
    x, *others = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return {"x": x, "mask": others[0], "gate": {"all": others[1]}}


def outcome(traced: list[dict[str, Any]], later: dict[str, Any], way: str = "reshaped") -> str | float:
    """How far a later call is from one device, or what it is refused with."""

    def work(_: Any) -> str | float:
        torch.manual_seed(0)
        one = Attention(way).double().eval()
        torch.manual_seed(0)
        model = Attention(way).double().eval()
        plan = autotp.plan(model, tp=2, example_inputs=traced, check="graph")
        assert len(traced) > 1 or plan.params["qkv.weight"].layout.dim == 0
        parallelize_as(model, mesh(), plan)
        with torch.no_grad():
            try:
                return float((model(**later) - one(**later)).abs().max())
            except AutoTPError as error:
                return str(error)
            except RuntimeError as error:
                return f"torch: {error}"

    found: str | float = run("local", work, None, 2, 60)[0]
    return found


@pytest.mark.parametrize("later", [call(mask=MASK), call(mask=(1, HEADS, 1, 5)), call(gate=(2, 5, 16))])
def test_what_would_be_longer_is_refused(later: dict[str, Any]) -> None:
    found = outcome([call()], later)
    assert isinstance(found, str) and found.startswith("the model is called with ") and "Pass example_inputs" in found


@pytest.mark.parametrize("way", WAYS)
def test_a_gate_is_followed_on_its_way(way: str) -> None:
    found = outcome([call(1, 1)], call(gate=(2, 5, 16)), way)
    assert isinstance(found, str) and "is called with gate.all of shape (2, 5, 16)" in found
    right = outcome([call(1, 1)], call(3, 7), way)
    assert isinstance(right, float) and right < 1e-9, right


@pytest.mark.parametrize("later", [call(3, 7), call(1, 1), call(mask=(1, 1, 1, 5)), call(2, 5, mask=(2, 5, 5)), call(gate=(1, 1, 1))])
def test_what_fits_is_right(later: dict[str, Any]) -> None:
    found = outcome([call(1, 5), call(2, 5, mask=(2, 5, 5))], later)
    assert isinstance(found, float) and found < 1e-9, found


def test_what_was_traced_both_ways_is_right() -> None:
    for later in (call(3, 5, mask=(3, HEADS, 5, 5)), call(), call(mask=(1, HEADS, 5, 5))):
        found = outcome([call(), call(mask=MASK)], later)
        assert isinstance(found, float) and found < 1e-9, found


def test_without_the_guard_they_fail_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    guard: Callable[..., None] = lambda *_: None  # noqa: E731
    monkeypatch.setattr(entry, "install_ones", guard)
    monkeypatch.setattr(realise, "with_checks", lambda space, labels, sites: sites)  # what is counted is checked at the call
    for later in (call(mask=MASK), call(gate=(2, 5, 16))):
        assert str(outcome([call()], later)).startswith("torch: ")  # a part of one head is stretched over two
