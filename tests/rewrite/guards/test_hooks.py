"""Hooks of users after parallelize: equal between regions, refused inside of them, when they are registered."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import autotp
from autotp.plan.codec import decode, encode
from autotp.plan.spec import Shown
from autotp.rewrite.observer import Observer
from tests.rewrite.guards.guarded import Use, forward, gradients, inputs, outcome, planned
from tests.support.ranks import Pool, mesh


def normalised(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    return result / result.norm(dim=-1, keepdim=True)


def normalised_argument(module: nn.Module, args: Any) -> Any:
    return (args[0] / args[0].norm(dim=-1, keepdim=True),)


def doubled(module: nn.Module, args: Any, result: Tensor) -> Tensor:
    return result * 2


def of_gradients(module: nn.Module, inside: Any, outside: Any) -> Any:
    return tuple(None if g is None else g / g.norm(dim=-1, keepdim=True) for g in inside)


def before_gradients(module: nn.Module, outside: Any) -> Any:
    return tuple(g / g.norm(dim=-1, keepdim=True) for g in outside)


def put(path: str, kind: str, hook: Callable[..., Any]) -> Callable[[Any], object]:
    return lambda model: getattr(model.get_submodule(path), f"register_{kind}")(hook)


WHOLE = [
    ("core.blocks.1", "forward_hook", doubled, forward),
    ("core.blocks.0", "forward_pre_hook", normalised_argument, gradients),
    ("core.blocks.0.attention", "forward_hook", normalised, gradients),
    ("core.blocks.0.mlp", "forward_hook", normalised, gradients),
    ("core.blocks.0.attention.q", "forward_pre_hook", normalised_argument, gradients),
    ("core.blocks.1.norm", "forward_hook", normalised, gradients),
    ("core.blocks.1.mlp", "full_backward_hook", of_gradients, gradients),
    ("core.blocks.1", "full_backward_pre_hook", before_gradients, gradients),
    ("head", "forward_hook", normalised, gradients),
]


@pytest.mark.parametrize(("path", "kind", "hook", "use"), WHOLE)
def test_hooks_where_values_are_whole(path: str, kind: str, hook: Any, use: Use) -> None:
    assert outcome(put(path, kind, hook), use) == "equal"


INSIDE = [
    ("core.blocks.0.attention.q", "forward_hook", normalised, "forward hook .* result is this rank's part"),
    ("core.blocks.1.mlp.down", "forward_pre_hook", normalised_argument, "forward pre-hook .* argument input is this rank's part"),
    ("core.blocks.1.mlp.act", "forward_hook", normalised, "this rank's part"),
    ("core.blocks.0.mlp.up", "full_backward_hook", of_gradients, "backward hook"),
    ("core.blocks.0.mlp.up", "full_backward_pre_hook", before_gradients, "backward pre-hook"),
    ("core.blocks.0.mlp.down", "full_backward_hook", of_gradients, "backward hook"),
]


@pytest.mark.parametrize(("path", "kind", "hook", "wanted"), INSIDE)
@pytest.mark.parametrize("tp", [2, 3])
def test_hooks_inside_of_regions_are_refused(path: str, kind: str, hook: Any, wanted: str, tp: int) -> None:
    with pytest.raises(AssertionError, match=wanted):
        raise AssertionError(outcome(put(path, kind, hook), tp=tp))


def test_summands_that_are_reduced_together() -> None:
    """One scaled summand would scale nothing, the other all of the sum."""
    assert any(m.joint for m in planned(True, 2).modules)
    for name, reason in (("attention", "summed"), ("mlp", "summed"), ("attention.o", "part"), ("mlp.down", "part")):
        assert reason in outcome(put(f"core.blocks.0.{name}", "forward_hook", doubled), parallel=True)
    assert outcome(put("core.blocks.0", "forward_hook", doubled), parallel=True) == "equal"
    # The norm sums the gradient of what both of them take, so outside of it that is a summand.
    assert outcome(put("core.blocks.0.norm", "forward_hook", normalised), gradients, parallel=True) == "equal"
    assert "a gradient that is this rank's summand" in outcome(put("core.blocks.0.norm", "full_backward_hook", of_gradients), parallel=True)


def test_hooks_on_all_modules() -> None:
    handles: list[Any] = []

    def everywhere(_: object) -> None:
        handles.append(nn.modules.module.register_module_forward_hook(lambda *_: None))

    try:
        assert "a forward hook on all modules" in outcome(everywhere)
    finally:
        for handle in handles:
            handle.remove()


def counted(model: Any) -> Tensor:
    with FlopCounterMode(display=False):
        return forward(model)


def test_tools_that_only_look() -> None:
    assert outcome(lambda _: None, counted) == "equal"
    seen: list[Any] = []
    assert outcome(put("core.blocks.0.mlp.up", "forward_hook", Observer(lambda _m, _a, y: seen.append(y.shape[-1])))) == "equal"
    assert set(seen) == {12, 24}


def test_copies_refuse_too() -> None:
    q = "core.blocks.0.attention.q"
    assert "this rank's part" in outcome(lambda _: None, lambda m: forward(_hooked(copy.deepcopy(m), q, normalised)))
    assert outcome(lambda _: None, lambda m: forward(_hooked(copy.deepcopy(m), "core.blocks.0", doubled))) == "equal"

    def watched(model: Any) -> Tensor:
        _hooked(model, q, Observer(lambda *_: None))
        return forward(copy.deepcopy(model))

    assert outcome(lambda _: None, watched) == "equal"


def _hooked(model: Any, path: str, hook: Any) -> Any:
    model.get_submodule(path).register_forward_hook(hook)
    return model


class Own(nn.Module):
    """Its own code puts a hook on a module of its own, and keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.installed = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.installed:
            self.up.register_forward_hook(lambda m, a, y: y * 2)
            self.installed = True
        return self.down(self.up(x).relu())


def _own() -> float:
    torch.manual_seed(0)
    model = Own().double()
    parallel = autotp.parallelize(copy.deepcopy(model), mesh(), example_inputs={"x": inputs()})
    assert autotp.plan_of(parallel).local_share < 0.6
    with pytest.raises(autotp.AutoTPError, match="up: no forward hook"):
        parallel.up.register_forward_hook(normalised)
    return float((parallel(inputs()) - model(inputs())).abs().max().detach())


def test_hooks_of_the_model_itself(pool: Pool) -> None:
    assert max(pool.run(_own)) < 1e-12


def test_boundaries_are_part_of_a_plan() -> None:
    plan = planned(True, 2)
    shown = {(path, b.result): b.shown for path, found in plan.boundaries.items() for b in found}
    assert shown["core.blocks.1.mlp.up", True] is Shown.PART
    assert shown["core.blocks.0.attention", True] is Shown.HELD
    assert shown["core.blocks.1.norm", True] is shown["core.blocks.1.mlp", False] is Shown.GRADIENT
    assert not {"core", "core.blocks.0", "core.blocks.1", "head"} & set(plan.boundaries)
    assert "core.blocks.1.mlp" not in planned(False, 2).boundaries
    assert decode(encode(plan)) == plan == pickle.loads(pickle.dumps(plan))
