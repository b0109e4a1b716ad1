"""Models of blocks that are built alike and not used alike, or that leave something behind for whoever called them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

OUTER, WIDTH = 5, 16


class Pair(nn.Module):
    """Two Linears with a function between; `other` is the same with softmax."""

    def __init__(self, act: Callable[[Tensor], Tensor] = F.relu, index: int = 0) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER)
        self.act, self.index = act, index

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.act(self.a(x)))

    def other(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).softmax(-1))


def softmax(h: Tensor, scale: float = 1.0) -> Tensor:
    return (h * scale).softmax(-1)


class Nested(nn.Module):
    """Containers that are never called themselves: the second pair meets softmax."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        parts = {
            "list": lambda: nn.ModuleList([nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER)]),
            "dict": lambda: nn.ModuleDict({"a": nn.Linear(OUTER, WIDTH), "b": nn.Linear(WIDTH, OUTER)}),
            "sequential": lambda: nn.Sequential(nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER)),
            "deep": lambda: nn.ModuleList([nn.ModuleList([nn.Linear(OUTER, WIDTH)]), nn.ModuleList([nn.Linear(WIDTH, OUTER)])]),
        }
        self.l = nn.ModuleList([parts[kind]() for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for i, pair in enumerate(self.l):
            a, b = (pair["a"], pair["b"]) if self.kind == "dict" else (pair[0], pair[1])  # type: ignore[index]
            if self.kind == "deep":
                a, b = a[0], b[0]
            h = a(x)
            x = x + b(h.softmax(-1) if i == 1 else h.relu())
        return x


class Used(nn.Module):
    """Three blocks built alike; what is done with the second says `how`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.l = nn.ModuleList([Pair() for _ in range(3)])
        if how == "hook":
            self.l[1].a.register_forward_hook(halve)
        if how == "tied":
            self.l[1].b.weight = self.l[2].a.weight.__class__(self.l[1].b.weight.detach().clone())
            self.head = nn.Linear(WIDTH, OUTER)
            self.head.weight = self.l[1].b.weight

    def forward(self, x: Tensor) -> Tensor:
        kept = []
        for i, block in enumerate(self.l):
            x = x + (self.special(block, x) if i == 1 else block(x))
            kept.append(x)
        return x + kept[0]

    def special(self, block: Any, x: Tensor) -> Tensor:
        if self.how == "method":
            return block.other(x)
        if self.how == "forward":
            return block.forward(x)
        if self.how == "past":
            return block(x) + block.b(block.a(x).softmax(-1))
        if self.how == "weight":
            return block(x) + F.linear(F.linear(x, block.a.weight).softmax(-1), block.b.weight)
        if self.how == "sizes":
            return block(x) * block.a.weight.shape[0]
        if self.how == "softmax":
            return block(x).softmax(-1)
        if self.how == "in place":
            y = block(x)
            y.mul_(2.0)
            y[..., 0] = 1.0
            return y
        if self.how == "other arguments":
            return block(x.flatten(0, 1)).view(x.shape)
        if self.how == "tied":
            return block(x) + self.head(F.pad(x, (0, WIDTH - OUTER)))
        return block(x)


def halve(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    return result.flip(-1)


class Acts(nn.Module):
    """Blocks alike but for the function that they hold."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        first, second = acts(kind)
        self.l = nn.ModuleList([Pair(first), Pair(second)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.l:
            x = x + block(x)
        return x


class Callable_:
    """A function object."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, h: Tensor) -> Tensor:
        return getattr(h, self.name)(*(-1,) if self.name == "softmax" else ())  # type: ignore[no-any-return]

    def bound(self, h: Tensor) -> Tensor:
        return self(h)


def acts(kind: str) -> tuple[Any, Any]:
    def closure(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda h: f(h)

    def default(name: str) -> Callable[[Tensor], Tensor]:
        return lambda h, name=name: getattr(h, name)(*(-1,) if name == "softmax" else ())

    pairs: dict[str, tuple[Any, Any]] = {
        "functions": (F.relu, softmax),
        "lambdas": (lambda h: h.relu(), lambda h: h.softmax(-1)),
        "closures": (closure(F.relu), closure(softmax)),
        "defaults": (default("relu"), default("softmax")),
        "partials": (functools.partial(F.leaky_relu, negative_slope=0.1), functools.partial(softmax, scale=2.0)),
        "objects": (Callable_("relu"), Callable_("softmax")),
        "methods": (Callable_("relu").bound, Callable_("softmax").bound),
    }
    return pairs[kind]


class Counting(nn.Module):
    """Blocks that know their number, and some do something with it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.l = nn.ModuleList([Numbered(how, i) for i in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.l:
            x = x + block(x)
        return x


class Numbered(nn.Module):
    def __init__(self, how: str, index: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER)
        self.how, self.layer_idx = how, index

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        odd = {
            "compare": lambda: self.layer_idx == 1,
            "compute": lambda: self.layer_idx % 2,
            "set": lambda: self.layer_idx in {1},
            "list": lambda: self.layer_idx in [1],
            "not at all": lambda: False,
        }[self.how]()
        return self.b(h.softmax(-1) if odd else h.relu())


class Leaves(nn.Module):
    """Blocks that leave a loss on themselves, which their parent collects."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.l = nn.ModuleList([Leaving(how) for _ in range(3)])
        if how == "shared list":
            for block in self.l:
                block.log = self.l[0].log

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.how == "shared list":
            self.l[0].log.clear()
        for block in self.l:
            x = x + block(x)
        if self.how == "shared list":
            return x, torch.stack([t.mean() for t in self.l[0].log]).sum()
        return x, torch.stack([block.inner.aux if self.how == "inside" else block.aux for block in self.l]).sum()


class Leaving(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b, self.inner = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER), nn.Module()
        self.log: list[Tensor] = []
        self.aux: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.relu(self.a(x)))
        if self.how == "shared list":
            self.log.append(y)
        elif self.how == "inside":
            self.inner.aux = y.square().mean()
        else:
            self.aux = y.square().mean()
        return y


class Writes(nn.Module):
    """Blocks that write into what they are given: a list, or the tensor itself."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.l = nn.ModuleList([Writing(how) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        x, seen = x.clone(), []
        start = x
        for block in self.l:
            x = x + block(x, seen)
        return x + start + sum(seen, torch.zeros(()))


class Writing(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER)

    def forward(self, x: Tensor, seen: list[Tensor]) -> Tensor:
        y = self.b(F.relu(self.a(x)))
        if self.how == "list":
            seen.append(y)
        else:
            x += 1.0
        return y


class Idle(nn.Module):
    """The last block runs only where `all_blocks` is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.ModuleList([Pair() for _ in range(3)])

    def forward(self, x: Tensor, all_blocks: bool = False) -> Tensor:
        for block in self.l if all_blocks else self.l[:2]:
            x = x + block(x)
        return x


class Hooked(nn.Module):
    """A hook on each block scales what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.ModuleList([Pair() for _ in range(3)])
        for block in self.l:
            block.register_forward_hook(twice)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.l:
            x = x + block(x)
        return x


def twice(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    return result * 2


class Gated(nn.Module):
    """What is behind the gate is not traced: a parameter, a Linear, a block."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, OUTER)
        self.g = nn.Parameter(torch.randn(WIDTH))
        self.extra = nn.Linear(OUTER, WIDTH)
        self.block = Pair()

    def forward(self, x: Tensor, gate: bool = False) -> Tensor:
        x = self.b(self.a(x).relu())
        if gate:
            x = x * self.g.sum() + self.extra(x).sum(-1, keepdim=True) * self.g.mean() + self.block(x)
        return x


def deep_copy(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)
