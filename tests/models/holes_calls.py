"""Modules of `holes` about calls: arguments, results, containers, repeats, forwards called past the hooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.holes_parts import OUTER, Gate, Mid, Norm


class Pair(NamedTuple):
    """What a part takes or returns."""

    first: Tensor
    second: Tensor


@dataclass
class Box:
    """The same as a dataclass."""

    first: Tensor
    more: list[Tensor]


class Twice(Norm):
    """One tensor as two arguments of a part; `how` says in what form."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.g = how, _Taking() if how in ("list", "dict", "nested", "named_tuple") else Gate()

    def forward(self, x: Tensor) -> Tensor:
        h = self.n(x)
        match self.how:
            case "positional":
                return x + self.g(h, h)
            case "keyword":
                return x + self.g(x=h, y=h)
            case "mixed":
                return x + self.g(h, y=h)
            case "view":
                return x + self.g(h, h.view(2, 6, OUTER))
            case "list":
                return x + self.g([h, h])
            case "dict":
                return x + self.g({"a": h, "b": h})
            case "nested":
                return x + self.g([{"a": h}, (h,)])
            case "named_tuple":
                return x + self.g(Pair(h, h))
        raise AssertionError(self.how)


class _Taking(Gate):
    """The two tensors from a container."""

    def forward(self, given: Any) -> Tensor:  # type: ignore[override]
        if isinstance(given, dict):
            given = list(given.values())
        first, second = (v["a"] if isinstance(v, dict) else v[0] if isinstance(v, tuple) else v for v in given)
        return super().forward(first, second)


class Returned(nn.Module):
    """A part whose result is a container; the parent reads it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.m = how, Mid()

    def forward(self, x: Tensor) -> Any:
        m = self.m
        h = m.a(x)
        y = m.b(torch.tanh(h))
        match self.how:
            case "tuple":
                return y, (y * 2, [y.sum(-1)])
            case "named_tuple":
                return Pair(y, h.mean(-1))
            case "inner":
                return {"y": y, "inner": h}
            case "inner_in_list":
                return {"y": y, "all": [h, {"h": h.relu()}]}
        raise AssertionError(self.how)


class InBoxes(nn.Module):
    """A dataclass between two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = _Up(), _Down()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


class _Up(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.c = nn.Linear(OUTER, 12), nn.Linear(OUTER, 12)

    def forward(self, x: Tensor) -> Box:
        return Box(self.a(x), [self.c(x)])


class _Down(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(12, OUTER)

    def forward(self, box: Box) -> Tensor:
        return self.b(box.first * box.more[0].softmax(-1))


class Stashed(nn.Module):
    """A part leaves a value on itself and the parent reads it."""

    def __init__(self, read: bool) -> None:
        super().__init__()
        self.m, self.read = _Stashing(), read

    def forward(self, x: Tensor) -> Tensor:
        y = self.m(x)
        return y + self.m.kept.softmax(-1).square().sum(-1, keepdim=True) if self.read else y


class _Stashing(Mid):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = self.a(x)
        return self.b(self.kept.relu())


class Direct(nn.Module):
    """A forward called past `__call__`."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.m = how, Mid(F.gelu)
        self.bound = self.m.b.forward

    def forward(self, x: Tensor) -> Tensor:
        m = self.m
        match self.how:
            case "last":
                return m.b.forward(F.gelu(m.a(x)))
            case "first":
                return m.b(F.gelu(m.a.forward(x)))
            case "part":
                return x + m.forward(x)
            case "type":
                return type(m.b).forward(m.b, F.gelu(m.a(x)))
            case "type_of_part":
                return x + type(m).forward(m, x)
            case "class":
                return nn.Linear.forward(m.b, F.gelu(m.a(x)))
            case "call":
                return m.b.__call__(F.gelu(m.a(x)))
            case "mapped":
                return next(map(m, [x]))
        raise AssertionError(self.how)


class Blocks(nn.Module):
    """Repeats of a pair of Linears, held in `form`; `differ` makes the second meet a softmax where the first meets a relu."""

    def __init__(self, form: str, differ: bool) -> None:
        super().__init__()
        self.form, self.differ = form, differ
        pairs = [(nn.Linear(OUTER, 12), nn.Linear(12, OUTER)) for _ in range(2)]
        match form:
            case "nested":
                self.l = nn.ModuleList([nn.ModuleList(p) for p in pairs])
            case "dict":
                self.l = nn.ModuleDict({str(i): nn.ModuleDict({"a": a, "b": b}) for i, (a, b) in enumerate(pairs)})
            case "sequential":
                self.l = nn.Sequential(*(nn.Sequential(*p) for p in pairs))
            case "flat":
                self.l = nn.ModuleList([m for p in pairs for m in p])

    def pairs(self) -> list[tuple[nn.Module, nn.Module]]:
        match self.form:
            case "dict":
                return [(self.l[k]["a"], self.l[k]["b"]) for k in self.l]
            case "flat":
                return [(self.l[0], self.l[1]), (self.l[2], self.l[3])]
        return [(p[0], p[1]) for p in self.l]

    def forward(self, x: Tensor) -> Tensor:
        for i, (a, b) in enumerate(self.pairs()):
            h = a(x)
            x = x + b(h.softmax(-1) if self.differ and i else h.relu())
        return x


class Functions(nn.Module):
    """Blocks that are alike but for a function that they hold."""

    def __init__(self, *functions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.l = nn.ModuleList([Mid(f) for f in functions])

    def forward(self, x: Tensor) -> Tensor:
        for m in self.l:
            x = x + m(x)
        return x


class Otherwise(nn.Module):
    """Alike blocks of which the second is called by another method, or its result is used otherwise."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.l = how, nn.ModuleList([_Methods() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.l
        x = x + first(x)
        match self.how:
            case "method":
                return x + second.run(x)
            case "argument":
                return x + second(x, True)
            case "keyword":
                return x + second(x, soft=True)
            case "result":
                return x * second(x).softmax(-1)
            case "again":
                return x + second(x) + second(x * 2)
        raise AssertionError(self.how)


class _Methods(Mid):
    def forward(self, x: Tensor, soft: bool = False) -> Tensor:
        return self.b(self.a(x).softmax(-1) if soft else self.a(x).relu())

    def run(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).softmax(-1))


class Residual(nn.Module):
    """In-place sums on results and arguments."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.m, self.n = how, Mid(F.gelu), Mid(F.gelu)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        match self.how:
            case "result":
                return self.m(x).add_(x)
            case "argument":
                x += self.m(x)
                return x + self.n(x)
            case "both":
                y = self.m(x)
                y *= 0.5
                y += self.n(x)
                return y
            case "row":
                y = self.m(x)
                y[:, 0] = 0
                return y + self.n(x)
        raise AssertionError(self.how)


FACTORIES: dict[str, Callable[[], nn.Module]] = {
    **{f"twice_{how}": partial(Twice, how) for how in ("positional", "keyword", "mixed", "view", "list", "dict", "nested", "named_tuple")},
    **{f"returns_{how}": partial(Returned, how) for how in ("tuple", "named_tuple", "inner", "inner_in_list")},
    "dataclass_between_parts": InBoxes,
    "stashed": partial(Stashed, False),
    "stashed_and_read": partial(Stashed, True),
    **{f"forward_{how}": partial(Direct, how) for how in ("last", "first", "part", "type", "type_of_part", "class", "call", "mapped")},
    **{
        f"repeats_{form}{'_differ' if differ else ''}": partial(Blocks, form, differ)
        for form in ("nested", "dict", "sequential", "flat")
        for differ in (False, True)
    },
    "functions_alike": partial(Functions, F.gelu, F.gelu, F.gelu),
    "functions_differ": partial(Functions, F.relu, lambda h: h.softmax(-1)),
    "functions_differ_late": partial(Functions, F.relu, F.relu, lambda h: h.flip(-1)),
    **{f"second_{how}": partial(Otherwise, how) for how in ("method", "argument", "keyword", "result", "again")},
    **{f"in_place_{how}": partial(Residual, how) for how in ("result", "argument", "both", "row")},
}
SHARDED = frozenset(
    {
        "twice_positional",
        "twice_keyword",
        "twice_mixed",
        "returns_tuple",
        "forward_part",
        "forward_call",
        "forward_mapped",
        "repeats_nested",
        "repeats_dict",
        "repeats_sequential",
        "repeats_flat",
        "functions_alike",
        "second_again",
        "in_place_argument",
    }
)
ALIKE = frozenset(
    {
        "twice_mixed",
        "twice_list",
        "twice_dict",
        "returns_inner",
        "stashed",
        "forward_first",
        "forward_type_of_part",
        "forward_class",
        "forward_mapped",
        "repeats_dict",
        "repeats_sequential_differ",
        "repeats_flat",
        "repeats_flat_differ",
        "functions_differ",
        "second_keyword",
        "in_place_row",
    }
)
