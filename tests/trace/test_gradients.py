"""Backwards that the forward does not show, and code that asks for gradients: equal in every mode, or left whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autotp
from autotp.axes.find import keep
from autotp.errors import TraceError
from autotp.trace.example import Example
from autotp.trace.graph import Pseudo
from autotp.trace.run import trace
from tests.models.backward import (
    OUTER,
    WIDTH,
    Centred,
    Checkpointed,
    Clip,
    ClipApart,
    ClipSame,
    Flipped,
    Mid,
    OwnGelu,
    OwnNorm,
    StraightThrough,
    Up,
    centred,
    clip,
    clipped,
    hooked,
)
from tests.support.modes import same_in_every_mode
from tests.support.slow import few, in_turns

X = {"x": torch.randn(2, 6, OUTER, dtype=torch.float64, generator=torch.Generator().manual_seed(3))}
WHOLE = 1.0


def _mid(operation: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return partial(Mid, operation)


def _up(operation: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return partial(Up, operation)


def _with(model: Callable[[], nn.Module], change: Callable[[nn.Module], object]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        made = model()
        change(made)
        return made

    return make


def _in_bands(h: Tensor) -> Tensor:
    """Asks, and computes the same in two places."""
    if torch.is_grad_enabled():
        return h - h.mean(-1, keepdim=True)
    return h - h.mean(-1, keepdim=True)


SHARDED = {  # at the right place, whatever stands there
    "clip inside": _mid(Clip.apply),
    "clip of what is returned as it is": _mid(ClipSame.apply),
    "clip with a context of its own": _mid(ClipApart.apply),
    "clip bound early": _mid(clip),
    "straight through": _mid(StraightThrough.apply),
    "plain operators": _mid(OwnGelu.apply),
    "clip of a whole value": _up(Clip.apply),
    "clip of a whole value returned as it is": _up(ClipSame.apply),
    "crossing a whole value": _up(Centred.apply),
    "norm of a whole value": _up(OwnNorm.apply),
    "hook on a whole value": _up(partial(hooked, clipped)),
    "hook on a whole value that crosses": _up(partial(hooked, centred)),
    "module hook before": _with(Up, lambda m: m.p.register_full_backward_hook(lambda m, i, o: (clipped(i[0]),))),
    "module hook around": _with(Up, lambda m: m.m.register_full_backward_hook(lambda m, i, o: (clipped(i[0]),))),
    "module hook on the root": _with(Up, lambda m: m.register_full_backward_pre_hook(lambda m, o: (centred(o[0]),))),
    "checkpoint": partial(Checkpointed, False),
    "reentrant checkpoint": partial(Checkpointed, True),
    "asks whether gradients are recorded": _mid(_in_bands),
    "asks for inference mode": _mid(lambda h: h * (2 if torch.is_inference_mode_enabled() else 3)),
}
KEPT = {  # nothing can be sharded
    "crossing": _mid(Centred.apply),
    "flipping": _mid(Flipped.apply),
    "norm": _mid(OwnNorm.apply),
    "hook": _mid(partial(hooked, centred)),
    "hook on each element": _mid(partial(hooked, clipped)),
    "module hook": _with(_mid(F.relu), lambda m: m.a.register_full_backward_pre_hook(lambda m, o: (centred(o[0]),))),
    "another branch with gradients": _mid(lambda h: h.softmax(-1) if h.requires_grad else h),
    "another branch without": _mid(lambda h: h if torch.is_grad_enabled() else h.softmax(-1)),
    "another branch in inference mode": _mid(lambda h: h.softmax(-1) if torch.is_inference_mode_enabled() else h),
    "another branch in inference tensors": _mid(lambda h: h.softmax(-1) if h.is_inference() else h),
}


@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad", "ignore:Full backward hook is firing"
)  # torch's, of one device too
@pytest.mark.parametrize(("name", "tp"), in_turns(SHARDED, (2, 3)))
def test_sharded(name: str, tp: int) -> None:
    assert same_in_every_mode(SHARDED[name], X, tp) < 0.7


@pytest.mark.parametrize(("name", "tp"), in_turns(KEPT, (2, 3)))
def test_kept(name: str, tp: int) -> None:
    assert same_in_every_mode(KEPT[name], X, tp) == WHOLE


@pytest.mark.sweep
@pytest.mark.parametrize(
    "name", few(["clip of a whole value", "hook on a whole value", "asks whether gradients are recorded"], "hook on a whole value")
)
def test_in_processes(name: str) -> None:
    assert same_in_every_mode(SHARDED[name], X, 2, backend="gloo") < 0.7


def test_branches_of_training_alone() -> None:
    class Drops(Mid):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.softmax(-1) if self.training and not torch.is_grad_enabled() else h)

    assert same_in_every_mode(Drops, X, 2) == WHOLE


class Differentiates(Mid):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if torch.is_grad_enabled():
            (g,) = torch.autograd.grad(y.sum(), self.b.bias, create_graph=True)
            y = y + g
        return y


class HooksAfter(Mid):
    def forward(self, x: Tensor) -> Tensor:
        self.a.weight.register_post_accumulate_grad_hook(lambda p: None)
        return super().forward(x)


def _old_hook() -> nn.Module:
    model = Mid()
    model.a.register_backward_hook(lambda m, i, o: None)
    return model


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (Differentiates, "it differentiates inside"),
        (HooksAfter, "register_post_accumulate_grad_hook"),
        (_old_hook, "register_full_backward_hook"),
    ],
)
def test_refused(model: Callable[[], nn.Module], said: str) -> None:
    with pytest.raises(TraceError, match=said):
        autotp.plan(model().double(), tp=2, example_inputs=X)


def test_models_that_do_not_ask_are_traced_once_in_eval_mode() -> None:
    graph = trace(Mid(), (Example("user", lambda: X),), keep)
    assert [r.name for r in graph.results] == ["user"]
    graph = trace(Mid(_in_bands).double(), (Example("user", lambda: X),), keep)
    assert [r.name for r in graph.results] == ["user", "user-grad"]


def test_what_asking_leaves_behind() -> None:
    asked, hook = torch.is_grad_enabled, torch._functorch.utils.unwrap_dead_wrappers
    autotp.plan(Mid(_in_bands).double(), tp=2, example_inputs=X)
    assert torch.is_grad_enabled is asked
    assert torch._functorch.utils.unwrap_dead_wrappers is hook
    assert torch.is_grad_enabled()


def test_checkpoints_are_no_functions_of_their_own() -> None:
    graph = trace(Checkpointed(True).double(), (Example("user", lambda: X, training=True),), keep)
    assert not graph.scopes
    assert not any(n.op is Pseudo.APPLY for n in graph.nodes)
    assert graph.results
    assert WIDTH in {v.shape[-1] for n in graph.nodes for v in n.outputs if v.shape}


def test_a_result_says_whether_its_path_was_training() -> None:
    examples = Example("user", lambda: X), Example("again", lambda: X, training=True)
    graph = trace(Mid(_in_bands).double(), examples, keep)
    training = {result.name: result.training for result in graph.results}
    assert {"user", "again"} < training.keys()  # the code asks for gradients, so there are paths with and without them
    assert all(value is name.startswith("again") for name, value in training.items())
