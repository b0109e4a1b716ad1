"""Numbers tell a wrong plan from a right one, and say where."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import autotp
from autotp.errors import InputError
from autotp.inputs.paths import user_examples
from autotp.numeric.check import MOST_ELEMENTS, judge
from autotp.numeric.exact import DOUBLE
from autotp.numeric.subject import run
from autotp.plan.conversions import Conversion, Op
from autotp.planner.make_plan import whole_plan
from autotp.trace.example import Example


class Unsteady(nn.Module):
    """Gives other numbers in each call."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x) * (1 + int.from_bytes(os.urandom(6), "big"))


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
    model, example = Block(), user_examples(Block(), {"x": torch.randn(2, 5, 16)})
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


def test_ranks_hold_the_parameters_that_parallelize_makes() -> None:
    """Modules run in other forms where parameters are plain tensors."""
    plan = autotp.plan(Block(), tp=2, example_inputs={"x": torch.randn(2, 5, 16)})
    seen: list[type] = []
    model = Block()
    model.a.register_forward_pre_hook(lambda module, _: seen.append(type(module._parameters["weight"])))
    judge(model, user_examples(model, {"x": torch.randn(2, 5, 16)}), plan)
    assert any(issubclass(t, DTensor) for t in seen)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, nullcontext])
def test_the_mode_of_the_caller_does_not_matter(mode) -> None:
    with mode():
        plan = autotp.plan(Block(), tp=2, example_inputs={"x": torch.randn(2, 5, 16)})
    assert plan.checked == "numbers" and plan.local_share < 0.7


class Captured(nn.Module):
    """Its functions hold a weight and a batch norm of their own, which a copy shares."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.n = nn.Linear(16, 16), nn.BatchNorm1d(5)
        weight, norm = self.a.weight, self.n
        self.f, self.g = (lambda x: x @ weight.t()), (lambda x: norm(x))

    def forward(self, x):
        return self.g(self.f(x))


def test_what_copies_share_with_the_model_is_put_back() -> None:
    model = Captured().double().train()
    model.n.weight.grad = torch.ones(5, dtype=torch.float64)
    before, kept = {n: t.clone() for n, t in model.state_dict().items()}, model.n.weight.grad
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    plan = whole_plan(model, "")
    judge(model, user_examples(model, {"x": x}), plan)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert model.a.weight.grad is None and model.n.weight.grad is kept and torch.equal(kept, torch.ones(5, dtype=torch.float64))


class Undefined(Block):
    """Every result is NaN."""

    def forward(self, x):
        return super().forward(x) * float("nan")


def test_nothing_is_shown_by_numbers_that_are_not_finite() -> None:
    assert "are not finite" in autotp.plan(Undefined(), tp=2, example_inputs={"x": torch.randn(2, 5, 16)}).checked


class Normed(nn.Module):
    """Tied weights and running statistics."""

    def __init__(self, table: bool) -> None:
        super().__init__()
        self.a, self.n, self.b, self.c = nn.Conv1d(8, 12, 1), nn.BatchNorm1d(12), nn.Conv1d(12, 8, 1), nn.Conv1d(8, 12, 1)
        self.c.weight = self.a.weight
        if table:
            self.register_buffer("t", torch.ones(8, 1))

    def forward(self, x):
        x = self.b(self.n(self.a(x)).relu() + self.c(x)) + x
        return x * self.t if "t" in self._buffers else x


@pytest.mark.parametrize("table", [False, True])
def test_a_model_without_weights_gets_random_ones(table: bool) -> None:
    with torch.device("meta"):
        model = Normed(table)
    plan = autotp.plan(model, tp=2, example_inputs={"x": torch.randn(2, 8, 6)})
    assert plan.local_share < 0.7 and all(p.is_meta for p in model.parameters())
    assert plan.checked == ("graph only: the model has no weights, and nothing says what its buffer t holds" if table else "numbers")


def test_compiled_code_is_run_as_it_is_written() -> None:
    """Compiling it for every copy takes minutes, and prints warnings."""
    model = Block()
    model.b.compile(backend="eager")
    plan = autotp.plan(model, tp=2, example_inputs={"x": torch.randn(2, 5, 16)})
    assert plan.checked == "numbers" and plan.local_share < 0.7


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


class AsksOfItsInput(nn.Module):
    """Wants the gradient of its input in training mode, as encoders of speech do: an input that has one already is an error of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = x[:, None]
        if self.training:
            h.requires_grad = True
        return self.b(torch.relu(self.a(h)))  # type: ignore[no-any-return]


def test_a_model_that_asks_for_gradients_of_its_input_is_compared() -> None:
    x = torch.randn(2, 8)
    with pytest.raises(RuntimeError, match="leaf variables"):
        AsksOfItsInput()(x.requires_grad_())
    assert autotp.plan(AsksOfItsInput(), tp=2, example_inputs={"x": x.detach()}).checked == "numbers"


def test_a_model_whose_own_runs_differ_is_not_judged() -> None:
    model = Unsteady()
    verdict = judge(model, user_examples(model, {"x": torch.randn(2, 4)}), whole_plan(model, "one rank"))
    assert verdict.unknown == "two runs of the model with one seed differ" and verdict.module is None


class Apart(nn.Module):
    """Takes two arguments; what generation calls is a module inside, which takes one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.inner(x) + y


def test_a_second_call_goes_where_the_first_went() -> None:
    call = Example("inner", lambda: {"input": torch.ones(1, 4)}, decode=lambda result: {"input": result}, method="inner")
    model = Apart().double()
    seen = run(model, (call,), DOUBLE)
    wanted = model.inner(model.inner(torch.ones(1, 4, dtype=torch.float64)))
    assert torch.equal(next(t for name, t in seen.results.items() if "+decode" in name), wanted)


def test_calls_that_take_long_are_left_out_but_for_one_in_training() -> None:
    names = ("a", "b", "c training", "d training")
    calls = tuple(Example(n, lambda: {"input": torch.ones(1, 4)}, training="training" in n, method="inner") for n in names)
    assert [e.name for e in run(Apart().double(), calls, DOUBLE, 0.0).calls] == ["a", "c training"]
    assert run(Apart().double(), calls, DOUBLE).calls == calls


def test_a_call_that_the_model_itself_turns_down_is_left_out(made) -> None:
    model, examples = made
    plan = autotp.plan(model, tp=2, example_inputs=examples[0].inputs, check="graph")
    wrong = Example("of another width", lambda: {"x": torch.ones(2, 5, 3)})
    verdict = judge(model, (wrong, *examples), plan)
    assert not verdict.unknown and verdict.module is None and verdict.left == 1
    assert "does not run on the example inputs" in judge(model, (wrong,), plan).unknown
