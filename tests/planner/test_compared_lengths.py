"""What code makes of a length and of a number that the plan makes local is that of one device for other lengths too, or is refused."""

from __future__ import annotations

import enum
import functools
import math
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.api import parallelize_as
from autotp.planner.local_ints import _Search
from autotp.testing.ranks.run import run
from autotp.trace.ints import Arith, AttrRef, Life, SizeRef, TaggedFloat, TaggedInt, evaluate
from tests.support.ranks import mesh
from tests.support.slow import in_turns

HEADS, DIM = 4, 4
WIDTH = HEADS * DIM


class Member(enum.IntEnum):
    """A number with a name."""

    TWO = 2


#: name → (a number made of the length, the heads and the query [batch, length, heads, DIM]; whether the heads can be cut all the same, None
#: where that depends on the traced length)
MADE: dict[str, tuple[Callable[[int, int, Tensor], Any], bool | None]] = {
    "truth of a rest": (lambda t, h, q: 2.0 if t % h else 1.0, False),
    "no quotient": (lambda t, h, q: 2.0 if not t // h else 1.0, False),
    "bool of a difference": (lambda t, h, q: 1.0 + bool(t - h), False),
    "any": (lambda t, h, q: 1.0 + any([t - h]), False),
    "and": (lambda t, h, q: 2.0 if t % h and t else 1.0, False),
    "a float of the heads": (lambda t, h, q: 2.0 if t > float(h) else 1.0, False),
    "a quotient": (lambda t, h, q: 2.0 if t / h >= 1 else 1.0, False),
    "a power": (lambda t, h, q: 2.0 if t**0.5 >= h else 1.0, False),
    "a product with a float": (lambda t, h, q: 2.0 if t * 1.0 > h else 1.0, False),
    "divmod": (lambda t, h, q: divmod(t, h)[1] + 1, None),
    "bits": (lambda t, h, q: (t & (h - 1)) + 1, None),
    "a quotient rounded up": (lambda t, h, q: math.ceil(t / h), None),
    "rounded": (lambda t, h, q: round(t / h) + 1, None),
    "an absolute value": (lambda t, h, q: 2.0 if abs(t - h) < 2 else 1.0, False),
    "elements": (lambda t, h, q: 2.0 if q.numel() > 200 else 1.0, False),
    "a length times heads": (lambda t, h, q: 2.0 if q.transpose(1, 2).flatten(0, 1).shape[0] > 9 else 1.0, False),
    "two lengths": (lambda t, h, q: 2.0 if t > q.shape[0] * h else 1.0, False),
    "a length of several, joined": (lambda t, h, q: 2.0 if torch.cat([q, q, q[:, :1]], 1).shape[1] == h + 1 else 1.0, False),
    "two lengths alone": (lambda t, h, q: 2.0 if t > q.shape[0] else 1.0, True),
    "elements of any": (lambda t, h, q: 2.0 if q.numel() > 0 else 1.0, True),
    "elements of joined lengths": (lambda t, h, q: 2.0 if torch.cat([q, q[:, :1]], 1).numel() > 0 else 1.0, True),
    "elements over heads": (lambda t, h, q: 2.0 if q.numel() // h > 50 else 1.0, True),
    "a flattened size and its factors": (lambda t, h, q: 2.0 if q.transpose(1, 2).flatten(0, 1).shape[0] == q.shape[0] * h else 1.0, True),
    "a loop": (lambda t, h, q: 1.0 + sum(0.5 for _ in range(t // h)), None),
    "a number of a list": (lambda t, h, q: [1.0, 2.0, 3.0, 4.0, 5.0][t // h], None),
    "the length of a list": (lambda t, h, q: 1.0 + len([0] * (t // h)), None),
    "a key": (lambda t, h, q: {0: 1.0, 1: 2.0}.get(t // h, 3.0), None),
    "a text": (lambda t, h, q: 2.0 if f"{t // h}" == "1" else 1.0, None),
    "a root of a quotient": (lambda t, h, q: float(math.ceil(math.sqrt(t / h))), None),
    "a float that is an argument": (lambda t, h, q: q.new_full((), 1.5 * float(t // h)) + 1, None),
    "rounded to digits": (lambda t, h, q: round(t / h, 1) + 1, None),
    "a product of sizes that nobody reads": (lambda t, h, q: [1.0, t * h][0], True),
    "a flag and a member with a quotient": (lambda t, h, q: 2.0 if Member.TWO * (t / h) + True >= 3 else 1.0, False),
    "a flag with a length": (lambda t, h, q: 2.0 if t + True > h else 1.0, None),
    "numbers of the same types": (lambda t, h, q: 2.0 if type(t / h)(t) > type(h / 2)(h) else 1.0, False),
    "a mean of quotients": (lambda t, h, q: 2.0 if statistics.mean([t / h, 1.0]) > 1 else 1.0, False),
    "whether a quotient is whole": (lambda t, h, q: 2.0 if (t / h).is_integer() else 1.0, False),
    "a count of many steps": (lambda t, h, q: functools.reduce(lambda n, _: n + 1, range(3000), t) / 3000, True),
    "a mean of lengths": (lambda t, h, q: statistics.mean([t / 3, t * 0.5]) * (t / 2 + Member.TWO), True),
    "a root of the width of a head": (lambda t, h, q: math.sqrt(q.shape[-1]) * t, True),
}
CALLS = [(2, 2), (2, 4), (2, 9), (3, 3), (1, 3), (1, 4), (2, 8)]


class Weighed(nn.Module):
    """Attention-like heads between two linears, weighed with a number."""

    def __init__(self, made: Callable[[int, int, Tensor], float]) -> None:
        super().__init__()
        self.heads, self.made = HEADS, made
        self.query, self.out = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, DIM))
        return self.out((query.softmax(-1) * self.made(x.shape[1], self.heads, query)).flatten(-2))  # type: ignore[no-any-return]


def differences(made: Callable[[int, int, Tensor], float], length: int) -> tuple[list[tuple[int, int]], bool]:
    """Calls whose results are not those of one device, and whether the heads were cut; traced at one length."""

    def work(_: Any) -> tuple[list[tuple[int, int]], bool]:
        torch.manual_seed(0)
        one = Weighed(made).double().eval()
        torch.manual_seed(0)
        model = Weighed(made).double().eval()
        plan = autotp.plan(model, tp=2, example_inputs={"x": torch.ones(2, length, WIDTH, dtype=torch.float64)})
        parallelize_as(model, mesh(), plan)
        wrong = []
        with torch.no_grad():
            for shape in CALLS:
                x = torch.arange(WIDTH * shape[0] * shape[1], dtype=torch.float64).sin().view(*shape, WIDTH)
                if not torch.allclose(model(x), one(x), rtol=1e-9, atol=1e-12):
                    wrong.append(shape)
        return wrong, plan.params["query.weight"].layout.dim == 0

    found: tuple[list[tuple[int, int]], bool] = run("local", work, None, 2, 60)[0]
    return found


@pytest.mark.parametrize(("name", "length"), in_turns(MADE, (5, 3, 2, 1)))
def test_other_lengths_go_the_way_of_one_device(name: str, length: int) -> None:
    made, cut = MADE[name]
    wrong, heads = differences(made, length)
    assert not wrong
    assert cut is None or heads is cut


def test_without_the_check_they_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Search, "same_for_other_lengths", lambda *_: True)
    for name in ("truth of a rest", "elements", "a flag and a member with a quotient", "a text"):
        assert any(differences(MADE[name][0], length)[0] for length in (5, 3, 2, 1)), name


def test_numbers_keep_where_they_come_from() -> None:
    life = Life()
    t, h = TaggedInt(6, SizeRef(0, 1, 6), life), TaggedInt(4, AttrRef("a", "heads", 4), life)
    quotient = t / h
    made = [t % h, quotient, math.ceil(quotient), math.floor(quotient), round(quotient), -quotient, abs(h - t), t & 3, t << 1, t**2]
    made += [h**-0.5, t * 0.5, 1 / t, *divmod(t, h)]
    for number in made:
        assert isinstance(number, (TaggedInt, TaggedFloat))
        assert evaluate(number.expr, lambda leaf: leaf.value) == number
    assert evaluate((t / h).expr, lambda leaf: 12 if isinstance(leaf, SizeRef) else 2) == 6
    assert evaluate((t / h).expr, lambda leaf: 0) is None
    assert int(t / h) == 1 and isinstance(life.quotients[1], Arith)
    assert bool(t - 6) is False and ("ne", (t - 6).expr) in {c[:2] for c in life.compared}
    life.over = True
    assert type(t / h) is float and type(t % h) is int


def test_numbers_of_other_kinds_see_to_themselves() -> None:
    import numpy as np

    t = TaggedInt(6, SizeRef(0, 1, 6), Life())
    assert type(t * np.float64(2)) is np.float64 and type(np.float64(2) * t) is np.float64
    with pytest.raises(TypeError):
        t << 0.5  # type: ignore[operator]
    assert type(t / 4 * np.float64(2)) is np.float64 and type(np.float64(2) * (t / 4)) is np.float64
    for number in (t / 4 + True, True * (t / 4), t / 4 + Member.TWO, Member.TWO ** (t / 4), t + True, t * Member.TWO):
        assert isinstance(number, (TaggedInt, TaggedFloat)) and evaluate(number.expr, lambda leaf: leaf.value) == number
    for made, plain in ((type(t)(2), 2), (type(t)("ff", 16), 255), (type(t)(), 0), (type(t / 4)(2), 2.0), (type(t / 4)(t), 6.0)):
        assert made == plain and type(made) is type(plain)
