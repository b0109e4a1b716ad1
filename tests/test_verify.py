"""`verify` passes what is equal and names what is not: each kind of mistake is made once, by hand."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import LlamaConfig

from autotp.errors import InputError
from autotp.plan.expressions import Factor
from autotp.plan.layout import Layout, replicated
from autotp.testing.equivalence.module_calls import Stands, first_difference, stands_for
from autotp.verify import relative_error, verify
from autotp.verify.worker import with_autotp
from tests.support.slow import swept

WIDTH, INNER = 6, 8


class Mlp(nn.Module):
    """up, relu, down."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, INNER)
        self.down = nn.Linear(INNER, WIDTH, bias=False)

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    """Two residual Mlps."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Mlp(), Mlp()])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def inputs():
    return {"x": torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(1))}


class Reduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        return grad


class Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


def by_hand(model, mesh, example_inputs, *, mistake=""):
    tp, rank = mesh.size(), mesh.get_local_rank()
    layouts = {name: replicated(p.shape, tp) for name, p in model.named_parameters()}
    for index, block in enumerate(model.blocks):
        cut = {
            "up.weight": Layout((INNER, WIDTH), (Factor("inner", INNER, sharded=True), Factor("w", WIDTH)), tp),
            "up.bias": Layout((INNER,), (Factor("inner", INNER, sharded=True),), tp),
            "down.weight": Layout((WIDTH, INNER), (Factor("w", WIDTH), Factor("inner", INNER, sharded=True)), tp),
        }
        last = index == len(model.blocks) - 1
        for name, layout in cut.items():
            owner = block.get_submodule(name.split(".")[0])
            key = name.split(".")[1]
            part = 1 - rank if mistake == "swapped" and last and name == "down.weight" else rank
            setattr(owner, key, nn.Parameter(layout.shard(getattr(owner, key).data, part)))
            layouts[f"blocks.{index}.{name}"] = layout
        if not (mistake == "backward" and last):
            block.up.register_forward_pre_hook(lambda m, args: (Copy.apply(args[0]),))
        if not (mistake == "forward" and last):
            block.down.register_forward_hook(lambda m, args, out: Reduce.apply(out))
    if mistake == "raise" and rank == 1:
        raise ValueError("rank one cannot")
    return layouts


@functools.cache
def report(mistake=""):
    return verify("tests.test_verify:Model", 2, inputs=inputs(), parallelizer=functools.partial(by_hand, mistake=mistake), timeout=120)


def checks(found):
    return {check.name: check.passed for check in found.checks}


def test_equal_models_pass():
    found = report()
    assert found.passed, str(found)
    assert checks(found) == {"outputs": True, "gradients": True}
    assert max(check.error for check in found.checks) < 1e-12
    assert found.first_difference == ""
    assert "passed" in str(found)
    assert found.local_share == 0.5
    assert f"{found.local_share:.3f} of the parameter elements on each rank" in str(found)


PLACES = [("forward", "partial sums before it: blocks.1.down"), ("swapped", "blocks.1.down: ")]


@pytest.mark.parametrize(("mistake", "place"), swept(PLACES, PLACES[0]))
def test_a_wrong_forward_fails_and_is_placed(mistake, place):
    found = report(mistake)
    assert not found.passed
    assert not checks(found)["outputs"]
    assert place in found.first_difference


@pytest.mark.sweep
def test_a_missing_reduction_in_the_backward_pass_fails_the_gradients_alone():
    found = report("backward")
    assert checks(found) == {"outputs": True, "gradients": False}
    assert "blocks.0" in str(found)


@pytest.mark.sweep
def test_a_rank_that_raises_is_reported_with_its_traceback():
    found = report("raise")
    assert not found.passed
    assert "rank one cannot" in found.failure
    assert found.to_dict()["passed"] is False


def nan_inputs():
    return {"x": torch.full((3, WIDTH), float("nan"))}


@pytest.mark.sweep
def test_a_model_that_gives_nan_shows_nothing():
    found = verify(Model(), 1, inputs="tests.test_verify:nan_inputs", parallelizer=by_hand, timeout=120)
    assert not found.passed
    assert "the model itself gives NaN" in str(found)


def test_inputs_are_asked_for():
    found = verify("tests.test_verify:Model", 1, parallelizer=by_hand, timeout=120)
    assert not found.passed
    assert "--inputs" in found.failure


def test_a_module_without_storage_is_refused():
    with pytest.raises(InputError, match="on the meta device"):
        verify(Model().to("meta"), 2)


def test_tp_below_one_is_refused():
    with pytest.raises(InputError, match="tp is 0"):
        verify("tests.test_verify:Model", 0)


def test_relative_error():
    one = torch.tensor([1.0, -4.0, float("-inf")], dtype=torch.float64)
    assert relative_error(one, one) == 0
    assert relative_error(one + torch.tensor([0.0, 1.0, 0.0]), one) == 0.25
    assert relative_error(torch.nan_to_num(one), one) == float("inf")
    assert relative_error(one[:2], one) == float("inf")
    assert relative_error(torch.tensor([1, 2]), torch.tensor([1, 3])) == float("inf")
    assert relative_error(torch.ones(2), torch.zeros(2)) == float("inf")
    assert relative_error(torch.ones(2), torch.full((2,), 2.0), scale=10) == 0.1


def test_what_a_value_may_stand_for():
    whole = torch.randn(4, 6, dtype=torch.float64)
    part = torch.randn(4, 6, dtype=torch.float64)
    assert stands_for([whole, whole], whole) is Stands.REPLICATED
    assert stands_for([part, whole - part], whole) is Stands.PARTIAL
    assert stands_for([*whole.chunk(2, 1)], whole) is Stands.SHARDED
    assert stands_for([whole, part], whole) is Stands.NOT
    assert stands_for([whole[:, :3], whole[:, :3]], whole) is Stands.NOT
    assert stands_for([whole[:, :4], whole[:, 2:]], whole) is Stands.SHARDED, "repeated parts: nothing can be said"


def test_a_call_that_did_not_happen_is_a_difference():
    whole = torch.ones(2)
    key = ("layer", 0, ())
    assert first_difference({key: whole}, [{key: whole}, {}]) == "layer did not return on every rank"
    assert first_difference({key: whole}, [{key: whole}, {key: whole}]) == ""


def test_a_partial_sum_that_is_held_back_for_a_later_module():
    a, b = torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    zeros = torch.zeros_like(a)
    reference = {("attention", 0, ()): a, ("mlp", 0, ()): b, ("block", 0, ()): a + b}
    assert stands_for([zeros, zeros], a) is Stands.HELD
    right = {**reference, ("attention", 0, ()): zeros, ("mlp", 0, ()): a + b}
    assert first_difference(reference, [right, right]) == ""
    wrong = {**right, ("mlp", 0, ()): b + 2 * a}
    assert first_difference(reference, [wrong, wrong]).startswith("mlp: ")
    assert first_difference(reference, [wrong, wrong]).endswith("; zeros before it: attention")


def slightly_wrong(model, mesh, example_inputs):
    """autotp's own work, then one weight of one rank changed by a millionth."""
    layouts = with_autotp(model, mesh, example_inputs)
    if mesh.get_local_rank() == 1:
        with torch.no_grad():
            model.model.layers[1].mlp.down_proj.weight.to_local().mul_(1 + 1e-6)
    return layouts


@pytest.mark.sweep
@pytest.mark.parametrize("parallelizer", [with_autotp, slightly_wrong])
def test_a_real_model_and_one_wrong_weight_in_it(parallelizer):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    found = verify(config, 2, parallelizer=parallelizer, timeout=150)
    if parallelizer is with_autotp:
        assert found.passed, str(found)
        assert checks(found) == {"outputs": True, "gradients": True, "tokens": True}
    else:
        assert not found.passed
        assert found.first_difference.startswith("model.layers.1.mlp.down_proj: "), found.first_difference
