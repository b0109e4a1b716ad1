"""`assert_equivalent`: equal models pass on every backend, each kind of difference fails and says where, bad input has one error."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import autotp
from autotp.errors import AutoTPError, InputError, RecipeError
from autotp.testing import NotEquivalent, assert_equivalent, sabotage
from autotp.testing.equivalence.mutation import Kind
from autotp.testing.equivalence.observe import ASPECTS
from autotp.testing.equivalence.subject import make_subject
from autotp.testing.tiny.models import tiny_config
from tests.support.slow import few, swept


class Two(nn.Module):
    """Linear, relu, Linear; `after` is done to the output."""

    def __init__(self, after: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.a, self.b, self.after = nn.Linear(8, 16), nn.Linear(16, 8), after

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)))
        return y if self.after is None else self.after(y)


X = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))


def rank() -> int:
    """This rank; -1 on one device."""
    return dist.get_rank() if dist.is_initialized() else -1


@pytest.fixture
def nothing_left() -> Iterator[None]:
    """No thread and no process is there after the test that was not before."""
    before = {*threading.enumerate(), *multiprocessing.active_children()}
    yield
    assert {*threading.enumerate(), *multiprocessing.active_children()} <= before


@pytest.mark.parametrize(("backend", "tp"), [("local", 2), ("local", 3), ("local", 8), ("threads", 3), ("gloo", 2)])
def test_equal_models(backend: str, tp: int, nothing_left: None) -> None:
    found = assert_equivalent(lambda: Two(), tp=tp, inputs=X, steps=3, backend=backend)
    assert (found.tp, found.backend, found.dtype, found.failed) == (tp, backend, torch.float64, ())
    assert set(found.aspects) == set(ASPECTS) - {"generation"}
    assert found.aspects["gradients"].compared == 5  # that of the input too
    assert found.aspects["steps"].compared == 4 + 2 * 3
    assert found.skipped == {"generation": "the model does not generate"}
    assert found.plan.params["a.weight"].layout.dim == 0 and found.plan.tp == tp
    assert "equals the model on one device" in str(found)


def test_one_rank_is_a_rank() -> None:
    assert assert_equivalent(Two, tp=1, inputs=X, steps=1).plan.local_share == 1


@pytest.mark.sweep
@pytest.mark.parametrize(("model_type", "attention"), few([("llama", "eager"), ("t5", "eager"), ("gpt2", "sdpa")], ("t5", "eager")))
def test_transformers_need_no_inputs(model_type: str, attention: str) -> None:
    config = tiny_config(model_type)
    config._attn_implementation = attention
    found = assert_equivalent(config, tp=2, steps=2)
    assert set(found.aspects) == set(ASPECTS)
    state = torch.get_rng_state()
    assert_equivalent(config, tp=2)
    assert torch.equal(torch.get_rng_state(), state)  # the caller's random numbers are its own


def test_float32_and_inputs_of_every_form() -> None:
    for inputs in (X, (X,), [X], {"x": X}, lambda model: X, lambda model: {"x": X}):
        assert assert_equivalent(Two, tp=2, inputs=inputs, dtype=torch.float32).dtype is torch.float32


def test_a_recipe_is_what_runs() -> None:
    config = tiny_config("llama")
    found = assert_equivalent(config, tp=2, recipe="llama")
    assert found.plan.to_dict() == autotp.plan(config, tp=2, recipe="llama").to_dict()
    with pytest.raises(RecipeError):
        assert_equivalent(config, tp=2, recipe={"layouts": {"nothing.weight": "a b"}})


# what differs -------------------------------------------------------------------------------------------------------------------


def off_by_a_millionth(y: Tensor) -> Tensor:
    return y * (1 + 1e-6) if rank() == 1 else y


@pytest.mark.parametrize("backend", swept(["local", "threads", "gloo"], "local", "threads"))
def test_a_difference_is_named(backend: str) -> None:
    with pytest.raises(NotEquivalent) as caught:
        assert_equivalent(partial(Nested, off_by_a_millionth), tp=2, inputs=X, backend=backend)
    text = str(caught.value)
    assert isinstance(caught.value, AssertionError) and isinstance(caught.value, AutoTPError)
    assert f"Nested over tp=2 ({backend} ranks, float64): differs from the model on one device" in text
    assert "outputs: 1 of 1 differ" in text and "first module that differs: inner: relative error 1.0e-06" in text
    assert "inner.b.weight  [8, 16]  n i*" in text and "collective at inner.b: all_reduce" in text


class Nested(nn.Module):
    """A model with a model in it."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(8, 8), Two(after)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.first(x)) * 2


class Doubled(torch.autograd.Function):
    """Gradients twice as large, on parallel ranks only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (2 if rank() >= 0 else 1)


class WrongGradient(nn.Module):
    """Right outputs; on ranks the gradient of all but the last Linear is doubled."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(Doubled.apply(self.b(self.a(x))))


def test_a_wrong_gradient_is_named_from_the_back() -> None:
    with pytest.raises(NotEquivalent) as caught:
        assert_equivalent(WrongGradient, tp=2, inputs=X, certificate="graph")
    text = str(caught.value)
    assert "outputs: 1 compared" in text and "gradients: 5 of 7 differ" in text
    assert "no module's output differs; first gradient that differs on the way back: b." in text


def test_only_steps_show_a_wrong_optimizer() -> None:
    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1 if rank() < 0 else 0.2)

    with pytest.raises(NotEquivalent, match=r"steps: \d+ of 8 differ"):
        assert_equivalent(Two, tp=2, inputs=X, steps=2, optimizer=optimizer)
    assert_equivalent(Two, tp=2, inputs=X, optimizer=optimizer)  # the control: nothing else does


class Late(nn.Module):
    """A key of the state dict changes when a rank is there."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)
        self.register_buffer("seen", torch.zeros(1))
        self.register_state_dict_post_hook(self.more)

    @staticmethod
    def more(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        if rank() == 1:
            state[prefix + "seen"] = state[prefix + "seen"] + 1e-12

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x)


def test_a_state_dict_is_compared_bit_by_bit() -> None:
    with pytest.raises(NotEquivalent, match="state: 1 of 3 differ, the most seen"):
        assert_equivalent(Late, tp=2, inputs=X)


class NaNBuffer(Late):
    """A NaN that becomes a zero on one rank."""

    @staticmethod
    def more(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[prefix + "seen"] = torch.full((1,), 0.0 if rank() == 1 else float("nan"))


def test_a_nan_in_the_state_is_no_zero() -> None:
    with pytest.raises(NotEquivalent, match="state: 1 of 3 differ, the most seen"):
        assert_equivalent(NaNBuffer, tp=2, inputs=X)


class InPlace(Two):
    """Changes its argument, which can then be no leaf."""

    def forward(self, x: Tensor) -> Tensor:
        x += 1
        return super().forward(x)


def test_a_model_that_changes_its_argument_is_compared_all_the_same() -> None:
    found = assert_equivalent(InPlace, tp=2, inputs=X, steps=1)
    assert found.aspects["outputs"].compared == 1 and found.aspects["gradients"].compared == 4
    with pytest.raises(NotEquivalent, match="outputs: 1 of 1 differ"):
        assert_equivalent(partial(InPlace, off_by_a_millionth), tp=2, inputs=X)


class ZeroBias(Two):
    """Biases of zero, as models have them before training."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.a.bias)
        nn.init.zeros_(self.b.bias)


def test_a_zero_bias_does_not_hide_that_it_is_added_twice() -> None:
    plan = autotp.plan(ZeroBias(), tp=2, example_inputs={"x": X})
    (twice,) = (m for m in sabotage.mutations(plan) if m.kind is Kind.BIAS)
    with pytest.raises(NotEquivalent, match="outputs: 1 of 1 differ"):
        assert_equivalent(ZeroBias, tp=2, inputs=X, sabotage=twice)


class TrainingOnly(Two):
    """Something is wrong on rank 1, in training mode alone."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls = what, 0
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        wrong = self.training and rank() == 1
        if self.training:
            self.calls += 1
            self.seen += 1 + (wrong and self.what == "buffer")
        if wrong and self.what == "gradient" and y.requires_grad:
            y.register_hook(lambda g: 2 * g)
        if wrong and (self.what == "output" or (self.what == "second" and self.calls > 1)):
            return y * 1.5 + y.detach()  # the gradient is less wrong than the result
        return y * 1


@pytest.mark.parametrize(
    ("what", "where"),
    [("output", "output"), ("gradient", "gradient of "), ("second", "output of a second call"), ("buffer", "buffer seen")],
)
def test_training_mode_is_compared(what: str, where: str) -> None:
    with pytest.raises(NotEquivalent) as caught:
        assert_equivalent(partial(TrainingOnly, what), tp=2, inputs=X, steps=1)
    text = str(caught.value)
    assert "  outputs: 1 compared" in text and "  gradients: 5 compared" in text
    (line,) = (line for line in text.splitlines() if line.startswith("  training: "))
    assert f" differ, the most {where}" in line


def test_what_is_written_while_watching_is_not_a_difference() -> None:
    found = assert_equivalent(partial(TrainingOnly, ""), tp=2, inputs=X, steps=1)
    assert found.aspects["training"].compared == 1 + 5 + 1 + 1


class Dropped(Two):
    """Its outputs are random in training mode."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.dropout(super().forward(x), 0.1, self.training)


def test_random_numbers_are_not_compared() -> None:
    assert "draws random numbers" in assert_equivalent(Dropped, tp=2, inputs=X, steps=1).skipped["training"]


def refuses(y: Tensor) -> Tensor:
    if rank() >= 0:
        raise AutoTPError("not this call")
    return y


def refuses_on_one(y: Tensor) -> Tensor:
    return refuses(y) if rank() == 1 else y


def test_a_call_that_every_rank_refuses_is_that_error() -> None:
    with pytest.raises(AutoTPError, match="not this call") as caught:
        assert_equivalent(partial(Two, refuses), tp=2, inputs=X, certificate="graph")
    assert not isinstance(caught.value, NotEquivalent)
    with pytest.raises(NotEquivalent):
        assert_equivalent(partial(Two, refuses_on_one), tp=2, inputs=X, certificate="graph")


class WeightHook(Two):
    """A hook on a weight from before: a copy without it would be no control."""

    def __init__(self) -> None:
        super().__init__()
        self.a.weight.register_hook(lambda g: g * (3 if rank() < 0 else 2))


def test_hooks_on_weights_are_watched() -> None:
    with pytest.raises(NotEquivalent, match=r"the most a\.weight"):
        assert_equivalent(WeightHook, tp=2, inputs=X)


# ranks that fail ----------------------------------------------------------------------------------------------------------------


def raises(y: Tensor) -> Tensor:
    if rank() == 1:
        raise ValueError("this rank says no")
    return y


def loops(y: Tensor) -> Tensor:
    while rank() == 1:
        pass
    return y


def sleeps(y: Tensor) -> Tensor:
    if rank() == 1:
        time.sleep(600)
    return y


def one_more_sum(y: Tensor) -> Tensor:
    if rank() == 1:
        dist.all_reduce(torch.ones(3))
    return y


@pytest.mark.parametrize("backend", swept(["local", "threads", "gloo"], "local", "threads"))
def test_a_rank_that_raises(backend: str, nothing_left: None) -> None:
    started = time.monotonic()
    with pytest.raises(NotEquivalent, match=r"(?s)rank 1.*in raises\n.*this rank says no"):
        assert_equivalent(partial(Two, raises), tp=2, inputs=X, backend=backend, timeout=60)
    assert time.monotonic() - started < 40


# Processes need seconds to start, import torch and plan before one of them can hang: on a busy machine more than 20.
HANGING = [("local", 1.0), ("threads", 1.0), ("gloo", 75.0)]


@pytest.mark.parametrize(("backend", "timeout"), swept(HANGING, *HANGING[:2]))
def test_a_rank_that_hangs(backend: str, timeout: float, nothing_left: None) -> None:
    started = time.monotonic()
    with pytest.raises(
        NotEquivalent, match=r"(?s)rank 1.*in time.*in loops" if backend != "gloo" else r"(?s)no result within 75 s; it is at.*in loops"
    ):
        assert_equivalent(partial(Two, loops), tp=2, inputs=X, backend=backend, timeout=timeout)
    assert time.monotonic() - started < timeout + 10


def test_a_rank_that_sleeps_is_cut_off() -> None:
    started = time.monotonic()
    with pytest.raises(NotEquivalent, match=r"(?s)rank 1 was not done in time.*in sleeps"):
        assert_equivalent(partial(Two, sleeps), tp=2, inputs=X, timeout=1)
    assert time.monotonic() - started < 10
    assert_equivalent(Two, tp=2, inputs=X)  # it disturbs nobody


def test_a_deadlock_is_known_at_once(nothing_left: None) -> None:
    started = time.monotonic()
    with pytest.raises(NotEquivalent, match=r"rank 1 waits in all_reduce|different collectives"):
        assert_equivalent(partial(Two, one_more_sum), tp=2, inputs=X, timeout=100)
    assert time.monotonic() - started < 20


# bad input ----------------------------------------------------------------------------------------------------------------------


class Silent(nn.Module):
    def forward(self, x: Tensor) -> None:
        return None


class NaN(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / 0 * 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tp": 0}, "tp is 0, wanted a whole number of at least 1"),
        ({"tp": 2.0}, "tp is 2.0"),
        ({"tp": True}, "tp is True"),
        ({"tp": 2, "steps": -1}, "steps is -1"),
        ({"tp": 2, "seed": "x"}, "seed is 'x'"),
        ({"tp": 2, "sabotage": "drop"}, "sabotage is 'drop', wanted a Mutation"),
        ({"tp": 2, "optimizer": None}, "optimizer is None, wanted a function"),
        ({"tp": 2, "steps": 1, "optimizer": lambda p: 3}, "Two: no steps to compare: the model itself cannot: AttributeError"),
        ({"tp": 2, "factory": Silent}, "Silent: no outputs to compare: nothing to compare"),
        ({"tp": 2, "backend": "mpi"}, "backend is 'mpi', wanted one of local, threads, gloo"),
        ({"tp": 2, "timeout": 0}, "timeout is 0"),
        ({"tp": 2, "dtype": torch.bfloat16}, "dtype is torch.bfloat16, wanted torch.float64 or torch.float32"),
        ({"tp": 2, "factory": Two()}, "wanted a function that builds it"),
        ({"tp": 2, "factory": 3}, "factory is 3"),
        ({"tp": 2, "factory": lambda: 3}, "the factory returned int"),
        ({"tp": 2, "factory": lambda: Two().to("meta")}, "on the meta device"),
        ({"tp": 2, "inputs": None}, "Two is no transformers model, so its inputs cannot be guessed: pass inputs="),
        ({"tp": 2, "inputs": 3}, "inputs are int"),
        ({"tp": 2, "inputs": {"y": X}}, "Two itself does not run on these inputs in torch.float64: TypeError"),
        ({"tp": 2, "factory": NaN}, "NaN itself gives NaN in output"),
    ],
)
def test_bad_input(options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError) as caught:
        assert_equivalent(**{"factory": Two, "inputs": X, **options})
    assert says in str(caught.value)


def test_what_cannot_be_sent_to_a_process() -> None:
    class NoCopy(Two):
        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def __reduce__(self) -> Any:
            raise TypeError("not this one")

    with pytest.raises(InputError, match="cannot be sent to a process: not this one"):
        assert_equivalent(NoCopy, tp=2, inputs=X, backend="gloo")


def test_what_autotp_refuses_is_its_own_error() -> None:
    class One(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    with pytest.raises(RecipeError):
        assert_equivalent(One, tp=2, inputs=X, recipe="no_such_recipe")


def test_what_is_sharded_is_counted_on_the_ranks() -> None:
    found = assert_equivalent(Two, tp=2, inputs=X)
    assert found.sharded == {"a.weight", "a.bias", "b.weight"}
    assert found.local_share == (64 + 8 + 64 + 8) / (128 + 16 + 128 + 8)
    assert found.aspects["outputs"].paths == ("output",)
    one = assert_equivalent(Two, tp=1, inputs=X)
    assert not one.sharded and one.local_share == 1


def test_the_error_has_the_comparison() -> None:
    with pytest.raises(NotEquivalent) as caught:
        assert_equivalent(partial(Two, lambda y: y * 1.001 if rank() == 1 else y), tp=2, inputs=X)
    found = caught.value.found
    assert found is not None and found.aspects["outputs"].wrong == ("output",)
    assert str(found) == str(caught.value)


def test_labels_of_padding_are_left_out() -> None:
    subject = make_subject(tiny_config("llama"), None, torch.float64, 0)
    assert list(subject.more) == ["with hidden states", "with padding"]
    changes = subject.more["with padding"]
    assert torch.equal(changes["labels"] == -100, changes["attention_mask"] == 0)
    assert bool((changes["labels"] == -100).any())
