"""A part of a deferred tensor is that part of what torch computes on whole tensors, and no more is read than the rules promise."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from autotp.checkpoint.deferred import Deferred, node_of
from autotp.checkpoint.nodes import Box, Node, sizes, uncast, whole_box
from autotp.checkpoint.pullback import fill, moves_only, value
from autotp.errors import CheckpointError


@dataclass(frozen=True, eq=False)
class There(Node):
    """A source whose entries are at hand."""

    tensor: Tensor | None = None


class Reading:
    """A `Read` that counts."""

    def __init__(self) -> None:
        self.entries = 0

    def __call__(self, source: Node, box: Box) -> Tensor:
        assert isinstance(source, There)
        assert source.tensor is not None
        self.entries += prod(sizes(box))
        return source.tensor[tuple(slice(a, b) for a, b in box)]


def there(tensor: Tensor, read: Reading | None = None) -> Deferred:
    return Deferred(There(tuple(tensor.shape), tensor.dtype, tensor), read)


# Each is (the operation, whether it applies to a tensor); all draw from the sizes at hand.
def _view(data, x: Tensor) -> Tensor:
    factors = [p for n in x.shape for p in _primes(n)] or [1]
    cuts = sorted(data.draw(st.sets(st.integers(0, len(factors)), max_size=3)) | {0, len(factors)})
    return x.reshape([prod(factors[a:b]) for a, b in pairwise(cuts)])


def _primes(n: int) -> list[int]:
    found, d = [], 2
    while n > 1:
        while n % d == 0:
            found.append(d)
            n //= d
        d += 1
    return found


def _dim(data, x: Tensor) -> int:
    return data.draw(st.integers(-x.ndim, x.ndim - 1))


def _permute(data, x: Tensor) -> Tensor:
    return x.permute(data.draw(st.permutations(range(x.ndim))))


def _slice(data, x: Tensor) -> Tensor:
    d = _dim(data, x) % x.ndim
    a = data.draw(st.integers(0, x.shape[d] - 1))
    return x[(slice(None),) * d + (slice(a, data.draw(st.integers(a + 1, x.shape[d])), data.draw(st.integers(1, 2))),)]


def _chunk(data, x: Tensor) -> Tensor:
    parts = torch.chunk(x, data.draw(st.integers(1, 3)), _dim(data, x))
    return parts[data.draw(st.integers(0, len(parts) - 1))].contiguous()


def _cat(data, x: Tensor) -> Tensor:
    return torch.cat([x, x + 1, x], _dim(data, x))


def _stack(data, x: Tensor) -> Tensor:
    return torch.stack([x, -x], data.draw(st.integers(0, x.ndim)))


def _unbind(data, x: Tensor) -> Tensor:
    return torch.unbind(x, _dim(data, x))[-1] if x.ndim > 1 else x[0].unsqueeze(0)


def _squeeze(data, x: Tensor) -> Tensor:
    return x.unsqueeze(data.draw(st.integers(0, x.ndim))).squeeze(0) if x.shape[0] > 1 else x.unsqueeze(-1)


def _cast(data, x: Tensor) -> Tensor:
    return x.to(data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64])))


def _opaque(data, x: Tensor) -> Tensor:
    return x.flip(_dim(data, x)).cumsum(0)


STEPS = (_view, _permute, _slice, _chunk, _cat, _stack, _unbind, _squeeze, _cast, _opaque)


@st.composite
def boxes(draw, shape) -> Box:
    box = []
    for n in shape:
        a = draw(st.integers(0, n))
        box.append((a, draw(st.integers(a, n))))
    return tuple(box)


class _Both:
    """Draws once, and gives the same answers again to the second of two equal programs."""

    def __init__(self, data) -> None:
        self.data, self.drawn, self.at = data, [], None

    def draw(self, strategy):
        if self.at is None:
            self.drawn.append(self.data.draw(strategy))
            return self.drawn[-1]
        self.at += 1
        return self.drawn[self.at - 1]


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_box_is_that_box_of_the_whole(data):
    shape = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4))
    x = torch.arange(prod(shape), dtype=torch.float32).reshape(shape)
    both = _Both(data)
    steps = data.draw(st.lists(st.sampled_from(STEPS), max_size=5))

    def program(y: Tensor) -> Tensor:
        for step in steps:
            y = step(both, y) if y.ndim and y.numel() < 5000 else y
        return y

    wanted = program(x)
    both.at = 0
    got = program(there(x))
    assert isinstance(got, Deferred)
    assert got.shape == wanted.shape and got.dtype == wanted.dtype
    box = data.draw(boxes(wanted.shape))
    expected = wanted[tuple(slice(a, b) for a, b in box)]
    part = value(node_of(got), box, Reading())
    assert torch.equal(part, expected)
    # into a strided place, too
    room = torch.full([2 * n for n in expected.shape], 7.0, dtype=expected.dtype)
    place = room[tuple(slice(0, 2 * n, 2) for n in expected.shape)]
    fill(node_of(got), box, place, Reading())
    assert torch.equal(place, expected)


def test_only_what_is_asked_for_is_read():
    experts = [there(torch.randn(6, 4)) for _ in range(8)]
    ups = [there(torch.randn(6, 4)) for _ in range(8)]
    fused = torch.cat([torch.stack(experts), torch.stack(ups)], dim=1)  # [8, 12, 4]
    read = Reading()
    value(node_of(fused), ((2, 4), (0, 3), (0, 4)), read)
    assert read.entries == 2 * 3 * 4
    read = Reading()
    value(node_of(fused.transpose(1, 2)), ((0, 8), (1, 2), (5, 7)), read)
    assert read.entries == 8 * 2
    heads = there(torch.randn(8 * 6, 4)).view(8, 3, 2, 4).transpose(1, 2).reshape(48, 4)
    read = Reading()
    value(node_of(heads), ((12, 24), (0, 4)), read)
    assert read.entries == 12 * 4  # whole heads come from whole heads
    read = Reading()
    value(node_of(heads.flip(0)), ((12, 24), (0, 4)), read)
    assert read.entries == 48 * 4  # and where no rule is known, all is read


def test_a_cast_rounds_before_what_follows():
    x = torch.randn(4, 5, dtype=torch.float64)
    got = there(x).to(torch.bfloat16).to(torch.float32)
    assert torch.equal(value(node_of(got), whole_box((4, 5)), Reading()), x.to(torch.bfloat16).float())
    assert uncast(node_of(got)) is not node_of(got)
    assert torch.equal(value(uncast(node_of(got)), whole_box((4, 5)), Reading()), x)


def test_moving_and_computing_are_told_apart():
    x = there(torch.randn(4, 6))
    assert moves_only(node_of(torch.cat(torch.chunk(x.t().to(torch.float16), 2), 1)))
    assert not moves_only(node_of(x + 1))


def test_values_are_read_where_code_asks_for_them():
    a, b = torch.randn(3, 4), torch.randn(3, 4)
    read = Reading()
    assert torch.equal(there(a, read), there(a.clone(), read))
    assert not torch.equal(there(a, read), there(b, read))
    assert not torch.equal(there(a, read), there(a.double(), read))
    assert there(a, read)[0, 0].item() == a[0, 0].item()
    with pytest.raises(CheckpointError, match="asks for values of a tensor that no rank holds"):
        there(a).sum().item()


def test_changes_in_place_are_seen_by_all_views():
    x = torch.randn(4, 6)
    read = Reading()
    tensor = there(x, read)
    p = torch.nn.Parameter(tensor, requires_grad=False)
    half = tensor[:, 3:]
    p.data[1].zero_()
    p.data[2].mul_(2)
    half[0].fill_(7)
    wanted = x.clone()
    wanted[1], wanted[2], wanted[0, 3:] = 0, 2 * x[2], 7
    for got, expected in ((p, wanted), (tensor, wanted), (half, wanted[:, 3:])):
        assert torch.equal(value(node_of(got), whole_box(expected.shape), read), expected)
    assert torch.equal(value(node_of(p), ((1, 3), (2, 4)), read), wanted[1:3, 2:4])
    assert not moves_only(node_of(p))
    p.normal_()
    first = value(node_of(p), whole_box((4, 6)), read)
    assert torch.equal(first, value(node_of(tensor), whole_box((4, 6)), read)) and not torch.equal(first, wanted)
    with pytest.raises(CheckpointError, match="no rank holds whole"):
        there(torch.randn(3)).mul_(2)


def test_tensors_that_are_there_take_part():
    x, y = torch.randn(4, 6), torch.randn(4, 1)
    got = torch.cat([there(x) * y, torch.ones(1, 6)])
    wanted = torch.cat([x * y, torch.ones(1, 6)])
    assert torch.equal(value(node_of(got), ((2, 5), (1, 3)), Reading()), wanted[2:5, 1:3])


def test_a_parameter_keeps_its_node():
    tensor = there(torch.randn(3, 2))
    p = torch.nn.Parameter(tensor)
    assert isinstance(p, Deferred) and p.requires_grad and value(node_of(p), whole_box((3, 2)), Reading()).shape == (3, 2)
