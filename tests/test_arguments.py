"""Plain arguments of public functions: what makes no sense is an error that names it, and what makes sense is taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import autotp
from autotp.arguments import seconds, whole_number
from autotp.errors import AutoTPError, InputError
from autotp.launch import run_ranks
from autotp.testing import assert_equivalent, sabotage
from autotp.testing import strategies as tps
from autotp.verify import verify

X = torch.randn(3, 8)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))


@pytest.fixture(scope="module")
def plan() -> autotp.Plan:
    return autotp.plan(model(), tp=2, example_inputs={"input": X}, check="graph")


def equivalent(**options: Any) -> Any:
    return assert_equivalent(model, **{"tp": 2, "inputs": X, **options})


def surveyed(**options: Any) -> Any:
    return sabotage.survey(model, **{"tp": 2, "inputs": X, **options})


def verified(**options: Any) -> Any:
    return verify(**{"target": "llama", "tp": 2, **options})


@pytest.mark.parametrize("value", [0, -1, "3", 1.5, True, None])
def test_a_whole_number_is_an_int_of_at_least_one(value):
    with pytest.raises(InputError, match=f"tokens is {value!r}, wanted a whole number of at least 1"):
        whole_number("tokens", value)
    whole_number("tokens", 1)
    whole_number("tokens", 3, most=3)
    with pytest.raises(InputError, match="from 1 to 2"):
        whole_number("tokens", 3, most=2)


@pytest.mark.parametrize("value", [0, -1.0, "a", True, None, float("nan"), float("inf"), 1e300])
def test_seconds_are_a_number_that_a_thread_can_wait(value):
    with pytest.raises(InputError, match=r"timeout is .*wanted seconds above 0"):
        seconds("timeout", value)
    seconds("timeout", 0.5)


PLAN: dict[str, tuple[Callable[[autotp.Plan], Any], str]] = {
    "explain a number": (lambda p: p.explain(3), "explain: got 3"),
    "tokens in text": (lambda p: p.collectives(tokens="3"), "tokens is '3'"),
    "a part of a token": (lambda p: p.collectives(tokens=1.5), "tokens is 1.5"),
    "True tokens": (lambda p: p.collectives(tokens=True), "tokens is True"),
    "dtype in text": (lambda p: p.collectives(dtype="float32"), "dtype is 'float32', wanted a torch.dtype"),
    "recipe of a model that is none": (lambda p: autotp.Recipe.from_plan(p, model=3), "from_plan: model is int"),
    "dump to a number": (lambda p: autotp.Recipe.from_plan(p).dump(3), "dump: path is 3"),
    "dump to no path": (lambda p: autotp.Recipe.from_plan(p).dump("\0"), "cannot be written: embedded null byte"),
    "plan for other ranks": (lambda p: autotp.Recipe.from_plan(p).to_plan(tp=4), "holds a plan for tp 2, not for 4"),
}


@pytest.mark.parametrize("name", PLAN)
def test_methods_of_plans_and_recipes_name_a_bad_argument(plan, name):
    call, text = PLAN[name]
    with pytest.raises(AutoTPError, match=text):
        call(plan)


def test_methods_of_plans_and_recipes_take_good_arguments(plan, tmp_path):
    recipe = autotp.Recipe.from_plan(plan, model=model())
    assert plan.explain("0") and plan.explain("")
    assert plan.collectives(tokens=3, dtype=torch.float32)[0].bytes == 6 * plan.collectives()[0].bytes
    recipe.dump(tmp_path / "r.yaml")
    assert autotp.Recipe.load(tmp_path / "r.yaml") == recipe
    assert recipe.to_plan(tp=2) == recipe.to_plan() == plan


FUNCTIONS: dict[str, tuple[Callable[[], Any], str]] = {
    "survey over no ranks": (lambda: surveyed(tp=0), "survey: tp is 0"),
    "survey on unknown ranks": (lambda: surveyed(backend="zz"), "survey: backend is 'zz'"),
    "survey without time": (lambda: surveyed(timeout="1"), "survey: timeout is '1'"),
    "survey that tells nobody": (lambda: surveyed(on_mutation=3), "survey: on_mutation is 3"),
    "a seed too large": (
        lambda: equivalent(seed=2**80),
        "assert_equivalent: seed is 1208925819614629174706176, wanted a whole number from 0",
    ),
    "True seconds": (lambda: equivalent(timeout=True), "assert_equivalent: timeout is True"),
    "degrees in text": (lambda: tps.degrees(most="a"), "degrees: most is 'a'"),
    "degrees without ranks": (lambda: tps.degrees(most=1), "degrees: most is 1, wanted a whole number of at least 2"),
    "verify over text": (lambda: verified(tp="2"), "verify: tp is '2'"),
    "verify by a number": (lambda: verified(recipe=3), "verify: recipe is int"),
    "verify seed": (lambda: verified(seed=-1), "verify: seed is -1"),
    "no ranks": (lambda: run_ranks(print, 0), "run_ranks: world_size is 0"),
    "fewer than none": (lambda: run_ranks(print, -1), "run_ranks: world_size is -1"),
    "ranks without time": (lambda: run_ranks(print, 1, timeout=0), "run_ranks: timeout is 0"),
    "ranks of a number": (lambda: run_ranks(3, 1), "run_ranks: function is 3"),
    "ranks of a local function": (lambda: run_ranks(lambda emit: 1, 2), "cannot be sent to a process.*importable by name"),
    "ranks with a generator": (lambda: run_ranks(print, 1, (n for n in ())), "print or its arguments cannot be sent"),
    "save among no ranks": (lambda: autotp.checkpoint.save(model(), None, Path("x"), group=3), "group is 3, wanted a ProcessGroup"),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_name_a_bad_argument(name):
    call, text = FUNCTIONS[name]
    with pytest.raises(InputError, match=text):
        call()


def test_functions_take_good_arguments():
    assert not equivalent(seed=2**64 - 1, timeout=60).failed
    assert not surveyed(timeout=60).survived
    assert tps.degrees(most=2) is not None


STRATEGIES: dict[str, Callable[[], Any]] = {
    "geometries: heads": lambda: tps.geometries(heads="a"),
    "exprs: depth": lambda: tps.exprs(depth=-1),
    "layouts: tp": lambda: tps.layouts(tp=0),
    "tensors: shape": lambda: tps.tensors((-1,)),
    "meshes: ranks": lambda: tps.meshes(ranks=0),
    "architectures: layers": lambda: tps.architectures(layers=0),
    "architectures: traps": lambda: tps.architectures(traps="a"),
}


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.filterwarnings("ignore::hypothesis.errors.NonInteractiveExampleWarning")
def test_strategies_name_a_bad_argument(name):
    with pytest.raises(InputError, match=name):
        STRATEGIES[name]().example()
