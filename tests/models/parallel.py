"""Blocks with a parallel residual: two regions side by side whose results are added, and variants that only look so."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.custom import HEADS, SIZE, WIDTH, Two

Sum = Callable[["ParallelBlock", Tensor, Tensor, Tensor], Tensor]


def _inplace(self: ParallelBlock, x: Tensor, a: Tensor, m: Tensor) -> Tensor:
    m += a
    return m + x


#: Sums whose summands can be reduced together: (the block, its input, the attention's result, the mlp's) → its result.
JOINT: dict[str, Sum] = {
    "plain": lambda self, x, a, m: a + m + x,
    "residual_first": lambda self, x, a, m: x + a + m,
    "inplace": _inplace,
    "alpha_elsewhere": lambda self, x, a, m: torch.add(a + m, x, alpha=2),
    "no_dropout": lambda self, x, a, m: x + self.none(a) + self.none(m),
    "a_number": lambda self, x, a, m: (a + 3) + m + x,
    "scaled_together": lambda self, x, a, m: x + 0.5 * (a + m),
}

#: Sums whose summands cannot, with a part of the note that says why.
APART: dict[str, tuple[Sum, str]] = {
    "scaled": (lambda self, x, a, m: x + 0.5 * a + m, "a.b passes mul"),
    "alpha": (lambda self, x, a, m: torch.add(x + m, a, alpha=2), "a.b is multiplied by 2 in the sum"),
    "subtracted": (lambda self, x, a, m: x + a - m, "m.b is multiplied by -1 in the sum"),
    "used_again": (lambda self, x, a, m: x + a + m + a.tanh(), "a.b is used 2 times"),
    "doubled": (lambda self, x, a, m: x + (a + a) + m, "a.b is used twice in add"),
    "detached": (lambda self, x, a, m: x + a.detach() + m, "a.b passes detach"),
    "dropout": (lambda self, x, a, m: x + self.drop(a) + m, "a.b passes a dropout with p = 0.1"),
    "functional_dropout": (lambda self, x, a, m: x + a + F.dropout(m, 0.1, self.training), "m.b passes a dropout with p = 0.1"),
    "only_in_training": (lambda self, x, a, m: x + (self.drop(a) if self.training else a) + m, "a.b passes a dropout with p = 0.1"),
}


class Attend(nn.Module):
    """Attention whose code runs on a shard as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * SIZE, bias=False) for _ in range(3))
        self.b = nn.Linear(HEADS * SIZE, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.b(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Switch:
    """Truth that no one can see change."""

    __slots__ = ("on",)

    def __init__(self) -> None:
        self.on = False

    def __bool__(self) -> bool:
        return self.on


class ParallelBlock(nn.Module):
    """One norm, two regions, one sum. `kind` is a key of JOINT or APART; `norms` = 2 gives the mlp a norm of its own."""

    def __init__(self, kind: str = "plain", norms: int = 1) -> None:
        super().__init__()
        self.n = nn.LayerNorm(WIDTH)
        self.o = nn.LayerNorm(WIDTH) if norms == 2 else None
        self.a, self.m = Attend(), Two()
        self.none, self.drop = nn.Dropout(0.0), nn.Dropout(0.1)
        self.kind = kind
        self.skips = Switch()

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        a = self.a(y)
        if self.skips:
            return x + a
        m = self.m(y if self.o is None else self.o(x))
        add = JOINT[self.kind] if self.kind in JOINT else APART[self.kind][0]
        return add(self, x, a, m)


class ThreeBlock(nn.Module):
    """Three regions in one sum."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.a, self.m, self.k = nn.LayerNorm(WIDTH), Attend(), Two(), Two(inner=64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        return x + self.a(y) + (self.m(y) + self.k(y))


class SharedExit(nn.Module):
    """Both results leave through one dropout module, as in phi: its slot is crossed twice."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.a, self.m, self.drop = nn.LayerNorm(WIDTH), Attend(), Two(), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        return self.drop(self.a(y)) + self.drop(self.m(y)) + x


class Residual(nn.Module):
    """The residual goes into the mlp's module, where the sum is."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.a, self.m = nn.LayerNorm(WIDTH), Attend(), Inner()

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        return self.m(y, x + self.a(y))


class Inner(nn.Module):
    """An mlp that adds to what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.two = Two()

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        return residual + self.two(y)


class Twins(nn.Module):
    """Alike regions in a list: the second is not traced, its plan is a copy of the first's."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.parts = nn.LayerNorm(WIDTH), nn.ModuleList(Two() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n(x)
        return x + self.parts[0](y) + self.parts[1](y)


class OneTwice(nn.Module):
    """One module, called twice, in one sum with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.n, self.o, self.m = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH), Two()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.m(self.n(x)) + self.m(self.o(x))


class Stack(nn.Module):
    """Blocks behind a norm, so that the first block's gradient is needed. `returns` also gives back the first block's attention."""

    def __init__(self, block: Callable[[], nn.Module] = ParallelBlock, depth: int = 2) -> None:
        super().__init__()
        self.first, self.blocks = nn.LayerNorm(WIDTH), nn.ModuleList(block() for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


class Returned(nn.Module):
    """A parallel residual at the root that also returns one of its summands."""

    def __init__(self, returns: bool = True) -> None:
        super().__init__()
        self.n, self.a, self.m, self.returns = nn.LayerNorm(WIDTH), Attend(), Two(), returns

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.n(x)
        a = self.a(y)
        found = {"y": x + a + self.m(y)}
        return {**found, "a": a} if self.returns else found
