"""Operators whose result is as long as numbers in an argument say: equal where these are known, and where they are not."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import rnn

import autotp
from autotp.testing import assert_equivalent
from tests.support.slow import halved

X = torch.linspace(-1, 1, 2 * 6 * 16, dtype=torch.float64).sin().view(2, 6, 16)
LENGTHS = torch.tensor([5, 3])
LABELS = torch.tensor([[1, 2, 3], [4, 5, 6]])


class Model(nn.Module):
    """A region that is cut, and an expression over its whole result."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.a, self.b, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 12)
        self.lstm, self.gru = nn.LSTM(16, 8, batch_first=True), nn.GRU(16, 8, batch_first=True, bidirectional=True)

    def forward(self, x: Tensor, lengths: Tensor, labels: Tensor) -> Tensor:
        return EXPRESSIONS[self.name](self, self.b(torch.tanh(self.a(x))), lengths, labels)


def _scores(m: Any, h: Tensor) -> Tensor:
    return m.head(h).log_softmax(-1).transpose(0, 1)  # type: ignore[no-any-return]


def _unknown(h: Tensor) -> Tensor:
    """The lengths of whole sequences, computed from activations."""
    return (h[..., 0] > -1e9).sum(-1)


def _ctc(m: Any, h: Tensor, steps: Any, labels: Tensor, lengths: Any, **options: Any) -> Tensor:
    return F.ctc_loss(_scores(m, h), labels, steps, lengths, **options)


def _packed(run: nn.Module, h: Tensor, lengths: Any, **options: Any) -> Tensor:
    out, _ = run(rnn.pack_padded_sequence(h, lengths, batch_first=True, **options))
    return rnn.pad_packed_sequence(out, batch_first=True)[0]


SIX = torch.tensor([6, 6])
EXPRESSIONS: dict[str, Callable[[Any, Tensor, Tensor, Tensor], Tensor]] = {
    "ctc": lambda m, h, n, y: _ctc(m, h, SIX, y, n.clamp(max=3)),
    "ctc of one row": lambda m, h, n, y: _ctc(m, h, SIX, y.flatten()[:5], torch.tensor([3, 2]), reduction="sum"),
    "ctc of ints": lambda m, h, n, y: _ctc(m, h, (6, 6), y, (3, 2), reduction="none"),
    "ctc of unknown lengths": lambda m, h, n, y: _ctc(m, h, _unknown(h), y, _unknown(h[:, :3])),
    "packed": lambda m, h, n, y: _packed(m.lstm, h, n, enforce_sorted=False),
    "packed by ints": lambda m, h, n, y: _packed(m.gru, h, n.tolist()),
    "packed by unknown lengths": lambda m, h, n, y: _packed(m.lstm, h, _unknown(h), enforce_sorted=False),
    "pack_sequence": lambda m, h, n, y: rnn.pad_packed_sequence(m.lstm(rnn.pack_sequence([h[0], h[1, :4]]))[0])[0],
    "unpad_sequence": lambda m, h, n, y: torch.cat(rnn.unpad_sequence(h, n, batch_first=True)),
    "bincount": lambda m, h, n, y: h.mean() * torch.bincount(y.flatten()),
    "bincount of unknown": lambda m, h, n, y: h.mean() * torch.bincount(h.argmax(-1).flatten(), minlength=16),
    "bincount of unknown weights": lambda m, h, n, y: h.mean() * torch.bincount(y.flatten(), h.detach()[0, :, 0]),
    "combinations": lambda m, h, n, y: torch.combinations(h[0, :, 0]),
    "masked_select": lambda m, h, n, y: h[:, :3].masked_select((y > 2)[..., None]),
    "narrow": lambda m, h, n, y: h.narrow(1, n[1] - 2, 3),
    "tensor_split": lambda m, h, n, y: torch.tensor_split(h, n, dim=1)[1],
    "repeated": lambda m, h, n, y: h.repeat_interleave(n, 0).cumsum(0),
    "repeated along a dim": lambda m, h, n, y: torch.repeat_interleave(h, torch.tensor([1, 2, 3, 0, 1, 2]), dim=1).cumsum(1),
    "repeated all": lambda m, h, n, y: h[:, 0, :2].repeat_interleave(torch.tensor([1, 0, 2, 3])).cumsum(0),
    "repeated by an unknown number": lambda m, h, n, y: h.repeat_interleave((h[:, 0, 0] > -1e9).long(), 0, output_size=2),
    "repeated indices": lambda m, h, n, y: h[torch.repeat_interleave(n) % 2],
    "one_hot": lambda m, h, n, y: F.one_hot(h.argmax(-1)).sum() * h,
    "new_tensor": lambda m, h, n, y: h * h.new_tensor([n[0], n[1]]).sum() * h.new_tensor(data=[n[0]]),
    "unique": lambda m, h, n, y: h * torch.unique(h.argmax(-1), return_inverse=True)[1][..., None],
    "unique_consecutive": lambda m, h, n, y: h * torch.unique_consecutive(h.argmax(-1), return_inverse=True, dim=1)[1][..., None],
}


@pytest.mark.parametrize("name", halved(EXPRESSIONS))
def test_lengths(name: str) -> None:
    inputs = {"x": X, "lengths": LENGTHS, "labels": LABELS}
    assert assert_equivalent(partial(Model, name), tp=2, inputs=inputs, certificate="graph").plan.local_share < 0.95


class Packed(nn.Module):
    """What it computes with is packed where it is cut: the packing knows no parts."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 40), nn.Linear(40, 16)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = rnn.pack_padded_sequence(torch.tanh(self.a(x)), lengths, batch_first=True)
        return self.b(rnn.pad_packed_sequence(packed, batch_first=True)[0])  # type: ignore[no-any-return]


def test_what_is_packed_stays_whole() -> None:
    plan = autotp.plan(Packed().double(), tp=2, example_inputs={"x": X, "lengths": LENGTHS})
    assert plan.local_share == 1 and "_pack_padded_sequence" in str(plan)
    assert_equivalent(Packed, tp=2, inputs={"x": X, "lengths": LENGTHS}, certificate="graph")
