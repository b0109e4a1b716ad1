"""The pairs of a rank: each one once over all ranks, and their results back in their tokens."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from autotp.plan.expressions import Factor
from autotp.plan.layout import intervals
from autotp.rewrite.modules.pairs import _Dropped, pick, put_back


@given(experts=st.integers(1, 9), tp=st.integers(1, 5), tokens=st.integers(0, 6), slots=st.integers(1, 3), seed=st.integers(0, 99))
def test_every_pair_once(experts: int, tp: int, tokens: int, slots: int, seed: int) -> None:
    index = torch.randint(experts, (tokens, slots), generator=torch.Generator().manual_seed(seed))
    rows = torch.randn(tokens, slots, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    total, seen = torch.zeros(tokens, 2, dtype=torch.float64), 0
    for rank in range(tp):
        start, stop = next(iter(intervals(Factor("experts", experts, sharded=True), rank, tp)), (0, 0))
        picked = pick(index, start, stop)
        assert torch.equal(index[picked.token, picked.slot], picked.local + start)
        seen += len(picked.token)
        total += put_back(rows[picked.token, picked.slot], picked, tokens)
    assert seen == index.numel()
    assert torch.allclose(total, rows.sum(1))


def test_a_rank_without_pairs() -> None:
    """One stands in: the code runs, and nothing comes of it, not even of numbers that are none."""
    assert not len(pick(torch.zeros(3, 2, dtype=torch.int64), 2, 4).token)
    x, weight = torch.ones(3, 4, requires_grad=True), torch.full((4, 4), float("inf"), requires_grad=True)
    with torch.no_grad():
        row = x[:1] @ (weight - weight)
    assert row.isnan().all()
    out = _Dropped.apply(row, 3, x, weight)  # type: ignore[no-untyped-call]
    out.backward(torch.full_like(out, float("inf")))
    assert out.shape == (3, 4) and not out.count_nonzero()
    assert all(t.grad is not None and not t.grad.count_nonzero() for t in (x, weight))
