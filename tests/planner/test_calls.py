"""One call of the code that is several operators: a conversion between them is out of reach."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.side_by_side import Between, equal

Function = Callable[[Tensor], Tensor]

#: name → (function of a sharded [2, 6, 24], whether it stays sharded)
COMPOSITES: dict[str, tuple[Function, bool]] = {
    "adaptive_avg_pool1d": (lambda h: h * F.adaptive_avg_pool1d(h, 1), False),
    "its module": (lambda h: h + nn.AdaptiveAvgPool1d(1)(h), False),
    "adaptive_avg_pool2d": (lambda h: h * F.adaptive_avg_pool2d(h, 1), False),
    "matrix_norm": (lambda h: h / torch.linalg.matrix_norm(h, keepdim=True), False),
    "cosine_embedding_loss": (lambda h: h * F.cosine_embedding_loss(h.flatten(0, 1), h.roll(1, 1).flatten(0, 1), torch.ones(12)), False),
    "normalize": (lambda h: F.normalize(h, dim=-1), False),
    "pairwise_distance": (lambda h: h * F.pairwise_distance(h, h.roll(1, 1), keepdim=True), False),
    "cosine_similarity": (lambda h: h * F.cosine_similarity(h, h.roll(1, 1), -1)[..., None], False),
    "triplet_margin_loss": (lambda h: h * F.triplet_margin_loss(h, h.roll(1, 1), h.roll(2, 1)), False),
    "kl_div": (lambda h: h * F.kl_div(F.logsigmoid(h), h.sigmoid().roll(1, 1), reduction="batchmean"), False),
    "huber_loss": (lambda h: h * F.huber_loss(h, h.roll(1, 1)), False),
    "gaussian_nll_loss": (lambda h: h * F.gaussian_nll_loss(h, h.roll(1, 1), h.exp()), False),
    "margin_ranking_loss": (lambda h: h * F.margin_ranking_loss(h, h.roll(1, 1), torch.ones_like(h)), False),
    "std_mean": (lambda h: (lambda s, m: h * s + m)(*torch.std_mean(h, -1, keepdim=True)), False),
    "var_mean of other dims": (lambda h: (lambda s, m: h * s + m)(*torch.var_mean(h, 1, keepdim=True)), True),
    "cdist": (lambda h: h * torch.cdist(h, h).sum(-1, keepdim=True), False),
    "block_diag": (lambda h: h * torch.block_diag(h[0], h[1]).sum(), False),
    "local_response_norm": (lambda h: F.local_response_norm(h.transpose(1, 2), 3).transpose(1, 2), False),
    "instance_norm": (lambda h: F.instance_norm(h.transpose(1, 2)).transpose(1, 2), True),
    "fold": (lambda h: F.fold(F.unfold(h[:, None], (2, 2)), (6, 24), (2, 2))[:, 0], False),
    "embedding_bag": (lambda h: h * F.embedding_bag(torch.tensor([[0, 1], [2, 2]]), h[0])[:, None], False),
    "tensordot": (lambda h: h * torch.tensordot(h, h, dims=([2], [2])).sum(), False),
    "tensor_split": (lambda h: torch.cat([t * i for i, t in enumerate(torch.tensor_split(h, 3, -1), 1)], -1), True),
    "tensor_split at": (lambda h: torch.cat([t * i for i, t in enumerate(torch.tensor_split(h, (4, 9), -1), 1)], -1), False),
    "linalg.norm": (lambda h: h / torch.linalg.norm(h, dim=-1, keepdim=True), True),
    "all of norm": (lambda h: h / torch.norm(h), True),
    "rows": (lambda h: torch.stack([row * i for i, row in enumerate(h)]), True),
    "rows of partial sums": (lambda h: h * torch.stack(list(h.sum(-1))).sum(), True),
    "two operators of an index": (lambda h: h * h.sum(-1)[0, None, :, None], True),
    "reshape_as": (lambda h: (h * 2).flatten(0, 1).relu().reshape_as(h), True),
    "view_as": (lambda h: h.flatten(1).relu().view_as(h.exp()), True),
    "the shape of a whole tensor": (lambda h: h.flatten(0, 1).relu().reshape_as(torch.zeros(2, 6, 24)), False),
    "windows along the length": (lambda h: h.unfold(1, 3, 1).amax(-1), True),
    "a long convolution": (lambda h: torch.fft.irfft(torch.fft.rfft(h, n=12, dim=1) * torch.fft.rfft(h, n=12, dim=1), n=12, dim=1), True),
    "frequencies of the width": (lambda h: torch.fft.rfft(h, dim=-1).abs().sum(-1, keepdim=True) * h, False),
    "errors of elements": (lambda h: F.huber_loss(h, h.roll(1, 1), reduction="none"), True),
    "values of max": (lambda h: (lambda m: h + m.values + m.indices)(h.max(1, keepdim=True)), True),
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_a_call_of_several_operators(name: str) -> None:
    function, sharded = COMPOSITES[name]
    assert equal(lambda: Between(function), {"x": torch.randn(2, 6, 16, dtype=torch.float64)}) == sharded


class Latents(nn.Module):
    """Learned queries, more than there are keys."""

    def __init__(self, causal: bool, keywords: bool = False) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(64, 16))
        self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16)
        self.causal, self.keywords = causal, keywords

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q.expand(x.shape[0], -1, -1), self.k(x), self.v(x)
        if self.keywords:
            return F.scaled_dot_product_attention(value=v, key=k, query=q, is_causal=self.causal).mean(1)
        return F.scaled_dot_product_attention(q, k, v, None, 0.0, self.causal).mean(1)


@pytest.mark.parametrize("tp", [2, 3])
@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_positions_of_queries_under_a_causal_mask(causal: bool, keywords: bool, tp: int) -> None:
    inputs = {"x": torch.randn(2, 6, 16, dtype=torch.float64)}
    assert equal(lambda: Latents(causal, keywords), inputs, tp) == (not causal)
