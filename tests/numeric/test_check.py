"""Numbers tell a wrong plan from a right one, and say where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import autotp
from autotp.errors import InputError
from autotp.numeric.check import MOST_ELEMENTS, judge
from autotp.plan.model import Conversion, Op
from autotp.trace.inputs import user_example


class Block(nn.Module):
    """Two regions, a norm between them, a head norm inside of one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.n = nn.Linear(16, 24), nn.Linear(24, 16), nn.LayerNorm(16)
        self.c, self.d = nn.Linear(16, 36), nn.Linear(36, 16)
        self.w, self.heads = nn.Parameter(torch.ones(6)), 6

    def forward(self, x):
        x = x + self.b(torch.tanh(self.a(x)))
        heads = self.c(self.n(x)).view(*x.shape[:-1], self.heads, -1) * self.w
        return x + self.d(heads.flatten(-2).sin())


@pytest.fixture
def made():
    torch.manual_seed(0)
    model, example = Block(), user_example(Block(), {"x": torch.randn(2, 5, 16)})
    return model, example


def _changed(plan, path: str, **changes):
    return replace(plan, modules=tuple(replace(m, **{k: f(m) for k, f in changes.items()}) if m.path == path else m for m in plan.modules))


@pytest.mark.parametrize("tp", [2, 5])
def test_right_plans_pass(made, tp: int) -> None:
    model, example = made
    before = {n: t.clone() for n, t in model.state_dict().items()}
    plan = autotp.plan(model, tp=tp, example_inputs=example[0].make(), check="graph")
    assert plan.local_share < 0.7
    verdict = judge(model, example, plan)
    assert verdict.module is None and not verdict.unknown
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and all(p.grad is None for p in model.parameters())


def test_a_dropped_reduction_is_found_where_it_is(made) -> None:
    model, example = made
    plan = autotp.plan(model, tp=2, example_inputs=example[0].make(), check="graph")
    verdict = judge(model, example, _changed(plan, "b", outputs=lambda m: ()))
    assert verdict.module == "n" and "relative error" in verdict.reason


def test_a_dropped_copy_shows_in_gradients_alone(made) -> None:
    model, example = made
    plan = autotp.plan(model, tp=2, example_inputs=example[0].make(), check="graph")
    verdict = judge(model, example, _changed(plan, "c", inputs=lambda m: ()))
    assert verdict.module is not None and "gradient" in verdict.reason


def test_a_sum_made_twice_is_found(made) -> None:
    model, example = made
    plan = autotp.plan(model, tp=2, example_inputs=example[0].make(), check="graph")
    twice = lambda m: tuple(replace(s, conversions=(*s.conversions, Conversion(Op.REDUCE))) for s in m.outputs)  # noqa: E731
    assert judge(model, example, _changed(plan, "b", outputs=twice)).module is not None


class Noise(nn.Module):
    """Counts its calls where no copy and no seed reaches."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        _CALLS.append(0)
        return self.a(x) * len(_CALLS)


_CALLS: list[int] = []


class Uncopied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def __deepcopy__(self, memo):
        raise TypeError("one of a kind")

    def forward(self, x):
        return self.a(x)


def test_what_cannot_be_compared_says_why() -> None:
    x = {"x": torch.randn(2, 4)}
    assert "two runs" in autotp.plan(Noise(), tp=2, example_inputs=x).checked
    assert "one of a kind" in autotp.plan(Uncopied(), tp=2, example_inputs=x).checked
    with torch.device("meta"):
        wide = nn.Linear(4, MOST_ELEMENTS // 4 + 1, bias=False)
    assert autotp.plan(wide, tp=2, example_inputs={"input": x["x"]}).checked.startswith("graph only: the model and its ranks would hold")


def test_checks_are_chosen_by_name(made) -> None:
    model, example = made
    assert autotp.plan(model, tp=2, example_inputs=example[0].make()).checked == "numbers"
    assert autotp.plan(model, tp=2, example_inputs=example[0].make(), check="graph").checked.startswith("graph only")
    with pytest.raises(InputError, match="check is 'eyes', wanted one of 'numbers', 'graph'"):
        autotp.plan(model, tp=2, example_inputs=example[0].make(), check="eyes")
