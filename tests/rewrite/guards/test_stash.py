"""Values that forwards leave on modules: whole ones are whole, of parts the model's own code goes on, and nobody else reads them."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import autotp
from autotp.testing import assert_equivalent
from autotp.testing.equivalence.compare import error_of
from autotp.testing.ranks.run import run
from tests.models.entry import built
from tests.models.repeated import OUTER, WIDTH
from tests.support.ranks import Pool, mesh

HOWS = ("attribute", "list", "dict", "tuple", "object", "append")


class Holder:
    value: Any = None


class Part(nn.Module):
    """Leaves what joins its two Linears, which is sharded, in one form or another; and a loss, which is whole."""

    def __init__(self, how: str = "attribute") -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER)
        self.how, self.log, self.kept, self.aux = how, [], None, None  # type: ignore[var-annotated]
        self.holder = Holder()

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).relu()
        if self.how == "append":
            self.log.append(h)
        elif self.how == "object":
            self.holder.value = h
        else:
            self.kept = {"list": [h], "dict": {"h": h}, "tuple": (h, 1)}.get(self.how, h)
        y = self.b(h)
        self.aux = (x * y).mean()
        return y


class Parent(nn.Module):
    """Reads what its blocks left, in the same call."""

    def __init__(self, how: str = "attribute") -> None:
        super().__init__()
        self.l, self.out, self.how = nn.ModuleList([Part(how) for _ in range(2)]), nn.Linear(WIDTH, OUTER), how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.l:
            x = x + block(x)
        return x + self.out(self.l[0].kept) if self.how == "attribute" else x


class Whole(nn.Module):
    """The root itself keeps what it made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER)
        self.kept: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = [self.a(x)]
        return self.b(self.kept[0].relu())


class Attention(nn.Module):
    """Keeps its keys and values for its next call."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = nn.Linear(OUTER, WIDTH), nn.Linear(OUTER, WIDTH), nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER)
        self.cache: Any = None

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        if self.cache is not None:
            k, v = (torch.cat([old, new], 2) for old, new in zip(self.cache, (k, v), strict=True))
        self.cache = k, v
        return self.o(torch.nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, :3]).sum(1, keepdim=True) + self.attention(x[:, 3:])


def x_of(seed: int = 0) -> Tensor:
    return torch.randn(2, 4, OUTER, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parallel(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    plain = model.double()
    made = copy.deepcopy(plain)
    autotp.parallelize(made, mesh(), example_inputs={"x": x_of()})
    return plain, made


def read_by_the_user(how: str) -> None:
    plain, made = parallel(built(Parent, how)())
    wanted, got = plain(x_of(1)), made(x_of(1))
    assert autotp.plan_of(made).local_share < 0.9
    assert error_of(wanted.detach(), got.detach()) < 1e-9
    name = {"append": "log", "object": "holder"}.get(how, "kept")
    for block in made.l:  # type: ignore[union-attr]
        with pytest.raises(autotp.AutoTPError, match=rf"l\.\d\.{name} is what a forward left there"):
            getattr(block, name)
    (wanted.sum() + sum(b.aux for b in plain.l)).backward()  # type: ignore[union-attr, misc]
    (got.sum() + sum(b.aux for b in made.l)).backward()  # type: ignore[union-attr, misc]  # a loss is whole, its gradients too
    grads = autotp.full_grads(made)
    assert all(error_of(p.grad, grads[n]) < 1e-9 for n, p in plain.named_parameters() if p.grad is not None)
    made.state_dict(), str(made)
    with torch.no_grad():  # tensors with a history cannot be copied
        for block in made.l:  # type: ignore[union-attr]
            block.__dict__["log"].clear()
        made(x_of(1))
        assert error_of(plain(x_of(2)), copy.deepcopy(made)(x_of(2))) < 1e-9
    if name == "kept":
        made.l[0].kept = None  # type: ignore[union-attr, index]
        assert made.l[0].kept is None  # type: ignore[union-attr, index]
        del made.l[0].kept  # type: ignore[union-attr, index]
        with pytest.raises(AttributeError):
            _ = made.l[0].kept  # type: ignore[union-attr, index]


def on_rank(how: str) -> None:
    read_by_the_user(how)


@pytest.mark.parametrize("how", HOWS)
def test_a_part_is_not_for_the_user(how: str) -> None:
    run("local", on_rank, how, 2, 120.0)


@pytest.mark.parametrize("world", [2, 3])
def test_processes(pool: Pool, world: int) -> None:
    pool.run(read_by_the_user, "attribute", world=world)


def kept_by_the_root(_: Any) -> None:
    plain, made = parallel(built(Whole)())
    plain(x_of(1)), made(x_of(1))
    assert error_of(plain.kept[0].detach(), made.kept[0].detach()) < 1e-9  # type: ignore[index]


def test_the_root_keeps_whole_values() -> None:
    run("local", kept_by_the_root, None, 2, 120.0)


def cached(_: Any) -> None:
    plain, made = parallel(built(Decoder)())
    assert autotp.plan_of(made).local_share < 0.6
    for step in range(3):
        assert error_of(plain(x_of(step)).detach(), made(x_of(step)).detach()) < 1e-9
    with pytest.raises(autotp.AutoTPError, match=r"attention\.cache"):
        _ = made.attention.cache  # type: ignore[union-attr]


def test_a_cache_stays_sharded() -> None:
    run("local", cached, None, 2, 120.0)
    for tp in (2, 4):
        assert_equivalent(built(Decoder), tp=tp, inputs={"x": x_of()})


class Emptied(Part):
    """Keeps what it makes of a table in eval mode, and empties the cache when it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.cache = nn.Parameter(torch.randn(WIDTH)), dict[str, Tensor]()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        if self.cache:
            self.cache = {}
        return self

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return self.b(self.a(x).relu() * self.table.exp())  # type: ignore[no-any-return]
        if "scale" not in self.cache:
            self.cache["scale"] = self.table.exp()
        return self.b(self.a(x).relu() * self.cache["scale"])  # type: ignore[no-any-return]


class Emptying(nn.Module):
    """Has one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Emptied()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)  # type: ignore[no-any-return]


def emptied(_: None) -> None:
    made = autotp.parallelize(built(Emptying)().double(), mesh(), example_inputs={"x": x_of()})
    assert autotp.plan_of(made).local_share < 0.6
    made.eval()(x_of())
    with pytest.raises(autotp.AutoTPError, match="cache"):
        _ = made.inner.cache
    made.train()
    assert made.inner.__dict__["cache"] == {}


def test_train_empties_a_cache() -> None:
    run("local", emptied, None, 2, 120.0)


def test_plans_with_stashes_are_data() -> None:
    plan = autotp.plan(built(Parent)(), tp=2, example_inputs={"x": x_of().float()})
    assert pickle.loads(pickle.dumps(plan)) == plan
    assert {m.path: m.stashed for m in plan.modules if m.stashed} == {"l.0": ("kept",), "l.1": ("kept",)}
