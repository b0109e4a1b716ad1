"""A model with one region of each kind, and what changes it after it was made parallel."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.api import parallelize_as
from autotp.testing.ranks.run import run
from tests.support.ranks import mesh

WIDTH, INNER = 16, 24


class Config:
    """Settings that all blocks share."""

    def __init__(self) -> None:
        self.act, self.scale, self.note, self.heads = "gelu", 1.0, "", 4


class Attention(nn.Module):
    """Heads whose number is read from the config, so that it becomes local in a copy of it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], self.config.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q * self.config.scale, k, v)
        return self.o(y.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Takes a path by a string of the config and a flag of its own."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config, self.calls, self.rate, self.flip = config, 0, 0.5, False
        self.order, self.seen, self.function = [0, 1], [], torch.tanh
        self.up, self.act, self.down = nn.Linear(WIDTH, INNER), nn.GELU(), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        h = self.up(x)
        h = self.act(h) if self.config.act == "gelu" else h.softmax(-1)
        self.seen.append(len(self.order))
        return self.down(self.function(h).flip(-1) if self.flip else self.function(h) * self.rate)


class Block(nn.Module):
    def __init__(self, config: Config, parallel: bool) -> None:
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(WIDTH), Attention(config), Mlp(config)
        self.drop, self.join, self.parallel = nn.Dropout(0.1), nn.Dropout(0.0), parallel

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        if self.parallel:
            return x + self.join(self.attention(h)) + self.mlp(h)
        x = x + self.drop(self.attention(h))
        return x + self.mlp(x)


class Core(nn.Module):
    def __init__(self, config: Config, parallel: bool) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList([Block(config, parallel) for _ in range(2)])
        self.spare = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Runs on whole values: another path is right, too."""
        for block in self.blocks:
            x = block(x)
        return x if isinstance(self.spare, nn.Identity) else self.spare(x)


class Model(nn.Module):
    def __init__(self, parallel: bool = False) -> None:
        super().__init__()
        self.config = Config()
        self.core, self.head = Core(self.config, parallel), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x))


def inputs() -> Tensor:
    return torch.randn(2, 3, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def build(parallel: bool = False) -> Any:
    """The model of one device."""
    torch.manual_seed(0)
    return Model(parallel).double().eval()


@functools.cache
def planned(parallel: bool, tp: int) -> autotp.Plan:
    """Its plan, made once."""
    return autotp.plan(build(parallel), tp=tp, example_inputs={"x": inputs()}, check="graph")


Use = Callable[[Any], Tensor]
Change = Callable[[Any], object]


def forward(model: Any) -> Tensor:
    return model(inputs())


def gradients(model: Any) -> Tensor:
    """Of the first norm, which is before every region."""
    model.zero_grad()
    model(inputs()).sin().sum().backward()
    return first_gradient(model)


def first_gradient(model: Any) -> Tensor:
    grad = next(p.grad for name, p in model.named_parameters() if name.endswith("norm.weight"))
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def outcome(change: Change, use: Use = forward, *, tp: int = 2, parallel: bool = False) -> str:
    """ "equal" where a changed parallel model still does what the changed model of one device does; else the error of `autotp`, the same on
    all ranks.
    """
    whole = build(parallel)
    change(whole)
    torch.manual_seed(1)
    wanted = use(whole).detach()
    made = planned(parallel, tp)

    def rank(_: object) -> str:
        model = parallelize_as(build(parallel), mesh(), made)
        try:
            change(model)
            torch.manual_seed(1)
            got = use(model).detach()
        except autotp.AutoTPError as error:
            return str(error)
        error = float((got - wanted).abs().max() / wanted.abs().max()) if got.shape == wanted.shape else 1.0
        return "equal" if error < 1e-9 else f"other numbers: {error:.1e}"

    first, *others = run("local", rank, None, tp, 120.0)
    assert all(other == first for other in others), (first, others)
    return str(first)
