"""A view may treat the traced length alone as a rank's part would be treated: what it mixes with other lengths is not cut."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import autotp
from autotp.api import parallelize_as
from autotp.planner import placements
from autotp.testing.outcome import equal_or_refused
from autotp.testing.ranks.run import run
from tests.support.ranks import mesh
from tests.support.slow import in_turns

WIDTH, INNER, HEADS = 16, 64, 4


class Layer(nn.Module):
    """`how` makes of hidden states [batch, length, WIDTH] a tensor of their shape."""

    def __init__(self, how: Callable[[Layer, Tensor], Tensor]) -> None:
        super().__init__()
        self.how = how
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down, self.conv = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH), nn.Conv1d(INNER, WIDTH, 1)
        self.strided, self.spread = nn.Conv1d(WIDTH, INNER, 2, 2), nn.ConvTranspose1d(WIDTH, INNER, 2, 2)
        self.norm, self.high = nn.LayerNorm(WIDTH), nn.Parameter(torch.randn(2, INNER))
        self.heads, self.positions = HEADS, nn.Parameter(torch.randn(2, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return self.how(self, x)


def _turned(pairs: Tensor) -> Tensor:
    return torch.cat([-pairs[..., 1:], pairs[..., :1]], -1) * pairs.sigmoid()


def _attend(layer: Layer, x: Tensor, heads: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Tensor:
    return layer.o(back(F.scaled_dot_product_attention(*(heads(each(x)) for each in (layer.q, layer.k, layer.v)))))  # type: ignore[no-any-return]


def _mixed(layer: Layer, y: Tensor) -> Tensor:
    """Takes channels for places of [batch, INNER, places]."""
    return layer.down(y.relu().reshape(y.shape[0], -1, INNER))  # type: ignore[no-any-return]


def _shuffled(y: Tensor) -> Tensor:
    """Takes the places of [batch, channels, places] for groups of channels."""
    return y.reshape(y.shape[0], -1, 2, y.shape[2]).transpose(1, 2).reshape(y.shape[0], y.shape[2], -1)


#: Batches and lengths of the calls of a layer.
ANY, EVEN = ((2, 4), (1, 3), (3, 1), (1, 1), (4, 2)), ((2, 8), (1, 4), (3, 6), (1, 2), (4, 2))
#: name → (what views do otherwise for other lengths, batch and length while tracing)
MIXES: dict[str, tuple[Callable[[Layer, Tensor], Tensor], tuple[int, int]]] = {
    "heads before tokens": (
        lambda m, x: _attend(m, x, lambda y: y.view(len(x), HEADS, x.shape[1], -1), lambda y: y.reshape(x.shape)),
        (2, 1),
    ),
    "heads before as many tokens as are left": (
        lambda m, x: _attend(m, x, lambda y: y.view(x.shape[0], m.heads, -1, WIDTH // m.heads), lambda y: y.reshape(x.shape)),
        (2, 1),
    ),
    "channels before one token": (lambda m, x: m.conv(m.up(x).relu().reshape(x.shape[0], INNER, x.shape[1])).reshape(x.shape), (2, 1)),
    "channels before one token, by steps": (
        lambda m, x: m.conv(m.up(x).relu().flatten(1).unflatten(1, (INNER, x.shape[1]))).reshape(x.shape),
        (2, 1),
    ),
    "channels before two tokens": (lambda m, x: m.down(m.up(x).relu().reshape(x.shape[0], INNER, -1).transpose(1, 2)), (2, 2)),
    "a batch of one moved": (lambda m, x: m.down(m.up(x).relu().permute(1, 2, 0).reshape(*x.shape[:2], INNER)), (1, 4)),
    "a batch and a length of one": (lambda m, x: m.down((m.up(x) * 2 + 1).relu().permute(1, 2, 0).reshape(*x.shape[:2], INNER)), (1, 1)),
    "one token without its dim": (lambda m, x: m.down(m.up(x).relu().flatten(0, 1).view(x.shape[0], INNER, -1).transpose(1, 2)), (2, 1)),
}
#: name → (what makes of [batch, length, WIDTH] a tensor [batch, INNER, the length or a part of it], batch and length while tracing)
LENGTHS: dict[str, tuple[Callable[[Layer, Tensor], Tensor], tuple[int, int]]] = {
    "a convolution": (lambda m, x: m.strided(x.mT), (2, 2)),
    "a convolution of more": (lambda m, x: m.strided(x.mT), (2, 4)),
    "a convolution of halves": (lambda m, x: m.strided(F.pad(x, (0, 0, 0, x.shape[1])).reshape(-1, x.shape[1], WIDTH).mT), (1, 2)),
    "a convolution behind positions of two": (lambda m, x: m.strided((x + m.positions if x.shape[1] == 2 else x).mT), (2, 2)),
    "a transposed convolution": (lambda m, x: m.spread(x.mT)[..., ::4], (1, 2)),
    "positions, if there are as many": (lambda m, x: m.up(x + m.positions if x.shape[1:] == m.positions.shape else x).mT, (2, 2)),
    "positions behind a product": (lambda m, x: (m.up(x) + (m.high if len(x[0]) == 2 else m.high[:1])).mT, (1, 2)),
    "as many of the positions": (lambda m, x: m.up(x + torch.cat([m.positions] * 4)[: x.shape[1]]).mT, (2, 4)),
    "positions of that size": (lambda m, x: m.up(x + F.interpolate(m.positions.mT[None], size=x.shape[1]).mT).mT, (2, 2)),
    "positions behind a convolution": (
        lambda m, x: F.conv1d((m.norm(x) + (m.positions if x.shape[1] == 2 else 0)).mT, m.up.weight[..., None], m.up.bias),
        (2, 2),
    ),
    "a length twice": (lambda m, x: torch.cat([m.up(x).mT] * 2, 2), (2, 2)),
    "a length and positions": (lambda m, x: m.up(torch.cat([x, m.positions.expand(x.shape[0], -1, -1)], 1)).mT, (2, 2)),
    "a shift": (lambda m, x: torch.cat([m.up(x)[:, 1:], m.up(x)[:, :1]], 1).mT, (2, 4)),
    "differences of one": (lambda m, x: m.up(x).mT.diff(dim=-1, append=m.up(x).mT[..., -1:]), (2, 1)),
    "differences": (lambda m, x: (m.up(F.pad(x, (0, 0, 0, 1)))[:, 1:] - m.up(x)).mT, (2, 2)),
    "one repeated": (lambda m, x: m.up(x).mT.repeat(1, 1, 2), (2, 1)),
    "a maximum": (lambda m, x: F.max_pool1d(m.up(x).mT, 2), (2, 2)),
    "an average": (lambda m, x: F.avg_pool1d(m.up(x).mT, 2), (1, 2)),
    "an average of so many": (lambda m, x: F.adaptive_avg_pool1d(m.up(x).mT, x.shape[1] // 2), (2, 4)),
    "an interpolation": (lambda m, x: F.interpolate(m.up(x).mT, scale_factor=0.5), (2, 4)),
    "each second": (lambda m, x: m.up(x)[:, ::2].mT, (2, 2)),
    "the first half": (lambda m, x: m.up(x)[:, : x.shape[1] // 2].mT, (2, 2)),
    "a half, at least one": (lambda m, x: m.up(x)[:, : max(1, x.shape[1] // 2)].mT, (2, 2)),
    "a half, at least as many as a setting": (lambda m, x: m.up(x)[:, : max(x.shape[1] // 2, m.conv.stride[0])].mT, (1, 1)),
    "a piece": (lambda m, x: m.up(x).chunk(2, 1)[0].mT, (2, 2)),
    "the largest": (lambda m, x: m.up(x).topk(x.shape[1] // 2, 1).values.mT, (2, 2)),
    "means of pairs": (lambda m, x: m.up(x).view(x.shape[0], -1, 2, INNER).mean(2).mT, (2, 2)),
    "windows": (lambda m, x: m.up(x).unfold(1, 2, 2).sum(-1).mT, (2, 2)),
}
#: name → (views [batch, length, INNER] that mix otherwise than the traced ones, batch and length while tracing)
VIEWS: dict[str, tuple[Callable[[Layer, Tensor], Tensor], tuple[int, int]]] = {
    "a dim that only one token lacks": (lambda m, x: m.up(x).mT.squeeze(-1).reshape(-1, INNER), (2, 1)),
    "as many groups as tokens": (
        lambda m, x: m.up(x).unflatten(-1, (2, -1)).permute(0, 2, 3, 1).reshape(x.shape[0], x.shape[1], -1),
        (2, 2),
    ),
    "the sizes of another": (lambda m, x: m.up(x).mT.reshape_as(m.up(x)), (2, 2)),
    "the sizes of another, of one token": (lambda m, x: m.up(x).mT.contiguous().view_as(m.up(x)), (2, 1)),
    "cuts by what is left of a length": (
        lambda m, x: (lambda y: torch.cat(y.flatten(1).chunk(y.shape[2], 1)))(F.interpolate(m.up(x).mT, size=x.shape[1] // 2)),
        (2, 4),
    ),
    "cuts by as many rows as are indexed": (
        lambda m, x: (lambda y: torch.cat(y.flatten(1).chunk(y.shape[2], 1)))(m.up(x).mT[..., torch.arange(x.shape[1]).flip(0)]),
        (1, 2),
    ),
    "cuts by one token repeated": (
        lambda m, x: (lambda y: torch.cat(y.flatten(1).chunk(y.shape[2], 1)))(m.up(x).mT.repeat_interleave(2, -1)),
        (2, 1),
    ),
    "cuts by a token more": (
        lambda m, x: (lambda y: torch.cat(y.flatten(1).chunk(y.shape[2], 1)))(m.up(F.pad(x, (0, 0, 1, 0))).mT),
        (1, 1),
    ),
    "differences in a row": (
        lambda m, x: (lambda y: torch.cat([y, y], 2).reshape(len(x), -1, INNER))(m.up(x).mT.diff(dim=-1, append=m.up(x).mT[..., -1:])),
        (4, 4),
    ),
    "as many groups as each second token": (
        lambda m, x: _shuffled(m.up(x).mT[..., ::2]),
        (4, 4),
    ),
    "as many groups as pairs": (lambda m, x: _shuffled(m.up(x).mT.reshape(x.shape[0], INNER, -1, 2).sum(-1)), (4, 4)),
    "a root": (lambda m, x: m.up(x).mT.reshape(x.shape[0], int(x.shape[1] ** 0.5), -1, INNER), (2, 1)),
}
#: name → views that do the same for all lengths
KEEPS: dict[str, Callable[[Layer, Tensor], Tensor]] = {
    "heads": lambda m, x: _attend(
        m, x, lambda y: y.view(*x.shape[:2], m.heads, -1).transpose(1, 2), lambda y: y.transpose(1, 2).reshape(*x.shape[:2], -1)
    ),
    "heads in the batch": lambda m, x: _attend(
        m,
        x,
        lambda y: y.view(x.shape[0], -1, m.heads, 4).transpose(1, 2).reshape(x.shape[0] * m.heads, -1, 4),
        lambda y: y.view(x.shape[0], m.heads, x.shape[1], 4).transpose(1, 2).flatten(2),
    ),
    "heads by length": lambda m, x: _attend(
        m,
        x.transpose(0, 1),
        lambda y: y.contiguous().view(x.shape[1], x.shape[0] * HEADS, 4).transpose(0, 1),
        lambda y: y.transpose(0, 1).reshape(x.shape[1], x.shape[0], WIDTH).transpose(0, 1),
    ),
    "rows": lambda m, x: m.down(m.up(x.view(-1, WIDTH)).relu()).view(x.shape),
    "rows in a batch of one": lambda m, x: m.down(m.up(x).reshape(1, -1, INNER).relu()).view_as(x),
    "rows taken apart": lambda m, x: m.down(m.up(x).flatten(0, 1).relu()).unflatten(0, x.shape[:2]),
    "channels": lambda m, x: m.down(m.up(x).mT.reshape(len(x), INNER, -1).relu().unsqueeze(-1).flatten(2).mT),
    "one of a kept dim": lambda m, x: m.down(m.up(x).relu().mean(1, keepdim=True).mT.reshape(x.shape[0], 1, INNER)) + x,
    "the last token": lambda m, x: m.down(m.up(x)[:, -1:].relu().mT.reshape(x.shape[0], 1, INNER)) + x,
    "windows": lambda m, x: m.down(m.up(F.pad(x, (0, 0, 0, -x.shape[1] % 2)).view(x.shape[0], -1, 2, WIDTH)).relu()).flatten(1, 2)[
        :, : x.shape[1]
    ],
    "a window of two": lambda m, x: m.down(m.strided(F.pad(x, (0, 0, 0, x.shape[1])).view(-1, 2, WIDTH).mT).relu().view(-1, INNER)).view(
        x.shape
    ),
    "several": lambda m, x: m.down(torch.stack([m.up(x), m.up(x).relu()], 2).view(*x.shape[:2], 2, -1)).sum(2),
    "more places out of channels": lambda m, x: m.down(
        F.conv1d(x.mT, m.strided.weight, m.strided.bias, 1, 1, 2)
        .mT.reshape(x.shape[0], x.shape[1] * m.heads, -1)
        .relu()
        .view(*x.shape[:2], -1)
    ),
    "turned pairs of one half": lambda m, x: m.down(
        torch.cat([_turned(y.view(*x.shape[:2], -1, 2)).flatten(2) for y in m.up(x).chunk(2, -1)], -1)
    ),
}


def found(
    how: Callable[[Layer, Tensor], Tensor], traced: tuple[int, int], check: str, shapes: Iterable[tuple[int, int]] = ANY
) -> tuple[float, bool, set[str]]:
    """The largest error of results and gradients of calls of other lengths, whether something is cut, and why parameters are not."""

    def build() -> nn.Module:
        torch.manual_seed(0)
        return Layer(how).double()

    def x(batch: int, n: int) -> Tensor:
        return torch.randn(batch, n, WIDTH, generator=torch.Generator().manual_seed(batch + n), dtype=torch.float64)

    def work(_: Any) -> tuple[float, bool, set[str]]:
        one, model = build(), build()
        plan = autotp.plan(model, tp=2, example_inputs={"x": x(*traced)}, check=check)
        parallelize_as(model, mesh(), plan)
        most = 0.0
        for i, shape in enumerate((traced, *shapes)):
            for each in (one, model):
                each.zero_grad()
                each.train(i in (1, 3))(x(*shape)).sin().sum().backward()
            grads = autotp.full_grads(model)
            pairs = [(grads[n], p.grad) for n, p in one.named_parameters() if p.grad is not None]
            with torch.no_grad():
                for got, wanted in ((model(x(*shape)), one(x(*shape))), *pairs):
                    most = max(most, float((got - wanted).abs().max() / (wanted.abs().max() + 1e-6)))
        return most, any(p.layout.dim is not None for p in plan.params.values()), {p.reason for p in plan.params.values()}

    result: tuple[float, bool, set[str]] = run("local", work, None, 2, 60)[0]
    return result


@pytest.mark.parametrize(("name", "check"), in_turns(MIXES, ("numbers", "graph")))
def test_what_a_view_mixes_with_lengths_stays_whole(name: str, check: str) -> None:
    most, cut, reasons = found(*MIXES[name], check)
    assert most < 1e-9 and not cut, most
    assert any("together with a length" in reason for reason in reasons), reasons


@pytest.mark.parametrize(("name", "traced"), in_turns(KEEPS, ((2, 1), (1, 4), (1, 1), (2, 2))), ids=str)
def test_what_it_does_not_mix_is_cut(name: str, traced: tuple[int, int]) -> None:
    most, cut, _ = found(KEEPS[name], traced, "graph")
    assert most < 1e-9 and cut, most


@pytest.mark.parametrize(("name", "check"), in_turns(VIEWS, ("numbers", "graph")))
def test_what_it_mixes_in_other_ways_stays_whole(name: str, check: str) -> None:
    how, traced = VIEWS[name]
    most, cut, _ = found(lambda m, x: m.down(how(m, x)), traced, check, ((2, 4), (1, 1), (3, 16), (1, 9)) if name == "a root" else EVEN)
    assert most < 1e-9 and not cut, most


class Channels(nn.Module):
    """Attention of channels first, over the places that a convolution leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.qkv, self.out = nn.Conv2d(3, WIDTH, 2, 2), nn.Conv2d(WIDTH, 3 * WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        b, _, h, w = x.shape
        q, k, v = self.qkv(x).reshape(b, 3, HEADS, WIDTH // HEADS, -1).permute(1, 0, 2, 4, 3).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(b, -1, h, w)
        return self.out(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("name", "check"), in_turns(LENGTHS, ("numbers", "graph")))
def test_what_it_mixes_with_a_length_or_a_part_of_one_stays_whole(name: str, check: str) -> None:
    left, traced = LENGTHS[name]
    most, cut, _ = found(lambda m, x: _mixed(m, left(m, x)), traced, check, EVEN)
    assert most < 1e-9 and not cut, most
    most, cut, _ = found(lambda m, x: m.down(left(m, x).relu().mT), traced, check, EVEN)
    assert most < 1e-9 and cut, most


def test_heads_of_channels_first_are_cut() -> None:
    image = torch.randn(2, 3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = equal_or_refused(Channels, inputs={"x": image}, tp=2, more={"of one": {"x": image[:1]}}, steps=1)
    assert found.equal is not None, found.refused
    assert {"qkv.weight", "out.weight"} <= found.equal.sharded


def test_without_the_rule_they_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placements, "regrouped", lambda *of: {})
    monkeypatch.setattr(placements, "varying", lambda *of: {})
    for name in MIXES.keys() - {"channels before one token, by steps"}:  # whose number in the code is refused otherwise
        assert found(*MIXES[name], "graph")[0] > 1e-3, name
    for left, traced in LENGTHS.values():
        assert found(lambda m, x, left=left: _mixed(m, left(m, x)), traced, "graph", EVEN)[0] > 1e-3  # type: ignore[misc]
