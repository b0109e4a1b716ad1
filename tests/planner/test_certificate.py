"""Code that computes with the size of a shard: the planner leaves it whole and says why, and it is the certificate that knows.

Each module joins two Linears by one expression that reads a width. The same modules planned with a replay that always agrees
show which of them nothing else protects; the others are refused by an int that cannot become local.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp import Plan
from autotp.errors import PlanError
from autotp.plan.conversions import Op
from autotp.planner import make_plan
from autotp.testing import assert_equivalent
from autotp.trace import run

OUTER, WIDTH, LAST = 5, 16, 5


class Between(nn.Module):
    """Linear, relu, an expression, Linear."""

    def __init__(self, expression: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.expression = nn.Linear(OUTER, WIDTH), nn.Linear(WIDTH, LAST), expression

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.expression(F.relu(self.a(x))))


def by_branch(h: Tensor) -> Tensor:
    return h * 2 if h.shape[-1] > 10 else h - 1


def by_loop(h: Tensor) -> Tensor:
    for _ in range(h.shape[-1] // 8):
        h = h * 2
    return h


def by_table(h: Tensor) -> Tensor:
    return h * torch.tensor([1.0, 2.0, 3.0])[min(h.shape[-1] // 8, 2)]


def by_literal_heads(h: Tensor) -> Tensor:
    return h.view(*h.shape[:-1], 4, -1).softmax(-1).flatten(-2)


#: The width as a number: only the replay sees it.
NUMBERS: dict[str, Callable[[Tensor], Tensor]] = {
    "divided": lambda h: h / h.shape[-1],
    "under a root": lambda h: h * math.sqrt(h.size(-1)),
    "numel": lambda h: h / h.numel(),
    "length": lambda h: h * len(h[0, 0]),
    "bytes": lambda h: h * (h.nbytes / 1000),
    "branch": by_branch,
    "loop": by_loop,
    "table": by_table,
    "as a tensor": lambda h: h * torch.tensor(float(h.shape[-1])),
    "exponent": lambda h: h.abs() ** (h.shape[-1] / 16),
    "clamped": lambda h: h.clamp(max=h.shape[-1] / 16),
}
#: The width makes another tensor, or is a literal where a local one is needed: rules and the localiser stop these too.
SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "arange": lambda h: h * torch.arange(h.shape[-1]),
    "linspace": lambda h: h * torch.linspace(0, 1, h.shape[-1]),
    "eye": lambda h: h @ torch.eye(h.shape[-1]),
    "literal arange": lambda h: h * torch.arange(16),
    "literal prefix": lambda h: F.pad(h[..., :10], (0, 6)),
    "fixed table": lambda h: h * torch.tensor([float(i % 3) for i in range(h.shape[-1])]),
}


def planned(module: nn.Module, check: str = "numbers") -> Plan:
    return autotp.plan(module, tp=2, example_inputs={"x": torch.randn(2, 3, OUTER)}, check=check)


def is_cut(plan: Plan) -> bool:
    return plan.params["a.weight"].layout.dim is not None or plan.params["b.weight"].layout.dim is not None


@pytest.mark.parametrize("name", [*NUMBERS, *SHAPES])
def test_left_whole_with_a_reason(name: str) -> None:
    plan = planned(Between((NUMBERS | SHAPES)[name]))
    if name in NUMBERS or not is_cut(plan):
        assert not is_cut(plan)
        assert "<root>" in plan.replicated["a.weight"]
        assert plan.replicated["b.weight"]
    else:  # the other tensor is whole on every rank, and each takes its part of it
        assert any(c.op is Op.SLICE for m in plan.modules for s in m.sites for _, cs in s.inputs for c in cs)


@pytest.mark.parametrize("name", NUMBERS)
def test_the_reason_names_what_differs(name: str) -> None:
    reason = planned(Between(NUMBERS[name])).replicated["a.weight"]
    assert "on a shard" in reason or "would become" in reason
    assert "test_certificate.py" in reason


#: What the localiser sees too: the width is an argument of an operator, with its provenance, or becomes a float.
SEEN_TWICE = ("divided", "under a root", "as a tensor", "numel", "table")


@pytest.mark.parametrize("name", [n for n in NUMBERS if n not in SEEN_TWICE])
def test_without_the_certificate_it_would_be_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_plan, "replay", lambda *_, **__: None)
    assert is_cut(planned(Between(NUMBERS[name]), check="graph"))
    assert not is_cut(planned(Between(NUMBERS[name])))  # the numbers see it too


@pytest.mark.parametrize("name", ["literal prefix", "eye", *SEEN_TWICE])
def test_the_rules_protect_these_alone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_plan, "replay", lambda *_, **__: None)
    assert not is_cut(planned(Between((NUMBERS | SHAPES)[name]), check="graph"))


@pytest.mark.parametrize(
    "harmless",
    [
        lambda h: h * h.shape[1],  # the length, which stays whole
        lambda h: h * 16,
        lambda h: h + torch.zeros_like(h),
        lambda h: h.view(*h.shape[:-1], -1, 4).softmax(-1).flatten(-2),
        lambda h: h * 2 if h.dim() == 3 else h,
        by_literal_heads,  # the number is changed where it is used
    ],
)
def test_harmless_code_is_cut(harmless: Callable[[Tensor], Tensor]) -> None:
    """The certificate does not refuse everything."""
    assert is_cut(planned(Between(harmless)))


def _drawn(h: Tensor, seed: int) -> Tensor:
    return torch.rand(3, 1, generator=torch.Generator().manual_seed(seed))


def _seeded_again(h: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(h.shape[-1])
    drawn = torch.rand(3, 1, generator=generator)
    generator.manual_seed(0)  # the object ends as any other does
    return h * drawn


def _seeded_anew(h: Tensor) -> Tensor:
    generator = torch.Generator()
    generator.seed()
    return h * torch.rand(3, 1, generator=generator)


def _in_a_range(h: Tensor) -> Tensor:
    with torch.profiler.record_function("a range"):
        return h * 2


#: Arguments and constants that are not equal to themselves, or are made anew in each run.
ALIKE: dict[str, Callable[[Tensor], Tensor]] = {
    "a generator": lambda h: h * _drawn(h, 3),
    "one without a seed": lambda h: h * torch.rand(3, 1, generator=torch.Generator()),
    "one that fills": lambda h: h * torch.empty(3, 1).normal_(generator=torch.Generator().manual_seed(1)),
    "one that permutes": lambda h: h[:, torch.randperm(3, generator=torch.Generator().manual_seed(2))],
    "not a number": lambda h: h.nan_to_num(0.0).masked_fill(torch.zeros(3, 1, dtype=torch.bool), math.nan),
    "a constant with one": lambda h: h * torch.tensor([math.nan, 1.0]).nan_to_num(0.5).sum(),
    "a range of the profiler": _in_a_range,
    "a device": lambda h: h.to(torch.device("cpu"), torch.float64).to(h.dtype),
}


@pytest.mark.parametrize("name", ALIKE)
def test_alike_though_another_object(name: str) -> None:
    assert is_cut(planned(Between(ALIKE[name]), check="graph"))


@pytest.mark.parametrize("seeded", [lambda h: h * _drawn(h, h.shape[-1]), _seeded_again])
def test_a_seed_that_is_a_width(seeded: Callable[[Tensor], Tensor]) -> None:
    plan = planned(Between(seeded), check="graph")
    assert not is_cut(plan)
    assert "draws other numbers" in plan.replicated["a.weight"]


def test_a_seed_that_is_new_in_each_call() -> None:
    """The ranks would draw different numbers."""
    with pytest.raises(PlanError, match="draws other numbers when the code runs again"):
        planned(Between(_seeded_anew), check="graph")


class Counted(nn.Module):
    """The number of heads is used as a number too, outside of any shape."""

    def __init__(self, scale_by_heads: bool) -> None:
        super().__init__()
        self.a, self.b, self.h, self.scale_by_heads = nn.Linear(OUTER, 3 * WIDTH), nn.Linear(WIDTH, LAST), 4, scale_by_heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (z.unflatten(-1, (self.h, 4)).transpose(1, 2) for z in self.a(x).chunk(3, -1))
        y = (q @ k.mT).softmax(-1) @ v
        return self.b(y.transpose(1, 2).flatten(2)) * (self.h if self.scale_by_heads else 4)


@pytest.mark.parametrize("scaled", [False, True])
def test_an_attribute_with_two_meanings(scaled: bool) -> None:
    """Where the count is also a factor, it may not simply become local: the call that needs it local is told so."""
    plan = planned(Counted(scaled))
    if is_cut(plan) and scaled:
        assert "h" not in plan.attributes
        assert any(s.ints for m in plan.modules for s in m.sites)
    elif not scaled:
        assert is_cut(plan)


def test_only_the_guilty_region_is_given_up() -> None:
    class TwoRegions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bad, self.good = Between(NUMBERS["divided"]), Between(lambda h: h * 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.bad(x) + self.good(x)

    plan = planned(TwoRegions())
    assert plan.params["bad.a.weight"].layout.dim is None
    assert plan.params["good.a.weight"].layout.dim == 0


def test_the_replay_leaves_the_model_alone() -> None:
    module = Between(NUMBERS["divided"])
    before = {n: (p, p.clone()) for n, p in module.named_parameters()}
    planned(module)
    for name, p in module.named_parameters():
        assert p is before[name][0]
        assert torch.equal(p, before[name][1])
    assert type(module.a) is nn.Linear
    assert not module.a._forward_pre_hooks


class OneKey(nn.Module):
    """Four query heads and one key/value head; with one query head on a shard, the code may take another path."""

    def __init__(self, one: Callable[[Tensor], Tensor], many: Callable[[Tensor], Tensor] = lambda q: q) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(a, b) for a, b in ((OUTER, 12), (OUTER, 3), (OUTER, 3), (12, LAST)))
        self.heads, self.one, self.many = 4, one, many

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (-1, 3)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.heads > 1:
            q, k, v = self.many(q), *(z[:, :, None].expand(-1, -1, self.heads, -1, -1).flatten(1, 2) for z in (k, v))
        else:
            q = self.one(q)
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_code_may_leave_out_what_does_nothing_on_a_shard() -> None:
    """Where keys are repeated once, it may not repeat them at all."""
    plan = autotp.plan(OneKey(lambda q: q), tp=4, example_inputs={"x": torch.randn(2, 3, OUTER)})
    assert plan.params["q.weight"].layout.local_shape == (3, OUTER)
    assert plan.attributes == {"heads": (4, 1)}


@pytest.mark.parametrize(
    "paths",
    [
        (lambda q: q * 2,),  # on a shard more is done
        (lambda q: q.flip(-1),),
        (lambda q: q.transpose(-1, -2).reshape(q.shape),),
        (lambda q: q, lambda q: q * 2),  # on a shard less is done
        (lambda q: q, lambda q: q.flip(-1)),
        (lambda q: q, lambda q: q.transpose(-1, -2).reshape(q.shape)),
        (lambda q: q, lambda q: q.mT.contiguous().view(q.shape)),
    ],
)
def test_code_may_not_leave_out_anything_else(paths: tuple[Callable[[Tensor], Tensor], ...]) -> None:
    plan = autotp.plan(OneKey(*paths), tp=4, example_inputs={"x": torch.randn(2, 3, OUTER)})
    assert plan.params["q.weight"].layout.dim != 0


def test_a_replay_that_differs_stops_after_the_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls of each trace: all are traced, and all are replayed once the plan is right."""
    traces: list[int] = []
    trace, one = run._trace, run._run
    monkeypatch.setattr(run, "_trace", lambda *a: (traces.append(0), trace(*a))[1])

    def counted(*a: Any) -> None:
        traces[-1] += 1
        one(*a)

    monkeypatch.setattr(run, "_run", counted)
    calls = [{"x": torch.randn(2, 4, OUTER)}, {"x": torch.randn(1, 3, OUTER)}]
    autotp.plan(Between(by_branch), tp=2, example_inputs=calls, check="graph")
    assert traces[0] == traces[-1] > 1 and traces[1:-1] and set(traces[1:-1]) == {1}


class Tied(nn.Module):
    """Two modules share a parameter, which an operator that does nothing returns."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.first, self.second, self.down = nn.Linear(OUTER, WIDTH), Mark(WIDTH), Mark(WIDTH), nn.Linear(WIDTH, LAST)
        self.second.mark = self.first.mark

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        h = self.down(self.second(F.relu(self.first(self.up(x)))))
        return h * 2 if twice else h


class Mark(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mark = nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mark.to(x.dtype).contiguous()


def test_a_tied_parameter_that_an_operator_returns() -> None:
    """It is itself again in the next call, in the trace and in the replay."""
    calls = [{"x": torch.randn(2, OUTER, dtype=torch.float64)}, {"x": torch.randn(2, OUTER, dtype=torch.float64), "twice": True}]
    found = assert_equivalent(Tied, tp=2, inputs=calls[0], steps=1, certificate="graph")
    assert {"up.weight", "first.mark", "down.weight"} <= found.sharded
    assert autotp.plan(Tied().double(), tp=2, example_inputs=calls, check="graph").params["up.weight"].layout.dim == 0
