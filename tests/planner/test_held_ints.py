"""Head counts reach the code in many ways, and are followed: the attention is cut by heads whichever it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import autotp
from autotp.axes import atoms
from autotp.errors import ChangedError
from autotp.planner.local_ints import _is_length
from autotp.planner.placements import NONE
from autotp.testing import assert_equivalent
from autotp.testing.ranks.threads import ThreadRanks
from autotp.trace.ints import SizeRef
from autotp.trace.tags import Tagger
from tests.support.slow import in_turns

D, HEADS = 24, 6
X = torch.randn(2, 5, D, dtype=torch.float64)


class Attention(nn.Module):
    """Attention of which a class below says how a projection is split into heads."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.hold()

    def hold(self) -> None:
        """Puts the number of heads somewhere."""

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        """Returns (b, n, heads, width)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (self.split(f(x), b, n).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class InDict(Attention):
    def hold(self) -> None:
        self.sizes = {"heads": HEADS, "name": "a"}

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, n, self.sizes["heads"], -1)


class InDictOfText(Attention):
    def hold(self) -> None:
        self.sizes, self.number = {"heads1": HEADS}, 1

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, n, self.sizes[f"heads{self.number}"], -1)


class Sizes(NamedTuple):
    heads: int
    width: tuple[int, ...]


class InTuples(Attention):
    def hold(self) -> None:
        self.axes, self.sizes = (("h", HEADS), ("d", D // HEADS)), Sizes(HEADS, (D // HEADS,))

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, n, self.axes[0][1], self.axes[1][1]).view(b, n, self.sizes.heads, self.sizes.width[0])


@dataclass(frozen=True, slots=True)
class Settings:
    heads: int = HEADS
    width: int = D


class InSlots(Attention):
    def hold(self) -> None:
        self.settings = Settings()

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, n, self.settings.heads, self.settings.width // self.settings.heads)


class InClosure(Attention):
    def hold(self) -> None:
        heads = HEADS
        self.by_heads = lambda x, b, n: _split(x, b, n, heads=heads)

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return self.by_heads(x, b, n)


class InPartial(Attention):
    def hold(self) -> None:
        self.by_heads = partial(_split, heads=HEADS)

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return self.by_heads(x, b, n)


def _split(x: Tensor, b: int, n: int, heads: int) -> Tensor:
    return x.view(b, n, heads, -1)


class ThroughFloat(Attention):
    def hold(self) -> None:
        self.heads, self.width = HEADS, D

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, n, self.heads, int(self.width / self.heads))


class FromSizeThroughFloat(Attention):
    def hold(self) -> None:
        self.each = D // HEADS

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, n, int(x.shape[-1] / self.each), self.each)


class OfClass(Attention):
    heads = HEADS

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, n, self.heads, -1)


class Written(Attention):
    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.reshape(b * n, 24).view(b, n, 6, 4)


class Rooted(Attention):
    """The scale is a root of the width of a head."""

    def hold(self) -> None:
        self.heads = HEADS

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        heads = x.view(b, n, self.heads, -1)
        return heads / math.sqrt(heads.shape[-1])


FOLLOWED = (InDict, InDictOfText, InTuples, InSlots, InClosure, InPartial, ThroughFloat, FromSizeThroughFloat, OfClass, Written, Rooted)


@pytest.mark.parametrize(("model", "tp"), in_turns(FOLLOWED, (2, 3, 4)))
def test_ints_are_followed(model: type[Attention], tp: int) -> None:
    found = assert_equivalent(model, tp=tp, inputs=X, steps=1)
    assert set(found.plan.replicated) == {"o.bias"}


class RootOfWidth(Attention):
    """The scale is a root of the whole width, which a rank does not have."""

    def hold(self) -> None:
        self.heads = HEADS

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, n, self.heads, -1) / math.sqrt(x.shape[-1])


class OnePlace(Attention):
    """One line splits a rank's part, and a whole value."""

    def split(self, x: Tensor, b: int, n: int) -> Tensor:
        return x.view(b, n, 6, -1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.split(x, *x.shape[:2]).flatten(2))


@pytest.mark.parametrize(("model", "why"), [(RootOfWidth, "makes a float of"), (OnePlace, "only some of the calls from one place")])
def test_what_is_lost_stays_whole_with_a_reason(model: type[Attention], why: str) -> None:
    plan = assert_equivalent(model, tp=2, inputs=X).plan
    assert why in plan.replicated["q.weight"]


def test_tags_are_what_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without them a number in a dict is one that the code writes, and that is changed where it is used."""

    def local(model: type[Attention]) -> tuple[int, int]:
        plan = autotp.plan(model(), tp=2, example_inputs={"x": X.float()}, check="graph")
        return sum(len(m.attributes) for m in plan.modules), sum(len(m.sites) for m in plan.modules)

    assert local(InDict) == (1, 0)
    monkeypatch.setattr(Tagger, "_dict", lambda *_: None)
    assert local(InDict) == (0, 1)


def _changed(_: Any) -> list[str]:
    found = []
    for model, change in ((InDict(), _in_dict), (InPartial(), _in_partial)):
        autotp.parallelize(model, init_device_mesh("cpu", (2,), mesh_dim_names=("tp",)), example_inputs={"x": X.float()}, check="graph")
        model(X.float())
        change(model)
        try:
            model(X.float())
        except ChangedError as error:
            found.append(str(error).partition(" ")[0])
    return found


def _in_dict(model: Any) -> None:
    model.sizes["heads"] = 4


def _in_partial(model: Any) -> None:
    model.by_heads = partial(_split, heads=12)


def test_changes_afterwards_are_refused() -> None:
    ranks = ThreadRanks(2, 60.0, turns=True)
    try:
        assert ranks.run(_changed, None) == [["sizes", "by_heads"]] * 2
    finally:
        ranks.stop()


def test_a_size_that_no_axis_follows_is_a_length() -> None:
    width = tuple(atoms.new(8))
    axes, of_parameters = SimpleNamespace(dims={1: ((), width), 2: ((),)}), set(width)
    space = SimpleNamespace(
        axes=axes,
        leaves={1: (NONE, frozenset(width)), 2: (NONE,)},
        of_parameters=of_parameters,
        varying={},
        is_parameter=lambda key: key == 2,
    )
    labels = SimpleNamespace(cuts={})
    sizes = (SizeRef(1, 0, 3), SizeRef(1, 0, 1), SizeRef(1, 1, 8), SizeRef(2, 0, 1))
    found = [_is_length(space, labels, size) for size in sizes]  # type: ignore[arg-type]
    assert found == [True, True, False, False]  # rows that a mask selects; a batch of one; the width of a parameter; a parameter of one row
