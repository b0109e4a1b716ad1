"""Lists, tuples and dicts of another length or other keys than traced: equal where their items are alike, refused where they are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, is_dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.api import parallelize_as
from autotp.errors import PlanError
from autotp.plan.codec import decode, encode
from autotp.testing.ranks.run import run
from tests.support.ranks import mesh

WIDTH, INNER = 8, 24


class Sums(nn.Module):
    """What `make` returns of summands, which are summed at the result, and of parts."""

    def __init__(self, make: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.make, self.up = make, nn.Linear(WIDTH, INNER)
        self.down, self.more = nn.Linear(INNER, WIDTH, bias=False), nn.Linear(INNER, WIDTH, bias=False)

    def summand(self, x: Tensor) -> Tensor:
        h = self.part(x)
        return self.down(h) + self.more(h.tanh())

    def part(self, x: Tensor) -> Tensor:
        return self.up(x).relu()

    def forward(self, x: Tensor) -> Any:
        return self.make(self, x)


class Takes(nn.Module):
    """A region whose argument has a gradient that is a summand; `tensors` picks those that it is to take."""

    def __init__(self, tensors: Callable[[Any], Any]) -> None:
        super().__init__()
        self.tensors, self.up, self.down = tensors, nn.Parameter(torch.randn(WIDTH, INNER)), nn.Linear(INNER, WIDTH)

    def forward(self, items: Any) -> Tensor:
        return sum(self.down((x @ self.up).relu()) for x in self.tensors(items))  # type: ignore[return-value]


class Spread(Takes):
    """Takes them as arguments of their own."""

    def forward(self, *items: Any) -> Tensor:
        return super().forward(items)


class Around(nn.Module):
    """Calls `inner` with what is whole: a sum along a dim cannot be cut there."""

    def __init__(self, inner: nn.Module, call: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.inner, self.call = nn.Linear(WIDTH, WIDTH), inner, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.inner, self.first(x).cumsum(-1))


class Pair(NamedTuple):
    """Fields of a class."""

    a: Any
    b: Tensor


@dataclass
class Fields:
    """Fields of a dataclass."""

    a: Any
    b: Tensor


def tensors(value: Any) -> Iterator[Tensor]:
    """Yields all tensors of a result."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from (t for v in value.values() for t in tensors(v))
    elif isinstance(value, (list, tuple, Iterator)):
        yield from (t for v in value for t in tensors(v))
    elif is_dataclass(value):
        yield from (t for v in vars(value).values() for t in tensors(v))


def inside(make: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    """The sums go to code that adds all of them up."""
    return lambda: Around(Sums(make), lambda inner, x: sum(t.cumsum(-1).sin().flatten(1).sum(1) for t in tensors(inner(x))))


def root(make: Callable[[Any, Tensor], Any]) -> Callable[[], nn.Module]:
    """The model returns them."""
    return lambda: Sums(make)


def into(call: Callable[[nn.Module, Tensor], Any], pick: Callable[[Any], Any] = tensors, kind: type[Takes] = Takes) -> Any:
    """The region is called with what is made of x."""
    return lambda: Around(kind(pick), call)


def pairs(x: Tensor) -> Iterator[Tensor]:
    """Two tokens each."""
    return iter(x.split(2, 1))


ALIKE: dict[str, Callable[[], nn.Module]] = {
    "a list": inside(lambda s, x: [s.summand(c) for c in pairs(x)]),
    "a list of lists": inside(lambda s, x: [[s.summand(t) for t in c.split(1, 1)] for c in pairs(x)]),
    "a tuple of pairs": inside(lambda s, x: tuple((s.summand(c), c) for c in pairs(x))),
    "named pairs": inside(lambda s, x: [Pair(s.summand(c), c) for c in pairs(x)]),
    "in a named tuple": inside(lambda s, x: Pair([s.summand(c) for c in pairs(x)], x)),
    "in a dataclass": inside(lambda s, x: Fields([s.summand(c) for c in pairs(x)], x)),
    "in a dict": inside(lambda s, x: {"a": [s.summand(c) for c in pairs(x)], "b": x}),
    "keys that are numbers": inside(lambda s, x: {i: s.summand(c) for i, c in enumerate(pairs(x))}),
    "keys beside others": inside(lambda s, x: {(0, 1): x, None: x} | {f"c{i}": s.summand(c) for i, c in enumerate(pairs(x))}),
    "keys of other kinds": root(lambda s, x: {(0, 1): s.summand(x), None: s.part(x), 2.5: [s.part(c) for c in pairs(x)]}),
    "with gaps": inside(lambda s, x: [None if i % 3 == 1 else s.summand(c) for i, c in enumerate(x.split(1, 1))]),
    "parts of the root": root(lambda s, x: ([s.part(c) for c in pairs(x)], s.summand(x))),
    "keys of the root": root(lambda s, x: {f"token{i}": s.part(x[:, i]) for i in range(x.shape[1])} | {"y": s.summand(x)}),
    "dicts of the root": root(lambda s, x: [{"h": s.part(c), "y": s.summand(c), "n": 1} for c in pairs(x)]),
    "an argument": into(lambda inner, x: inner(x.unbind(1))),
    "arguments": into(lambda inner, x: inner(*x.unbind(1)), kind=Spread),
    "a dict with a list": into(lambda inner, x: inner({"a": x.unbind(1), "b": x[:, 0] * 2})),
    "one tensor twice": into(lambda inner, x: inner([*x.unbind(1), *x.unbind(1)[:1] * 2])),
    "a call on a list": into(lambda inner, x: torch.stack([inner([t]) for t in x.unbind(1)], 1).sin()),
}

UNLIKE: dict[str, Callable[[], nn.Module]] = {
    "one more behind": inside(lambda s, x: (*[s.summand(c) for c in pairs(x)], x * 2)),
    "one more behind in the root": root(lambda s, x: (*s.part(x).unbind(1), s.summand(x))),
    "a key that counts": root(lambda s, x: {f"of{x.shape[1]}": s.part(x), "y": s.summand(x)}),
    "a tuple for named fields": root(lambda s, x: (Fields if x.shape[1] == 4 else lambda *of: of)([s.part(x)], s.summand(x))),
    "a list behind one": root(lambda s, x: {"y": [s.part(x), *x.unbind(1)], "z": s.summand(x)}),
    "a call on two kinds": root(lambda s, x: s.down(torch.cat([*[s.part(c) for c in pairs(x)], x.new_ones(2, 1, INNER)], 1))),
}

#: What is whole, or not in a container, may be of any length beside what is converted.
FREE: dict[str, Callable[[], nn.Module]] = {
    "whole": inside(lambda s, x: {"a": s.summand(x), "b": x.unbind(1)}),
    "other keys of whole ones": inside(lambda s, x: [s.summand(x), {f"of{x.shape[1]}": x}]),
    "a generator": inside(lambda s, x: (s.summand(c) for c in pairs(x))),
}


def step(model: nn.Module, length: int, training: bool) -> dict[str, Tensor]:
    """The results of a call, and the gradient of its input."""
    model.train(training).zero_grad()
    x = torch.randn(2, length, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(length)).requires_grad_()
    found = dict(enumerate(tensors(model(x))))
    sum((t * t).sum() for t in found.values()).backward()  # type: ignore[union-attr]
    return {**{f"result {i}": t.detach() for i, t in found.items()}, "gradient of x": x.grad.clone()}  # type: ignore[union-attr]


def outcome(factory: Callable[[], nn.Module], lengths: list[int], traced: int | list[int] = 4) -> list[float | str]:
    """How far calls of these lengths are from one device, or what each is refused with."""
    calls = [{"x": torch.randn(2, n, WIDTH, dtype=torch.float64)} for n in ([traced] if isinstance(traced, int) else traced)]

    def work(_: Any) -> list[float | str]:
        torch.manual_seed(0)
        one = factory().double()
        model = copy.deepcopy(one)
        plan = decode(encode(autotp.plan(model, tp=2, example_inputs=calls, check="graph")))
        assert plan.local_share < 0.9
        parallelize_as(model, mesh(), plan)
        found: list[float | str] = []
        for training, length in ((mode, n) for n in lengths for mode in (False, True)):
            want = step(one, length, training) | {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
            try:
                got = step(model, length, training) | autotp.full_grads(model)
                assert got.keys() >= want.keys()
                found.append(max(float((got[n] - t).abs().max() / (1 + t.abs().max())) for n, t in want.items()))
            except PlanError as error:
                found.append(str(error))
        return found

    every: list[float | str] = run("local", work, None, 2, 60)[0]
    return every


@pytest.mark.parametrize("kind", ALIKE)
def test_items_that_are_alike_may_be_any_number(kind: str) -> None:
    found = outcome(ALIKE[kind], [4, 1, 2, 7])
    assert all(isinstance(error, float) and error < 1e-9 for error in found), found


@pytest.mark.parametrize("kind", FREE)
def test_what_is_whole_may_be_of_any_length(kind: str) -> None:
    found = outcome(FREE[kind], [4, 2, 6])
    assert all(isinstance(error, float) and error < 1e-9 for error in found), found


@pytest.mark.parametrize("kind", UNLIKE)
def test_others_are_as_many_as_in_a_traced_call(kind: str) -> None:
    same, again, *others = outcome(UNLIKE[kind], [4, 2, 8])
    assert all(isinstance(error, float) and error < 1e-9 for error in (same, again)), same
    assert all(isinstance(text, str) and "in the calls that were traced" in text and "Pass example_inputs" in text for text in others)


@pytest.mark.parametrize("kind", ["one more behind", "one more behind in the root", "a key that counts"])
def test_calls_of_each_length_allow_them(kind: str) -> None:
    found = outcome(UNLIKE[kind], [4, 8], traced=[4, 8])
    assert all(isinstance(error, float) and error < 1e-9 for error in found), found


def test_one_item_does_not_tell_what_others_are() -> None:
    found = outcome(ALIKE["a list"], [2, 4], traced=2)
    assert [type(error) for error in found] == [float, float, str, str], found
